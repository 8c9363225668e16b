"""A text encoder in GGUF -> the host's CLIP: read and renamed by our loader, detected and built by the host."""

from __future__ import annotations

import dataclasses
import os

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.qwen3vl import QWEN3VL_VISION

from ..formats import GgmlWeight
from ..loaders.errors import CheckpointError, counted
from ..loaders.file_state import FileState, file_states
from ..loaders.text_encoder_gguf import TextEncoder, read_text_encoder
from . import compat, layouts
from .files import HostFile, check_still_the_same, errors_for_the_page
from .ops import LoadSettings, make_operations
from .patcher import adopt

CLIPType, TEModel = comfy.sd.CLIPType, comfy.sd.TEModel

# Text encoders whose tokenizer the host reads from their own safetensors file.
_TOKENIZER_IN_FILE = (TEModel.MISTRAL3_24B, TEModel.MISTRAL3_24B_PRUNED_FLUX2, TEModel.MINISTRAL_3_3B)
# What a model can lack and still encode text: the vision part and the layer that predicts the next token.
_NOT_FOR_TEXT = ("visual.", "vision_model.", "multi_modal_projector.", "model.lm_head.")
# For these types the host takes the language model of Qwen3-VL alone; for others it looks for the vision part.
_TEXT_ALONE = (CLIPType.IDEOGRAM4, CLIPType.FLUX, CLIPType.FLUX2)


@dataclasses.dataclass(frozen=True)
class TextEncoderRequest:
    """Everything that decides how a text encoder is loaded; equal requests load equal ones.

    path: the GGUF file. type, device: what the host's own node offers under these names. files: the file as it is when
    this is made; one that changes is another request.
    """

    path: str
    type: str
    device: str = "default"
    files: tuple[FileState, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "files", file_states(self.path))


def load_clip(request: TextEncoderRequest, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load a text encoder as the host's CLIP.

    disable_dynamic: take the host's plain patcher although dynamic VRAM is on. Raises ValueError with a sentence for
    the person who picked the file.
    """
    with errors_for_the_page():
        return _load_clip(request, disable_dynamic)


def load_patcher(request: TextEncoderRequest, disable_dynamic: bool = False) -> ModelPatcher:
    """The patcher alone: what the host asks for when it builds the same text encoder once more."""
    check_still_the_same(request.files)
    return load_clip(request, disable_dynamic).patcher


def _load_clip(request: TextEncoderRequest, disable_dynamic: bool) -> comfy.sd.CLIP:
    compat.check_host()
    encoder = read_text_encoder(request.path, HostFile)
    clip_type = getattr(CLIPType, request.type.upper(), CLIPType.STABLE_DIFFUSION)
    # A prompt is encoded once for all steps: what `int8` would save is not worth its error.
    settings = LoadSettings(os.path.basename(request.path), "exact")
    model_options = {"custom_operations": make_operations(settings)}
    if request.device == "cpu":
        model_options["load_device"] = model_options["offload_device"] = torch.device("cpu")
    # Built where it is kept: the modules would else reserve room on the GPU for tables that never come in floats.
    model_options["initial_device"] = model_options.get(
        "offload_device", comfy.model_management.text_encoder_offload_device()
    )
    state_dict = host_state_dict(encoder)
    _check_known(encoder, state_dict, clip_type)
    if encoder.architecture == "qwen3vl" and clip_type not in _TEXT_ALONE:
        state_dict |= _vision_stand_ins(encoder, state_dict)
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            [state_dict],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=clip_type,
            model_options=model_options,
            disable_dynamic=disable_dynamic,
        )
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise _misfit(encoder, str(error).splitlines()[-1].strip()) from error
    _check_complete(encoder, settings)
    _without_vision(clip, os.path.basename(request.path))
    clip.patcher.cached_patcher_init = (load_patcher, (request,))
    adopt(clip.patcher, request.files)
    return clip


def host_state_dict(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """The weights as the host's detection and modules read them: quantized ones with their logical shapes."""
    return {
        key: layouts.to_host(weight, torch.float32) if isinstance(weight, GgmlWeight) else weight
        for key, weight in encoder.weights.items()
    }


def _check_known(encoder: TextEncoder, state_dict: dict[str, torch.Tensor], clip_type: CLIPType) -> None:
    """Refuse what the host has no tokenizer for, and what it would take for another model without a word."""
    detected = comfy.sd.detect_te_model(state_dict)
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


def _vision_stand_ins(encoder: TextEncoder, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros under the two keys of the vision part by which the host knows a Qwen3-VL; `_without_vision` drops them."""
    hidden = state_dict["model.embed_tokens.weight"].shape[1]
    sizes = {2560: "qwen3vl_4b", 4096: "qwen3vl_8b"}
    if hidden not in sizes:
        raise CheckpointError(
            encoder.path,
            found=f"a Qwen3-VL with {hidden:,} features",
            expected="Qwen3-VL-4B or 8B, with 2,560 or 4,096",
            todo="Pick the size that the model's page names.",
        )
    merged = 4 * QWEN3VL_VISION[sizes[hidden]]["hidden_size"]  # four patches become one token
    return {
        "model.visual.deepstack_merger_list.0.norm.weight": torch.zeros(merged),
        "model.visual.merger.linear_fc2.weight": torch.zeros(1).expand(hidden, merged),
    }


def _misfit(encoder: TextEncoder, mismatch: str) -> CheckpointError:
    return CheckpointError(
        encoder.path,
        found=f"shapes that do not fit the text encoder ({mismatch})",
        expected="the shapes of a text encoder that ComfyUI knows",
        todo="The file is of another size or variant of the model, or of another type than the one picked: check "
        "`type`, or pick another file.",
    )


def _check_complete(encoder: TextEncoder, settings: LoadSettings) -> None:
    """Refuse a half-loaded text encoder: the host only logs what a file did not supply."""
    missing = [key for key in settings.missing_keys if not key.startswith(_NOT_FOR_TEXT)]
    if missing:
        raise CheckpointError(
            encoder.path,
            found=f"that {counted(len(missing), 'tensor')} of the text encoder are missing, such as {missing[0]}",
            expected="every weight of the text encoder that this type needs",
            todo="Check `type`, or pick another file.",
        )


def _without_vision(clip: comfy.sd.CLIP, file_name: str) -> None:
    """Drop the vision part, which a GGUF file of a language model does not hold, and refuse pictures by its name."""

    def refuse(embed, device=None):
        raise ValueError(
            f"{file_name} holds the language model alone, so it cannot read pictures: encode text without an image, or "
            "load the safetensors version with ComfyUI's Load CLIP node."
        )

    for module in list(clip.cond_stage_model.modules()):
        if isinstance(getattr(module, "visual", None), torch.nn.Module):
            module.visual = None
            module.preprocess_embed = refuse
