"""torch.compile of a MODEL: the weights that a call computes with are always those of the model that is called.

The host's own node sets a wrapper that travels with the conditioning, so a guider with two models runs the first one's
compiled weights for both. Here the compiled call is an object patch of the very modules that it runs, on a hook that
`torch.nn.Module` has for this: `_compiled_call_impl`, which stands in for `__call__`. A `forward` that another patch
replaced is compiled as it is, and the patch goes with its patcher: clones of it are compiled, its source is not.

Transformer blocks are compiled one by one. They share their code, so the first step waits for one block, not for all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor

logger = logging.getLogger(__name__)

BACKENDS = ("inductor", "cudagraphs")

_KEY = "lowbit_compile"
_HOOK = "_compiled_call_impl"
_ROOT = "diffusion_model"
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)

# Variants of one block's code that torch keeps; beyond, it stops compiling it without an error. The default of 8 is
# used up by two branches, two lengths of prompt, a LoRA and a file that mixes a few formats.
_MOST_VARIANTS = 64


def compile_model(model: ModelPatcher, backend: str) -> ModelPatcher:
    """A clone of the model that compiles its transformer blocks at first use, or all of it where it has none.

    backend: one of BACKENDS, or any other name that torch.compile knows. Raises ValueError for an unknown one.
    """
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(f"torch.compile has no backend {backend!r} here; it has {', '.join(BACKENDS)}.")
    names = repeated_blocks(model.model.diffusion_model)
    # Without blocks the compiler meets the weights' transfer, and code that dynamic VRAM runs cannot be traced.
    compiled = model.clone() if names else model.clone(disable_dynamic=True)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    compiled.remove_callbacks_with_key(CallbacksMP.ON_CLONE, _KEY)
    compiled.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, functools.partial(_follow, backend=backend))
    _patch(compiled, backend)
    logger.info("Lowbit: torch.compile with %s: %s", backend, f"{len(names)} blocks" if names else "the whole model")
    return compiled


def repeated_blocks(model: torch.nn.Module) -> list[str]:
    """The names of the blocks that a model repeats, outermost lists first found; empty when they are not most of it."""
    names = list(_blocks(model, ""))
    size = sum(_size(model.get_submodule(name)) for name in names)
    return names if 2 * size > _size(model) else []


def _blocks(module: torch.nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        blocks = list(child.children()) if isinstance(child, _LISTS) else []
        if len(blocks) > 1 and len({_structure(block) for block in blocks}) == 1:
            yield from (f"{prefix}{name}.{block}" for block, _ in child.named_children())
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _structure(block: torch.nn.Module) -> tuple:
    return type(block), tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _patch(patcher: ModelPatcher, backend: str) -> None:
    """Let the patcher's own modules be called compiled."""
    for key in [key for key in patcher.object_patches if key.endswith(f".{_HOOK}")]:
        del patcher.object_patches[key]
    diffusion_model = patcher.model.diffusion_model
    for name in repeated_blocks(diffusion_model) or [""]:
        path = f"{_ROOT}.{name}".rstrip(".")
        patcher.add_object_patch(f"{path}.{_HOOK}", CompiledCall(diffusion_model.get_submodule(name), backend))


def _follow(source: ModelPatcher, clone: ModelPatcher, backend: str) -> None:
    """A clone on modules of its own, as the host makes for hooks and further GPUs, must not run the source's."""
    if clone.model is not source.model:
        _patch(clone, backend)


class CompiledCall:
    """Calls a module compiled."""

    def __init__(self, module: torch.nn.Module, backend: str):
        self.module = module
        self.compiled = torch.compile(module._call_impl, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _weights_on_device(self.module, _device(args, kwargs)):
            return self.compiled(*args, **kwargs)


def _device(args: tuple, kwargs: dict) -> torch.device:
    return next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
