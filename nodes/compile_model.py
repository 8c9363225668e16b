from comfy_api.latest import io

from ..host import compile


class CompileModel(io.ComfyNode):
    """torch.compile that keeps a model and its model_negative apart."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lowbit_CompileModel",
            display_name="Compile Model (Lowbit)",
            category="model/patch",
            description="Makes a model faster with torch.compile. Works with Dual Model CFG Guider, where ComfyUI's "
            "own compile node computes both passes with the weights of the first model: give each model its own node.",
            search_aliases=["lowbit", "torch compile", "torch.compile", "inductor", "speed", "ideogram"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to compile, from a Lowbit loader or any other one; LoRA nodes may come before "
                    "or after. The first step takes longer, some seconds to a minute, and so does the first one after "
                    "a change such as a LoRA.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(compile.BACKENDS),
                    default=compile.BACKENDS[0],
                    tooltip="inductor: fuses operations into new kernels, one transformer block at a time; needs "
                    "Triton on a GPU, a C++ compiler on a CPU. cudagraphs: records the whole model, which saves the "
                    "time of launching kernels; only for NVIDIA GPUs that hold all weights at once.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The same model, compiled at first use.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model, backend) -> io.NodeOutput:
        return io.NodeOutput(compile.compile_model(model, backend))
