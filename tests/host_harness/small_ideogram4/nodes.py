"""Nodes for tests: conditioning without a text encoder, a latent as a file that a test can read, a model that fails."""

import itertools
import os
from typing import ClassVar

import comfy.model_management
import comfy.patcher_extension
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io


class TestConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LowbitTest_Conditioning",
            display_name="Test Conditioning",
            category="testing/lowbit",
            description="Random text features that depend on the seed alone.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, tooltip="Chooses the features."),
                io.Int.Input("tokens", default=16, min=1, max=4096, tooltip="Number of text tokens."),
                io.Int.Input("width", default=832, min=1, max=65536, tooltip="Features a token."),
                io.Int.Input(
                    "pooled_width", default=0, min=0, max=65536, tooltip="Pooled features (Flux); 0 for none."
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed, tokens, width, pooled_width) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(1, tokens, width, generator=generator)
        extra = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}
        if pooled_width:
            extra["pooled_output"] = torch.randn(1, pooled_width, generator=generator)
        return io.NodeOutput([[features, extra]])


class TestSaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LowbitTest_SaveLatent",
            display_name="Test Save Latent",
            category="testing/lowbit",
            description="Writes the latent as `samples` in a safetensors file, as it is.",
            inputs=[
                io.Latent.Input("latent", tooltip="The latent to write."),
                io.String.Input(
                    "filename", default="latent", tooltip="File name in the output folder, without extension."
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, filename) -> io.NodeOutput:
        name = f"{filename}.safetensors"
        path = os.path.join(folder_paths.get_output_directory(), name)
        comfy.utils.save_torch_file({"samples": latent["samples"].float().cpu().contiguous()}, path)
        return io.NodeOutput(ui={"latents": [{"filename": name, "subfolder": "", "type": "output"}]})


class TestFailOnce(io.ComfyNode):
    """A model whose call number `call` fails, the first time that it is made in this process with this `name`."""

    failed: ClassVar[set[str]] = set()

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LowbitTest_FailOnce",
            display_name="Test Fail Once",
            category="testing/lowbit",
            description="Runs out of memory in one call of the model, or is interrupted there; afterwards it is "
            "harmless.",
            inputs=[
                io.Model.Input("model", tooltip="The model to fail."),
                io.Combo.Input("fault", options=["out_of_memory", "interrupt"], tooltip="What happens."),
                io.Int.Input("call", default=1, min=0, max=4096, tooltip="In which call of the model, from 0."),
                io.String.Input("name", default="", tooltip="Another name fails once more."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, fault, call, name) -> io.NodeOutput:
        model = model.clone()
        calls = itertools.count()

        def fails(_module, _inputs, _output):
            if next(calls) != call or name in cls.failed:
                return
            cls.failed.add(name)
            if fault == "interrupt":  # the next layer notices
                comfy.model_management.interrupt_current_processing()
            else:
                raise torch.OutOfMemoryError("LowbitTest_FailOnce: no memory is left")

        # In the middle of the call: one layer has run, others have not.
        def hooked(executor, *args, **kwargs):
            layer = executor.class_obj.layers[0].attention.qkv
            handle = layer.register_forward_hook(fails)
            try:
                return executor(*args, **kwargs)
            finally:
                handle.remove()

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "lowbit_test", hooked)
        return io.NodeOutput(model)


class SmallModelsExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestConditioning, TestSaveLatent, TestFailOnce]
