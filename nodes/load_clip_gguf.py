from comfy_api.latest import io

from nodes import CLIPLoader  # the host's

from ..host import files, text_encoder
from . import inputs


class LoadClipGguf(io.ComfyNode):
    """Text encoders in GGUF files as llama.cpp's converter writes them."""

    @classmethod
    def define_schema(cls):
        stock = CLIPLoader.INPUT_TYPES()
        return io.Schema(
            node_id="Lowbit_LoadClipGguf",
            display_name="Load CLIP (GGUF)",
            category="model/loaders",
            description="Loads a text encoder from a GGUF file made for llama.cpp, such as Qwen3-VL-8B for Ideogram 4. "
            "Its weights and its vocabulary stay quantized in memory. Qwen3-VL, Qwen3, Qwen2.5-VL, Llama 3 and T5.",
            search_aliases=["lowbit", "gguf", "text encoder", "clip loader", "qwen", "t5", "q4_k", "ideogram"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=files.list_text_encoder_gguf(),
                    tooltip="GGUF file from models/text_encoders; of a model with vision the language model, not its "
                    "mmproj file.",
                ),
                io.Combo.Input(
                    "type",
                    options=list(stock["required"]["type"][0]),
                    tooltip="The image model that the text is for, as in ComfyUI's Load CLIP: ideogram4 for Ideogram "
                    "4.",
                ),
                inputs.text_encoder_device(stock),
            ],
            outputs=[io.Clip.Output("clip", display_name="clip", tooltip="The text encoder, for CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name=None, **_others):
        return inputs.text_encoder_fingerprint(clip_name)

    @classmethod
    def execute(cls, clip_name, type, device="default") -> io.NodeOutput:
        path = files.text_encoder_path(clip_name)
        return io.NodeOutput(text_encoder.load_clip(text_encoder.TextEncoderRequest((path,), type, device)))
