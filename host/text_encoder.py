"""Text encoders in GGUF -> the host's CLIP: read and renamed by our loader, detected and built by the host.

Models that take two text encoders may have one of them in safetensors. Its tensors are read as the host reads them, and
layers that the host's own markers call quantized are the host's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.text_encoders.qwen3vl import QWEN3VL_VISION

from ..formats import GgmlWeight
from ..loaders import open_checkpoint
from ..loaders.errors import TAKE_ANOTHER, CheckpointError
from ..loaders.file_state import FileState, file_states
from ..loaders.text_encoder_gguf import TextEncoder, read_text_encoder, text_encoder_of
from . import compat, layouts
from .embedding import LowbitEmbedding
from .files import HostFile, check_still_the_same, errors_for_the_page, name_source
from .ops import LoadSettings, LowbitLinear, make_operations
from .patcher import adopt
from .text_encoder_kinds import CLIPType, TEModel, check_complete, check_parts, known_kind, misfit

# For these types the host takes the language model of Qwen3-VL alone; for others it looks for the vision part.
_TEXT_ALONE = (CLIPType.IDEOGRAM4, CLIPType.FLUX, CLIPType.FLUX2)


@dataclasses.dataclass(frozen=True)
class TextEncoderRequest:
    """Everything that decides how a CLIP is loaded; equal requests load equal ones.

    paths: its files, one for each text encoder; at least one is GGUF. type, device: what the host's own nodes offer
    under these names. files: the files as they are when this is made; one that changes is another request.
    """

    paths: tuple[str, ...]
    type: str
    device: str = "default"
    files: tuple[FileState, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "files", file_states(*self.paths))


def load_clip(request: TextEncoderRequest, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load the text encoders as the host's CLIP.

    disable_dynamic: take the host's plain patcher although dynamic VRAM is on. Raises ValueError with a sentence for
    the person who picked the file.
    """
    with errors_for_the_page():
        return _load_clip(request, disable_dynamic)


def load_patcher(request: TextEncoderRequest, disable_dynamic: bool = False) -> ModelPatcher:
    """The patcher alone: what the host asks for when it builds the same CLIP once more."""
    check_still_the_same(request.files)
    return load_clip(request, disable_dynamic).patcher


def _load_clip(request: TextEncoderRequest, disable_dynamic: bool) -> comfy.sd.CLIP:
    compat.check_host()
    encoders = _read(request.paths)
    clip_type = getattr(CLIPType, request.type.upper(), CLIPType.STABLE_DIFFUSION)
    # A prompt is encoded once for all steps: what `int8` would save is not worth its error.
    settings = LoadSettings(", ".join(map(os.path.basename, request.paths)), "exact")
    model_options = {"custom_operations": _operations(settings)}
    if request.device == "cpu":
        model_options["load_device"] = model_options["offload_device"] = torch.device("cpu")
    # Built where it is kept: the modules would else reserve room on the GPU for tables that never come in floats.
    model_options["initial_device"] = model_options.get(
        "offload_device", comfy.model_management.text_encoder_offload_device()
    )
    state_dicts = _OneByOne(encoders, settings)
    for encoder, state_dict in zip(encoders, state_dicts, strict=True):
        name_source(state_dict, encoder.path)
    kinds = [known_kind(*each, clip_type) for each in zip(encoders, state_dicts, strict=True)]
    if len(encoders) > 1:
        check_parts(encoders, kinds, clip_type, request.type)
    elif encoders[0].architecture == "qwen3vl" and clip_type not in _TEXT_ALONE:
        state_dicts[0] |= _vision_stand_ins(encoders[0], state_dicts[0])
    for kind, state_dict in zip(kinds, state_dicts, strict=True):
        if kind == TEModel.CLIP_L and clip_type != CLIPType.HIDREAM:
            # Most files lack the projection of the pooled features, and these types compute it without reading it.
            width = state_dict["text_model.encoder.layers.0.mlp.fc1.weight"].shape[1]
            state_dict.setdefault("text_projection.weight", torch.eye(width, dtype=torch.float16))
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            state_dicts,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=clip_type,
            model_options=model_options,
            disable_dynamic=disable_dynamic,
        )
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise misfit(state_dicts.reached, str(error).splitlines()[-1].strip()) from error
    for encoder, missing_keys in zip(encoders, state_dicts.missing_keys, strict=True):
        check_complete(encoder, missing_keys)
    _without_vision(clip, encoders)
    clip.patcher.cached_patcher_init = (load_patcher, (request,))
    adopt(clip.patcher, request.files)
    return clip


def host_state_dict(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """The weights as the host's detection and modules read them: quantized ones with their logical shapes."""
    return {
        key: layouts.to_host(weight, torch.float32) if isinstance(weight, GgmlWeight) else weight
        for key, weight in encoder.weights.items()
    }


class _OneByOne(list):
    """The state dicts of the text encoders, which tell whose turn it is: the host loads them one by one, under names
    that can be the same in two of them, and what goes wrong is told of the file that was reached.

    reached: that text encoder. missing_keys: of each, what the host found missing.
    """

    def __init__(self, encoders: list[TextEncoder], settings: LoadSettings):
        super().__init__(host_state_dict(encoder) for encoder in encoders)
        self.reached, self.missing_keys = encoders[0], [[] for _ in encoders]
        self._encoders, self._settings = encoders, settings

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        all_files = self._settings.file_name
        for index, state_dict in enumerate(super().__iter__()):
            self.reached = self._encoders[index]
            self._settings.file_name, self._settings.missing_keys = os.path.basename(self.reached.path), []
            yield state_dict
            self.missing_keys[index] = self._settings.missing_keys
        self._settings.file_name = all_files


def _operations(settings: LoadSettings) -> type:
    """The operations class of a load, in which layers that carry a marker of the host's are loaded by the host.

    Their inputs stay floats, as in the host's own text encoders.
    """
    ours = make_operations(settings)

    class Operations(ours):
        class Linear(ours.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                if f"{prefix}comfy_quant" not in state_dict or f"{prefix}weight" not in state_dict:
                    super()._load_from_state_dict(state_dict, prefix, *args)
                    return
                self._full_precision_mm = True
                super(LowbitLinear, self)._load_from_state_dict(state_dict, prefix, *args)

            def set_weight(self, weight, *args, **kwargs):
                of_host = isinstance(self.weight, QuantizedTensor) and layouts.from_host(self.weight) is None
                owner = super(LowbitLinear, self) if of_host else super()
                return owner.set_weight(weight, *args, **kwargs)

        class Embedding(ours.Embedding):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                owner = super(LowbitEmbedding, self) if f"{prefix}comfy_quant" in state_dict else super()
                owner._load_from_state_dict(state_dict, prefix, *args)

    return Operations


def _read(paths: tuple[str, ...]) -> list[TextEncoder]:
    """The text encoders of one CLIP: a GGUF file, or several files of which some may be safetensors."""
    if len(paths) == 1:
        return [read_text_encoder(paths[0], HostFile)]
    encoders = [_read_any(path) for path in paths]
    if all(encoder.architecture is None for encoder in encoders):
        raise CheckpointError(
            encoders[0].path,
            found="a safetensors file beside another one",
            expected="at least one text encoder in GGUF",
            todo="Pick a .gguf file, or load these with ComfyUI's Load CLIP (Dual) node.",
        )
    return encoders


def _read_any(path: str) -> TextEncoder:
    file = open_checkpoint(path, HostFile)
    if file.container == "gguf":
        return text_encoder_of(file)
    weights = {name: tensor.load() for name, tensor in file.tensors.items()}
    try:
        weights, _ = comfy.utils.convert_old_quants(weights, metadata=file.metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            file.path,
            found="quantization metadata that cannot be read",
            expected="what ComfyUI writes",
            todo=f"The file is damaged: {TAKE_ANOTHER}",
        ) from error
    return TextEncoder(file.path, None, weights)


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


def _without_vision(clip: comfy.sd.CLIP, encoders: list[TextEncoder]) -> None:
    """Drop the vision part, which a GGUF file of a language model does not hold, and refuse pictures by its name."""
    if any(key.startswith("visual.") for encoder in encoders for key in encoder.weights):
        return  # a safetensors file brought it
    language_models = [encoder for encoder in encoders if "model.embed_tokens.weight" in encoder.weights]
    file_name = ", ".join(os.path.basename(encoder.path) for encoder in language_models)

    def refuse(embed, device=None):
        raise ValueError(
            f"{file_name} holds the language model alone, so it cannot read pictures: encode text without an image, or "
            "load the safetensors version with ComfyUI's own node."
        )

    for module in list(clip.cond_stage_model.modules()):
        if isinstance(getattr(module, "visual", None), torch.nn.Module):
            module.visual = None
            module.preprocess_embed = refuse
