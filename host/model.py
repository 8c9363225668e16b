"""A checkpoint file -> the host's MODEL: read by our loaders, detected and built by the host."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..formats import QuantizedWeight
from ..loaders.branch import Branch, load_branch, open_branches
from ..loaders.branches import CONDITIONAL, UNCONDITIONAL, branch_of_name
from ..loaders.errors import CheckpointError, counted
from ..loaders.file_state import FileState, file_states
from ..loaders.ideogram4 import TEXT_ONLY_MODULES
from ..loaders.policy import layers_meant, linears_worth_quantizing, quantizes
from . import compat, conditioning, fused_block, layouts, parallel_branches
from .embedding import LowbitEmbedding
from .files import HostFile, check_still_the_same, errors_for_the_page, name_source
from .ops import LoadSettings, LowbitLinear, make_operations
from .patcher import adopt
from .read_ahead import ReadAhead

logger = logging.getLogger(__name__)

SAME_FILE, NONE = "same file", "none"
COMPUTE_MODES = ("auto", "int8", "exact")
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """Everything that decides how one branch is loaded; equal requests load equal models.

    path: the checkpoint. base_path: what supplies what an incomplete layout lacks. compute_mode: one of COMPUTE_MODES.
    dtype: a key of DTYPES, of activations and unquantized weights. quantize: whether float and FP8 linears become INT8.
    protected: entries for `loaders.policy.layers_meant`, of layers that are never quantized on the fly. tune: whether
    kernels may measure their configurations at first use. files: the two as they are when this is made; a file that
    changes is another request.
    """

    path: str
    branch: str = CONDITIONAL
    base_path: str | None = None
    compute_mode: str = "auto"
    dtype: str = "default"
    quantize: bool = False
    protected: tuple[str, ...] = ()
    tune: bool = True
    files: tuple[FileState, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "files", file_states(self.path, self.base_path))


def load_pair(request: LoadRequest, unconditional: str, unconditional_base_path: str | None = None):
    """The models of the conditional and the unconditional branch.

    unconditional: `same file`, `none` (the same model for both, for ordinary CFG) or the path of another file.
    Raises ValueError and RuntimeError with a sentence for the person who picked the files.
    """
    with errors_for_the_page():
        return _load_pair(request, unconditional, unconditional_base_path)


def _load_pair(request: LoadRequest, unconditional: str, unconditional_base_path: str | None):
    negative_request = dataclasses.replace(
        request,
        path=request.path if unconditional in (SAME_FILE, NONE) else unconditional,
        branch=UNCONDITIONAL,
        base_path=unconditional_base_path,
    )
    ahead = ReadAhead(request.path, *(() if unconditional in (SAME_FILE, NONE) else (unconditional,))).start()
    open_file = functools.partial(HostFile, on_read=ahead.leave_out)
    checkpoint = open_branches(request.path, open_file)
    negative_checkpoint = None
    if unconditional == SAME_FILE:
        if checkpoint.unconditional_source():
            negative_checkpoint = checkpoint
    elif unconditional != NONE:
        _warn_about_names(request.path, unconditional)
        negative_checkpoint = open_branches(unconditional, open_file)
    branch = checkpoint.load(request.branch, request.base_path)
    if negative_checkpoint is None:
        if unconditional_base_path is not None:
            name = os.path.basename(request.path)
            logger.warning("Lowbit: %s is one model for both: base_checkpoint_unconditional is ignored.", name)
        model = _build(request, branch)
        return model, model
    # Whatever the negative branch lacks is noticed before the first model is built.
    negative_branch = negative_checkpoint.load(UNCONDITIONAL, unconditional_base_path)
    return _build(request, branch), _build(negative_request, negative_branch)


def load_model(request: LoadRequest, disable_dynamic: bool = False) -> ModelPatcher:
    """Load one branch as the host's MODEL.

    disable_dynamic: take the host's plain patcher although dynamic VRAM is on, as the host asks for when it makes a
    delegate for hooks. Raises CheckpointError and RuntimeError naming the file.
    """
    check_still_the_same(request.files)
    return _build(request, load_branch(request.path, request.branch, request.base_path, HostFile), disable_dynamic)


def _build(request: LoadRequest, branch: Branch, disable_dynamic: bool = False) -> ModelPatcher:
    compat.check_host()
    compat.allow_saving_offloaded_integers()
    settings = LoadSettings(os.path.basename(request.path), request.compute_mode, request.tune)
    is_quantized, bar = bool(branch.quantized_formats()), None
    if request.quantize and not is_quantized:
        names = linears_worth_quantizing(branch.weights)
        for entry in request.protected if names else ():
            layers_meant("protected_layers", entry, names, branch.path)
        settings.quantize_layer = functools.partial(quantizes, protected=request.protected)
        bar = settings.before_quantizing = _QuantizingBar(
            len(linears_worth_quantizing(branch.weights, request.protected))
        )
    elif request.protected:
        name = os.path.basename(request.path)
        logger.warning("Lowbit: %s is quantized already: protected_layers is ignored.", name)
    model_options = {"custom_operations": make_operations(settings)}
    dtype = DTYPES[request.dtype]
    if dtype is not None:
        model_options["dtype"] = dtype
    metadata = {key: value for key, value in branch.metadata.items() if isinstance(value, str)}
    state_dict = host_state_dict(branch, dtype or torch.bfloat16)
    if bar is None:  # what is quantized now lies in memory
        name_source(state_dict, branch.path)
    if is_quantized and is_diffusers(state_dict):
        raise _diffusers_names(branch)
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options, metadata, disable_dynamic)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise _misfit(branch, error) from error
    if patcher is None:
        raise _unknown_model(branch)
    layouts.unpack_in_other_modules(patcher.model, (LowbitLinear, LowbitEmbedding))
    _check_complete(branch, settings)
    if bar is not None:
        bar.finish()
    _log(branch, patcher, quantized_now=bar is not None)
    patcher.cached_patcher_init = (load_model, (request,))
    fused_block.fuse_blocks(adopt(patcher, request.files))
    conditioning.keep_on_device(patcher)
    parallel_branches.run_in_parallel(patcher)
    return patcher


def _log(branch: Branch, patcher: ModelPatcher, quantized_now: bool) -> None:
    memory = "dynamic VRAM is off: ComfyUI moves the model to its device before the first step, as a whole or in part"
    if patcher.is_dynamic():
        source = "memory, where they were quantized" if quantized_now else "the file"
        memory = f"dynamic VRAM is on: weights come from {source}, and stay on the GPU as far as there is room"
    size = f"{patcher.model_size() / 2**30:.2f} GiB"
    logger.info("Lowbit: %s (%s): %s of weights; %s.", os.path.basename(branch.path), branch.name, size, memory)


class _QuantizingBar:
    """Called before each layer that is quantized while loading: shows how far it is, and lets the user cancel."""

    def __init__(self, total: int):
        self._total, self._bar = total, comfy.utils.ProgressBar(total)

    def __call__(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(1)

    def finish(self) -> None:
        """The host joins some layers of diffusers' files: there are fewer to quantize than names."""
        self._bar.update_absolute(self._total)


def host_state_dict(branch: Branch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The branch as the host's detection and modules read it: quantized linear weights with their logical shapes.

    Only a two-dimensional `weight` can belong to a product; everything else that is quantized is unpacked here. Where
    such a `weight` belongs to none, it is unpacked as it is loaded, or by `layouts.unpack_in_other_modules`.
    """
    state_dict = {}
    for key, weight in branch.weights.items():
        if not isinstance(weight, QuantizedWeight):
            state_dict[key] = weight
        elif len(weight.shape) == 2 and key.endswith("weight"):
            state_dict[key] = layouts.to_host(weight, dtype, layouts.LoadingTensor)
        else:
            state_dict[key] = weight.dequantize(dtype)
    return state_dict


def is_diffusers(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the host would rename and join these tensors, which it cannot do with quantized ones."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    if comfy.model_detection.detect_unet_config(tensors, "") is not None:
        return False
    shapes = {key: torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for key, t in tensors.items()}
    return comfy.model_detection.convert_diffusers_mmdit(shapes, "") is not None


def _diffusers_names(branch: Branch) -> CheckpointError:
    return CheckpointError(
        branch.path,
        found=f"quantized weights under the names of the diffusers library, such as {next(iter(branch.weights))}",
        expected="the names of the model's original release",
        todo="ComfyUI renames and joins such weights while loading, which is not possible once they are quantized. "
        "Pick a file made for ComfyUI, or load the unquantized diffusers file with the INT8 loader, which quantizes "
        "it.",
    )


def _misfit(branch: Branch, error: RuntimeError) -> CheckpointError:
    mismatches = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
    return CheckpointError(
        branch.path,
        found=f"shapes that do not fit the model in {counted(len(mismatches), 'tensor')} ({mismatches[0]})",
        expected="the shapes of the model that its names say it is",
        todo="The file belongs to a variant that this ComfyUI does not know, or is damaged: update ComfyUI, or pick "
        "another file.",
    )


def _check_complete(branch: Branch, settings: LoadSettings) -> None:
    """Refuse a half-loaded model: the host only logs what a file did not supply."""
    missing = [key for key in settings.missing_keys if key.endswith(("weight", "bias"))]
    if branch.name == UNCONDITIONAL:
        missing = [key for key in missing if not key.startswith(TEXT_ONLY_MODULES)]
    if missing:
        raise CheckpointError(
            branch.path,
            found=f"that {counted(len(missing), 'tensor')} of the model are missing, such as {missing[0]}",
            expected="every weight of the model",
            todo="The file is incomplete or of another version of the model; download it again or pick another one.",
        )


def _unknown_model(branch: Branch) -> CheckpointError:
    names = ", ".join(list(branch.weights)[:3])
    if any(re.search(r"\.lora_(A|B|up|down)(\.|$)", key) for key in branch.weights):
        return CheckpointError(
            branch.path,
            found="a LoRA",
            expected="a diffusion model",
            todo="Move it to models/loras and put a Load LoRA node behind the loader.",
        )
    return CheckpointError(
        branch.path,
        found=f"{counted(len(branch.weights), 'tensor')} ({names}, …) of no diffusion model that this ComfyUI knows",
        expected="a diffusion model",
        todo="If it is a text encoder or a VAE, move it to its folder and use its loader; if the model is new, update "
        "ComfyUI.",
    )


def _warn_about_names(path: str, unconditional: str) -> None:
    if os.path.realpath(path) == os.path.realpath(unconditional) and branch_of_name(path) is not None:
        name = os.path.basename(path)
        logger.warning("Lowbit: %s is picked for both branches, but by its name holds one of them.", name)
    elif branch_of_name(path) == UNCONDITIONAL or branch_of_name(unconditional) == CONDITIONAL:
        names = os.path.basename(path), os.path.basename(unconditional)
        logger.warning("Lowbit: going by their names, %s and %s are the wrong way round: conditional first.", *names)
