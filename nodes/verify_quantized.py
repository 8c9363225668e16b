from comfy_api.latest import io, ui

from ..host import files, model, verify
from . import inputs, save_inputs


class VerifyQuantized(io.ComfyNode):
    """A quantized file against the file that it was made from."""

    @classmethod
    def define_schema(cls):
        names = sorted([*files.list_safetensors(), *files.list_gguf()])
        return io.Schema(
            node_id="Lowbit_VerifyQuantized",
            display_name="Verify (Lowbit)",
            category="model/quantization",
            description="Compares a quantized file with its source, weight by weight, and says what looks broken. "
            "Both are read piece by piece: they may be larger than the memory.",
            search_aliases=["lowbit", "compare", "check", "damaged", "sqnr", "quantization error"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint", options=names, tooltip="The quantized file, from models/diffusion_models."
                ),
                io.Combo.Input("source", options=names, tooltip="What it was made from: BF16, FP16, FP32 or FP8."),
                io.Combo.Input(
                    "unconditional",
                    options=[model.SAME_FILE, *names],
                    default=model.SAME_FILE,
                    optional=True,
                    tooltip="'same file': all branches that the checkpoint holds. Or its unconditional branch.",
                ),
                io.Combo.Input(
                    "source_unconditional",
                    options=[model.SAME_FILE, *names],
                    default=model.SAME_FILE,
                    optional=True,
                    tooltip="Likewise, of the source.",
                ),
                save_inputs.device(),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The table, worst weights first."),
                io.Image.Output("picture", display_name="picture", tooltip="Errors by kind of layer and depth."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint=None, source=None, unconditional=None, source_unconditional=None, **_others):
        return inputs.picked_states(checkpoint, source, unconditional, source_unconditional)

    @classmethod
    def execute(
        cls, checkpoint, source, unconditional=model.SAME_FILE, source_unconditional=model.SAME_FILE, device="default"
    ) -> io.NodeOutput:
        request = verify.VerifyRequest(checkpoint, source, unconditional, source_unconditional, device)
        report, picture = verify.verify_files(request)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(report, picture, ui=shown)
