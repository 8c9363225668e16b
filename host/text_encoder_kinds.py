"""What the host knows of text encoders, and files that it would load as something else or in part without a word."""

from __future__ import annotations

import os
from collections.abc import Iterable

import comfy.sd
import torch

from ..loaders.errors import CheckpointError, counted
from ..loaders.text_encoder_gguf import TextEncoder

CLIPType, TEModel = comfy.sd.CLIPType, comfy.sd.TEModel

# Text encoders whose tokenizer the host reads from their own safetensors file.
_TOKENIZER_IN_FILE = (TEModel.MISTRAL3_24B, TEModel.MISTRAL3_24B_PRUNED_FLUX2, TEModel.MINISTRAL_3_3B)
# What a model can lack and still encode text: the vision part and the layer that predicts the next token.
_NOT_FOR_TEXT = ("visual.", "vision_model.", "multi_modal_projector.", "model.lm_head.")
# What the types for two text encoders take, each once at most.
_PARTS = {
    CLIPType.STABLE_DIFFUSION: (TEModel.CLIP_L, TEModel.CLIP_G),  # the host's word for sdxl
    CLIPType.SD3: (TEModel.CLIP_L, TEModel.CLIP_G, TEModel.T5_XXL),
    CLIPType.FLUX: (TEModel.CLIP_L, TEModel.T5_XXL),
    CLIPType.HUNYUAN_VIDEO: (TEModel.CLIP_L, TEModel.LLAMA3_8),
    CLIPType.HIDREAM: (TEModel.CLIP_L, TEModel.CLIP_G, TEModel.T5_XXL, TEModel.LLAMA3_8),
    CLIPType.HUNYUAN_IMAGE: (TEModel.QWEN25_7B, TEModel.BYT5_SMALL_GLYPH),
    CLIPType.HUNYUAN_VIDEO_15: (TEModel.QWEN25_7B, TEModel.BYT5_SMALL_GLYPH),
    CLIPType.KANDINSKY5: (TEModel.QWEN25_7B, TEModel.CLIP_L),
    CLIPType.KANDINSKY5_IMAGE: (TEModel.QWEN25_7B, TEModel.CLIP_L),
    CLIPType.LTXV: (TEModel.GEMMA_3_12B,),
    CLIPType.NEWBIE: (TEModel.GEMMA_3_4B, TEModel.JINA_CLIP_2),
    CLIPType.ACE: (TEModel.QWEN3_06B, TEModel.QWEN3_2B, TEModel.QWEN3_4B),
}
_WITHOUT_GGUF = (CLIPType.STABLE_DIFFUSION, CLIPType.LTXV, CLIPType.NEWBIE)  # of these, no part can be read from one
_NAMES = {
    TEModel.CLIP_L: "CLIP-L",
    TEModel.CLIP_G: "CLIP-G",
    TEModel.T5_XXL: "T5-XXL",
    TEModel.T5_BASE: "a small T5",
    TEModel.LLAMA3_8: "Llama 3 8B",
    TEModel.QWEN25_3B: "Qwen2.5-VL-3B",
    TEModel.QWEN25_7B: "Qwen2.5-VL-7B",
    TEModel.BYT5_SMALL_GLYPH: "ByT5 small",
    TEModel.GEMMA_3_4B: "Gemma 3 4B",
    TEModel.GEMMA_3_12B: "Gemma 3 12B",
    TEModel.JINA_CLIP_2: "Jina CLIP 2",
    TEModel.QWEN3_06B: "Qwen3 0.6B",
    TEModel.QWEN3_2B: "Qwen3 1.7B",
    TEModel.QWEN3_4B: "Qwen3 4B",
    TEModel.QWEN3_8B: "Qwen3 8B",
}


def known_kind(encoder: TextEncoder, state_dict: dict[str, torch.Tensor], clip_type: CLIPType) -> TEModel | None:
    """What the host takes a text encoder for; refuses what it has no tokenizer for, and what it would take for another
    model without a word."""
    detected = comfy.sd.detect_te_model(state_dict)
    if encoder.architecture is None:
        return detected
    if encoder.architecture != "llama" and detected in (TEModel.LLAMA3_8, *_TOKENIZER_IN_FILE):
        raise CheckpointError(
            encoder.path,
            found=f"a {encoder.architecture} of a size that this ComfyUI does not know",
            expected="a text encoder of an image or video model",
            todo="Pick the size that the model's page names, or update ComfyUI.",
        )
    if clip_type == CLIPType.IDEOGRAM4 and detected != TEModel.QWEN3_8B:
        raise CheckpointError(
            encoder.path,
            found=f"a {encoder.architecture} that is no Qwen3-VL-8B",
            expected="Qwen3-VL-8B, the text encoder of Ideogram 4",
            todo="Pick its file, or the `type` that this text encoder is for.",
        )
    if detected in _TOKENIZER_IN_FILE:
        raise CheckpointError(
            encoder.path,
            found="a Mistral text encoder",
            expected="one whose tokenizer ComfyUI brings along",
            todo="ComfyUI takes this model's tokenizer from a safetensors file, and GGUF files hold it in another "
            "form: use the safetensors version with ComfyUI's Load CLIP node.",
        )
    return detected


def check_parts(encoders: list[TextEncoder], kinds: list[TEModel | None], clip_type: CLIPType, type_name: str) -> None:
    """Refuse a text encoder that the type has no use for, and one that comes twice: the host would load it in the place
    of another, and only log that."""
    parts = _PARTS.get(clip_type)
    if parts is None:
        return
    todo = "Check `type`, or pick another file."
    if clip_type in _WITHOUT_GGUF:
        todo = (
            "Check `type`, or load the model's text encoders with ComfyUI's Load CLIP (Dual) node: this type takes "
            "none that can be read from GGUF."
        )
    for index, (encoder, kind) in enumerate(zip(encoders, kinds, strict=True)):
        if kind not in parts:
            raise CheckpointError(
                encoder.path,
                found=_kind_name(encoder, kind),
                expected=f"{_one_of(parts)} for the type {type_name}",
                todo=todo,
            )
        if kind in kinds[:index]:
            twin = encoders[kinds.index(kind)].path
            again = "picked twice" if twin == encoder.path else f"which {os.path.basename(twin)} is too"
            raise CheckpointError(
                encoder.path,
                found=f"{_NAMES[kind]}, {again}",
                expected=f"{_one_of(part for part in parts if part != kind)} beside it for the type {type_name}",
                todo="Pick the other text encoder of the model.",
            )


def _one_of(parts: Iterable[TEModel]) -> str:
    *others, last = [_NAMES[part] for part in parts]
    return f"{', '.join(others)} or {last}" if others else last


def _kind_name(encoder: TextEncoder, kind: TEModel | None) -> str:
    if kind is not None:
        return _NAMES.get(kind, f"a text encoder of another model ({kind.name})")
    if any(key.startswith(("vision_model.", "visual.")) for key in encoder.weights):
        return "a vision model, which reads pictures alone"
    return "no text encoder that this ComfyUI knows"


def misfit(encoder: TextEncoder, mismatch: str) -> CheckpointError:
    return CheckpointError(
        encoder.path,
        found=f"shapes that do not fit the text encoder ({mismatch})",
        expected="the shapes of a text encoder that ComfyUI knows",
        todo="The file is of another size or variant of the model, or of another type than the one picked: check "
        "`type`, or pick another file.",
    )


def check_complete(encoder: TextEncoder, missing_keys: list[str]) -> None:
    """Refuse a half-loaded text encoder: the host only logs what a file did not supply."""
    missing = [key for key in missing_keys if not key.startswith(_NOT_FOR_TEXT)]
    if missing:
        raise CheckpointError(
            encoder.path,
            found=f"that {counted(len(missing), 'tensor')} of the text encoder are missing, such as {missing[0]}",
            expected="every weight of the text encoder that this type needs",
            todo="Check `type`, or pick another file.",
        )
