from comfy_api.latest import io, ui

from ..host import inspect


class InspectQuantizedModel(io.ComfyNode):
    """What a MODEL is made of and what computes it on this machine."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lowbit_InspectQuantizedModel",
            display_name="Inspect Quantized Model",
            category="model/loaders",
            description="Shows the formats, sizes and protected layers of a model, and which implementation computes "
            "each op on this machine and why a faster one does not apply.",
            search_aliases=["lowbit", "quantized", "bits per weight", "int8", "gguf"],
            is_output_node=True,
            inputs=[io.Model.Input("model", tooltip="The model to look at, from a Lowbit loader or any other one.")],
            outputs=[io.String.Output("report", tooltip="The table as text.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        report = inspect.report(model)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
