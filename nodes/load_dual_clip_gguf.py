from comfy_api.latest import io

from nodes import DualCLIPLoader  # the host's

from ..host import files, text_encoder
from . import inputs


class LoadDualClipGguf(io.ComfyNode):
    """The two text encoders of one model, of which at least one is a GGUF file."""

    @classmethod
    def define_schema(cls):
        stock = DualCLIPLoader.INPUT_TYPES()
        names = files.list_text_encoders()
        return io.Schema(
            node_id="Lowbit_LoadDualClipGguf",
            display_name="Load Dual CLIP (GGUF)",
            category="model/loaders",
            description="Loads the two text encoders of a model, one or both from GGUF files made for llama.cpp. Their "
            "weights stay quantized in memory; a safetensors file is read as ComfyUI's Load CLIP (Dual) reads it.\n\n"
            "flux: CLIP-L, T5-XXL\nsd3: T5-XXL with CLIP-L or CLIP-G\nhunyuan_video: CLIP-L, Llama 3\n"
            "hidream: T5-XXL, Llama 3\nhunyuan_image, hunyuan_video_15: Qwen2.5-VL-7B, ByT5 small\n"
            "kandinsky5: Qwen2.5-VL-7B, CLIP-L",
            search_aliases=["lowbit", "gguf", "text encoder", "dual clip loader", "flux", "t5", "llama", "clip_l"],
            inputs=[
                io.Combo.Input(
                    "clip_name1",
                    options=names,
                    tooltip="File from models/text_encoders. At least one of the two is GGUF, the other may be "
                    "safetensors; their order does not matter.",
                ),
                io.Combo.Input(
                    "clip_name2",
                    options=names,
                    tooltip="The model's other text encoder; of a model with vision the language model, not its mmproj "
                    "file.",
                ),
                io.Combo.Input(
                    "type",
                    options=list(stock["required"]["type"][0]),
                    tooltip="The image or video model that the text is for, as in ComfyUI's Load CLIP (Dual). No GGUF "
                    "file serves sdxl, ltxv and newbie.",
                ),
                inputs.text_encoder_device(stock),
            ],
            outputs=[io.Clip.Output("clip", display_name="clip", tooltip="Both text encoders, for CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name1=None, clip_name2=None, **_others):
        return inputs.text_encoder_fingerprint(clip_name1, clip_name2)

    @classmethod
    def execute(cls, clip_name1, clip_name2, type, device="default") -> io.NodeOutput:
        paths = (files.text_encoder_path(clip_name1), files.text_encoder_path(clip_name2))
        return io.NodeOutput(text_encoder.load_clip(text_encoder.TextEncoderRequest(paths, type, device)))
