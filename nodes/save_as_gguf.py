from comfy_api.latest import io, ui

from ..host import convert
from . import save_inputs


class SaveAsGguf(io.ComfyNode):
    """A checkpoint file -> GGUF."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lowbit_SaveAsGguf",
            display_name="Save as GGUF (Lowbit)",
            category="model/saving",
            description="Converts a checkpoint file to GGUF (Q4_K, Q8_0 and others). It needs no more memory than a "
            "few rows of a layer take.",
            search_aliases=["lowbit", "gguf", "q4_k", "q8_0", "quantize", "convert", "export model"],
            is_output_node=True,
            inputs=[
                *save_inputs.files_to_convert("lowbit-Q4_K"),
                io.Combo.Input(
                    "type",
                    options=list(convert.POLICIES),
                    default="q4_k",
                    tooltip="Of the linear layers inside the blocks; everything else stays BF16 or F16. q4_k: 4.5 bits "
                    "a weight. q5_k: 5.5 bits, q6_k: 6.6, each with half the error of the one before. q8_0: 8.5 bits, "
                    "near the original.",
                ),
                *save_inputs.protection(),
                io.String.Input(
                    "policy_file",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="JSON file in the output folder that says which layer gets which type; replaces 'type'.",
                ),
                io.String.Input(
                    "architecture",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Name of the model family in the file (general.architecture), such as flux or wan, by "
                    "which other programs know it. Empty: that of the source, or found from its layers.",
                ),
                save_inputs.activation_record("Tells q4_k, q5_k and q6_k which input channels matter."),
                save_inputs.device(),
            ],
            outputs=[save_inputs.report()],
        )

    @classmethod
    def fingerprint_inputs(cls, **picked):
        return save_inputs.fingerprint(**picked)

    @classmethod
    def execute(cls, type, policy_file="", architecture="", **shared) -> io.NodeOutput:
        report = convert.save_as_gguf(save_inputs.request(**shared), type, policy_file, architecture)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
