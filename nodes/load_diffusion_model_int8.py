from comfy_api.latest import io

from ..host import files, model
from . import inputs


class LoadDiffusionModelInt8(io.ComfyNode):
    """INT8 safetensors, in every layout in circulation, and float or FP8 ones quantized while they load."""

    @classmethod
    def define_schema(cls):
        names = files.list_safetensors()
        return io.Schema(
            node_id="Lowbit_LoadDiffusionModelInt8",
            display_name="Load Diffusion Model (INT8)",
            category="model/loaders",
            description="Loads an INT8 (W8A8) diffusion model, such as Ideogram 4, and its unconditional branch if it "
            "has one. BF16, FP16 and FP8 checkpoints are quantized to INT8 while they load.",
            search_aliases=["lowbit", "int8", "w8a8", "quantized", "ideogram", "unet loader"],
            inputs=[
                inputs.checkpoint(names, "INT8, BF16, FP16 or FP8 safetensors file from models/diffusion_models."),
                inputs.unconditional(names),
                inputs.compute_mode(),
                inputs.dtype(),
                inputs.base_checkpoint("base_checkpoint", names, ""),
                inputs.base_checkpoint("base_checkpoint_unconditional", names, " of the unconditional branch"),
                inputs.protected_layers(),
                inputs.tune_kernels(),
            ],
            outputs=inputs.model_outputs(),
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        checkpoint=None,
        unconditional=None,
        base_checkpoint=None,
        base_checkpoint_unconditional=None,
        **_others,
    ):
        return inputs.fingerprint(checkpoint, unconditional, base_checkpoint, base_checkpoint_unconditional)

    @classmethod
    def execute(
        cls,
        checkpoint,
        unconditional,
        compute_mode,
        dtype,
        base_checkpoint=model.NONE,
        base_checkpoint_unconditional=model.NONE,
        protected_layers="",
        tune_kernels=True,
    ) -> io.NodeOutput:
        request = model.LoadRequest(
            files.full_path(checkpoint),
            base_path=inputs.optional_path(base_checkpoint),
            compute_mode=compute_mode,
            dtype=dtype,
            quantize=True,
            protected=tuple(part.strip() for part in protected_layers.split(",") if part.strip()),
            tune=tune_kernels,
        )
        base = inputs.optional_path(base_checkpoint_unconditional)
        return io.NodeOutput(*model.load_pair(request, inputs.path_or_choice(unconditional), base))
