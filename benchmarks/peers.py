"""Other projects' kernels, called as leanly as they allow, and the reason where one cannot run here.

comfy-kitchen's backends are asked for by name. Its `use_backend` goes to another backend without a word when the named
one refuses a call; its registry raises.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping

import torch

from .timing import Variant

ROTATION_GROUP = 256


class PeerMissingError(RuntimeError):
    """A peer that cannot run here; the text says why."""


def available(makers: Mapping[str, Callable[[], list]]) -> list[Variant]:
    """The variants whose calls can be made; one whose peer is missing is left out, with a line that says why."""
    variants = []
    for name, make_calls in makers.items():
        try:
            variants.append(Variant(name, make_calls()))
        except PeerMissingError as reason:
            print(f"left out: {name}: {reason}")
    return variants


def comfy_kitchen_version() -> str:
    try:
        return importlib.metadata.version("comfy-kitchen")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def comfy_kitchen(backend: str, function: str, **arguments) -> Callable[..., torch.Tensor]:
    """A backend's own implementation of a function, if it accepts these arguments. Raises PeerMissingError."""
    try:
        from comfy_kitchen.exceptions import BackendError
        from comfy_kitchen.registry import registry
    except ImportError as error:
        raise PeerMissingError(f"comfy-kitchen cannot be imported: {error}") from error
    try:
        return registry.get_implementation(function, backend=backend, kwargs=arguments)
    except BackendError as error:
        raise PeerMissingError(f"comfy-kitchen: {error}") from error


def comfy_kitchen_weight(w: torch.Tensor, convrot: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """w[N, K] by comfy-kitchen's own quantizer: int8 [N, K] and float32 per-channel scales [N, 1]."""
    try:
        from comfy_kitchen.tensor import TensorWiseINT8Layout
    except ImportError as error:
        raise PeerMissingError(f"comfy-kitchen cannot be imported: {error}") from error
    data, params = TensorWiseINT8Layout.quantize(w, per_channel=True, convrot=convrot, convrot_groupsize=ROTATION_GROUP)
    return data, params.scale


def comfy_kitchen_linear(
    backend: str,
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    convrot: bool = False,
    input_act: str | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of x[M, K] and int8 data[N, K]: comfy-kitchen's INT8 linear layer, bf16 in and out.

    input_act: `swiglu` for x[M, 2K] of gate and up side by side, which ConvRot's quantizer absorbs.
    """
    options = {
        "bias": bias,
        "out_dtype": x.dtype,
        "convrot": convrot,
        "convrot_groupsize": ROTATION_GROUP,
        "input_act": input_act,
    }
    linear = comfy_kitchen(backend, "int8_linear", x=x, weight=data, weight_scale=scale, **options)
    return lambda x, data: linear(x, data, scale, **options)


def comfy_kitchen_quantizer(backend: str, x: torch.Tensor) -> Callable[[torch.Tensor], tuple]:
    """comfy-kitchen's per-token quantizer of x[M, K]."""
    return comfy_kitchen(backend, "quantize_int8_rowwise", x=x, stochastic_rounding=0)


def comfy_kitchen_convrot_quantizer(x: torch.Tensor, input_act: str | None = None) -> Callable[[torch.Tensor], tuple]:
    """The CUDA backend's fused ConvRot quantizer, the one inside its linear layer.

    input_act: `swiglu` for x[M, 2K] of gate and up side by side.
    """
    comfy_kitchen("cuda", "quantize_int8_rowwise", x=x, stochastic_rounding=0)  # raises where the backend cannot run
    from comfy_kitchen.backends.cuda import quantize_int8_rowwise_convrot64

    return lambda x: quantize_int8_rowwise_convrot64(x, ROTATION_GROUP, input_act=input_act)
