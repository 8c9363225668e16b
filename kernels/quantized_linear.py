"""A linear layer on a quantized weight, in either compute mode, composed of the ops of this folder.

`exact` is what the file means: the weight in x's dtype, then the library's product. `int8` quantizes the activations
per token and uses the INT8 product. A call of few tokens is bound by reading the weight, so it never quantizes its
activations.
"""

from __future__ import annotations

import torch

from ..formats import GgmlWeight, Int8Weight
from .int8_linear import int8_linear
from .quantize_per_token import quantize_per_token
from .unpack import unpack
from .unpack_int8 import unpack_int8
from .unpack_to_int8 import unpack_to_int8

SMALL_M = 16


def wants_int8(x: torch.Tensor, mode: str) -> bool:
    """Whether a call with activations x [..., K] is computed by the INT8 product in this mode."""
    return mode == "int8" and x.numel() // x.shape[-1] > SMALL_M


def int8_weight_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias for an INT8 weight; mode is `exact` or `int8`. Returns x's dtype."""
    if not wants_int8(x, mode):
        return torch.nn.functional.linear(x, unpack_int8(weight, x.dtype), bias)
    xq, x_scale = quantize_per_token(x, weight.smooth, weight.rotation_group)
    return int8_linear(xq, x_scale, weight.data, weight.scale, bias, x.dtype)


def ggml_weight_linear(
    x: torch.Tensor, weight: GgmlWeight, bias: torch.Tensor | None, mode: str, row_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias for a GGML weight; mode is `exact` or `int8`. Returns x's dtype.

    row_scale: float32 [N, 1] that `unpack_to_int8` found for this weight before, or None to find it in this call.
    """
    if not wants_int8(x, mode):
        return torch.nn.functional.linear(x, unpack(weight.data, weight.ggml_type, x.dtype), bias)
    wq, row_scale = unpack_to_int8(weight.data, weight.ggml_type, row_scale)
    xq, x_scale = quantize_per_token(x)
    return int8_linear(xq, x_scale, wq, row_scale, bias, x.dtype)
