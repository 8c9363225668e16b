"""Nodes for tests: conditioning without a text encoder, and a latent as a file that a test can read."""

import os

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


class SmallModelsExtension(ComfyExtension):
    async def get_node_list(self):
        return [TestConditioning, TestSaveLatent]
