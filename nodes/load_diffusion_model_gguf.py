from comfy_api.latest import io

from ..host import files, model
from . import inputs


class LoadDiffusionModelGguf(io.ComfyNode):
    """GGUF files with one or both branches of a diffusion model, any of the block types that circulate."""

    @classmethod
    def define_schema(cls):
        names = files.list_gguf()
        return io.Schema(
            node_id="Lowbit_LoadDiffusionModelGguf",
            display_name="Load Diffusion Model (GGUF)",
            category="model/loaders",
            description="Loads a GGUF diffusion model (Q4_K, Q8_0 and the rest of the family), such as Ideogram 4, "
            "and its unconditional branch if it has one.",
            search_aliases=["lowbit", "gguf", "q4_k", "q8_0", "quantized", "ideogram", "unet loader"],
            inputs=[
                inputs.checkpoint(names, "GGUF file from models/diffusion_models."),
                inputs.unconditional(names),
                inputs.compute_mode(),
                inputs.dtype(),
                inputs.tune_kernels(),
            ],
            outputs=inputs.model_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint=None, unconditional=None, **_others):
        return inputs.fingerprint(checkpoint, unconditional)

    @classmethod
    def execute(cls, checkpoint, unconditional, compute_mode, dtype, tune_kernels=True) -> io.NodeOutput:
        request = model.LoadRequest(
            files.full_path(checkpoint), compute_mode=compute_mode, dtype=dtype, tune=tune_kernels
        )
        return io.NodeOutput(*model.load_pair(request, inputs.path_or_choice(unconditional)))
