from comfy_api.latest import io, ui

from ..host import convert
from . import save_inputs


class SaveAsInt8(io.ComfyNode):
    """A checkpoint file -> INT8 safetensors in the host's own format."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lowbit_SaveAsInt8",
            display_name="Save as INT8 (Lowbit)",
            category="model/saving",
            description="Converts a checkpoint file to INT8 (W8A8) in ComfyUI's own format, which ComfyUI loads with "
            "and without Lowbit. It needs no more memory than a few rows of a layer take.",
            search_aliases=["lowbit", "int8", "w8a8", "quantize", "convert", "smoothquant", "convrot", "export model"],
            is_output_node=True,
            inputs=[
                *save_inputs.files_to_convert("lowbit_int8"),
                *save_inputs.protection(),
                io.Boolean.Input(
                    "convrot",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Rotates input features in groups of 256: a smaller error, 3 to 7 % slower.",
                ),
                save_inputs.activation_record("Switches smoothing (SmoothQuant) on, which costs no speed."),
                io.Float.Input(
                    "smoothing_alpha",
                    default=convert.DEFAULT_ALPHA,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Only with an activation record: how much of the outliers moves from the activations into "
                    "the weights.",
                ),
                save_inputs.device(),
            ],
            outputs=[save_inputs.report()],
        )

    @classmethod
    def fingerprint_inputs(cls, **picked):
        return save_inputs.fingerprint(**picked)

    @classmethod
    def execute(cls, convrot=False, smoothing_alpha=convert.DEFAULT_ALPHA, **shared) -> io.NodeOutput:
        report = convert.save_as_int8(save_inputs.request(**shared), convrot, smoothing_alpha)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
