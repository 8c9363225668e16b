"""torch.compile of a MODEL: a call computes with the weights of the model called, whatever other models a guider has.

The host's own node sets a wrapper that travels with the conditioning, so a guider with two models runs the first one's
compiled weights for both. Here the compiled call is an object patch of the very module that it runs, on a hook that
`torch.nn.Module` has for this: `_compiled_call_impl` stands in for `__call__`. So a `forward` that another patch
replaced is compiled as it is found, and the compilation goes with the patcher: its clones have it, its source has not.

Transformer blocks are compiled one by one. All blocks of a class share their compiled code, so the first step waits for
one block, not for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.model_prefetch
import comfy.ops
import torch
import torch._dynamo
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY as STOCK_KEY
from torch.utils._pytree import tree_iter

from .ops import LowbitLinear

logger = logging.getLogger(__name__)

BACKENDS = ("inductor", "cudagraphs")

_KEY = "lowbit_compile"
_HOOK = "_compiled_call_impl"
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)

# How many variants of one block torch compiles before it leaves the block alone; its own limit is 8. Two branches, each
# with and without a LoRA, for two strengths of it and two sizes, make nine, and each mix of formats makes its own.
_MOST_VARIANTS = 64


def compile_model(model: ModelPatcher, backend: str | Callable) -> ModelPatcher:
    """A clone of the model that is compiled at first use: its transformer blocks, or all of it where it repeats none.

    backend: one of BACKENDS, or what else `torch.compile` takes. Raises ValueError where a patch would be lost.
    """
    names = _blocks_to_compile(model, backend)
    if not names and model.is_dynamic() and model.injections:
        # They are made for the modules of this model, and the clone gets modules of its own.
        raise ValueError(
            f"Compile Model: {', '.join(map(repr, model.injections))} stands before it and would be lost, because this "
            "model is compiled as a whole. Put that node, such as a bypass LoRA's, behind Compile Model (Lowbit)."
        )
    # A block's weights are brought to the device before it runs; a whole model's may have no room there together.
    compiled = model.clone(disable_dynamic=not names)
    compiled.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, STOCK_KEY)
    compiled.remove_callbacks_with_key(CallbacksMP.ON_CLONE, _KEY)
    compiled.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, functools.partial(_follow, backend=backend))
    _patch(compiled, backend)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    logger.info("Lowbit: torch.compile will compile %s", f"{len(names)} blocks" if names else "the model as a whole")
    return compiled


def _blocks_to_compile(patcher: ModelPatcher, backend: str | Callable) -> list[str]:
    """The names of the blocks; none to compile the model as a whole."""
    # The recording of one block would overwrite what that of the block before it gave.
    return [] if backend == "cudagraphs" else repeated_blocks(patcher.model.diffusion_model)


def repeated_blocks(model: torch.nn.Module) -> list[str]:
    """The names of the alike modules in a model's lists; none when they hold less than half of its weights."""
    names = list(_alike_in_lists(model, ""))
    size = sum(_size(model.get_submodule(name)) for name in names)
    return names if 2 * size >= _size(model) else []


def _alike_in_lists(module: torch.nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        blocks = dict(child.named_children()) if isinstance(child, _LISTS) else {}
        if len(blocks) > 1 and len({_structure(block) for block in blocks.values()}) == 1:
            yield from (f"{prefix}{name}.{block}" for block in blocks)
        else:
            yield from _alike_in_lists(child, f"{prefix}{name}.")


def _structure(block: torch.nn.Module) -> tuple:
    return type(block), *((name, parameter.shape) for name, parameter in block.named_parameters())


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _patch(patcher: ModelPatcher, backend: str | Callable) -> None:
    """Make the calls of the patcher's own modules compiled ones."""
    for key in [key for key in patcher.object_patches if key.endswith(_HOOK)]:
        del patcher.object_patches[key]
    names = _blocks_to_compile(patcher, backend)
    for path in [f"diffusion_model.{name}" for name in names] or ["diffusion_model"]:
        patcher.add_object_patch(f"{path}.{_HOOK}", _CompiledCall(patcher.model.get_submodule(path), backend))


def _follow(source: ModelPatcher, clone: ModelPatcher, backend: str | Callable) -> None:
    """A clone with modules of its own, as the host makes for hooks and for further GPUs, must not run the source's."""
    if clone.model is not source.model:
        _patch(clone, backend)


class _CompiledCall:
    """What a call of the module becomes."""

    def __init__(self, module: torch.nn.Module, backend: str | Callable):
        self.module = module
        self.compiled = torch.compile(module._call_impl, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        comfy.ops.run_every_op()  # stops here when the prompt is cancelled: compiled layers do not look
        leaves = tree_iter((args, kwargs))
        like = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)
        if like is None:
            return self.module._call_impl(*args, **kwargs)
        _move_loras(self.module, like)
        with _weights_on_device(self.module, like.device):
            return self.compiled(*args, **kwargs)


def _move_loras(module: torch.nn.Module, like: torch.Tensor) -> None:
    """Have LoRA matrices moved now, which their first use does: compiled, that would be one more variant."""
    for part in module.modules():
        if isinstance(part, LowbitLinear):
            for side_path in (*part.model_patches, *part.hook_patches):
                side_path.move(like.device, like.dtype)


@contextlib.contextmanager
def _weights_on_device(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Let the weights that dynamic VRAM manages look like ordinary ones that lie on the device.

    The host brings each weight there when its layer runs, by code that cannot be traced. So they are all brought before
    the compiled code runs, by what the host itself fetches a block of some models with.
    """
    managed = [part for part in module.modules() if hasattr(part, "_v")]
    if not managed or comfy.model_management.is_device_cpu(device):
        yield
        return
    fetched = any(hasattr(part, "_prefetch") for part in managed)  # by the model, which then lets them go
    queue = None if fetched else [None, module, None]
    try:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, module)
    except BaseException:  # out of memory, or cancelled: nobody else lets go of what has been fetched
        cleanup = comfy.model_prefetch.cleanup_prefetched_modules
        takes_block = len(inspect.signature(cleanup).parameters) > 1  # from ComfyUI 0.34 on
        cleanup(*((module,) if takes_block else ()), managed)
        raise
    try:
        with contextlib.ExitStack() as stack:
            for part in managed:
                stack.enter_context(_as_ordinary(part, device))
            yield
    finally:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)


@contextlib.contextmanager
def _as_ordinary(part: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Give a module that dynamic VRAM manages the weights that it has on the device, patches applied."""
    weight, bias, _ = comfy.ops.cast_bias_weight(
        part,
        dtype=_stored_dtype(part.weight),
        device=device,
        bias_dtype=_stored_dtype(part.bias),
        offloadable=True,
        want_requant=isinstance(part.weight, QuantizedTensor),
    )
    # Written to the dictionaries themselves: set as an attribute, a weight would count as a new one.
    parameters, attributes = dict(part._parameters), dict(part.__dict__)
    part._parameters.update({name: value for name, value in (("weight", weight), ("bias", bias)) if name in parameters})
    part.__dict__.update(weight_function=[], bias_function=[])
    del part.__dict__["_v"]
    try:
        yield
    finally:
        part._parameters.update(parameters)
        for name in ("_v", "weight_function", "bias_function"):
            part.__dict__.pop(name, None)
            if name in attributes:
                part.__dict__[name] = attributes[name]


def _stored_dtype(parameter: torch.Tensor | None) -> torch.dtype | None:
    """What dynamic VRAM keeps a parameter in on the device."""
    return None if parameter is None else getattr(parameter, "_model_dtype", parameter.dtype)
