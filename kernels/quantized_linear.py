"""A linear layer on a quantized weight, in either compute mode, composed of the ops of this folder.

`exact` is what the file means: the weight in x's dtype, then the library's product. `int8` quantizes the activations
per token and uses the INT8 product. Which calls INT8 pays for:

| call | computed as | why |
| --- | --- | --- |
| at most 16 tokens, INT8 weight | int8 codes times float activations, in both modes | bound by reading weights |
| the same, smoothed or rotated, of fp16 | `exact` | fp16 may not hold what is smoothed or rotated |
| at most 16 tokens, GGML weight | `exact`, blocks decoded within the product | the same |
| 17 tokens and more | the mode asked for | INT8 units have at least twice the rate of bf16 |
| `auto`, INT8 weight | `int8` with the Triton kernels, else `exact` | else quantizing costs more than it saves |
| `auto`, INT8 weight that prefers it | `exact` | its publisher found the layer sensitive |
| `auto`, GGML weight of less than 6 bits | `int8` with the Triton kernels, else `exact` | the same |
| `auto`, GGML weight of more bits (Q6_K, Q8_0) | `exact` | quantized activations would cost more than these lose |

The rows of a GGML weight are rotated on their way to INT8 where K allows it, and the activations with them: outlier
channels would cost several times the error otherwise.
"""

from __future__ import annotations

import torch

from ..formats import GgmlWeight, Int8Weight, QuantizedWeight, ggml
from ..formats.int8 import rotate
from . import weight_only_int8_linear as weight_only
from .capability import triton_refusal
from .ggml_int8_linear import ggml_int8_linear
from .ggml_linear import ggml_linear
from .int8_linear import OP as INT8_LINEAR
from .int8_linear import int8_linear
from .quantize_per_token import quantize_per_token
from .unpack import unpack
from .unpack_int8 import unpack_int8
from .unpack_to_int8 import find_row_scale

LowRank = tuple[torch.Tensor, torch.Tensor]  # hidden [..., R] and up [N, R]

MODES = ("exact", "int8")
SMALL_M = weight_only.LARGEST_M
SMALLEST_EXACT_BITS = 6
ROTATION_GROUP = 256


def fastest_mode(weight: QuantizedWeight, device: torch.device) -> str:
    """The compute mode that `auto` stands for: see the table above."""
    return "int8" if is_coarse(weight) and has_fused_kernels(device) else "exact"


def is_coarse(weight: QuantizedWeight) -> bool:
    """Whether quantized activations cost little beside what the weight's own format does."""
    if isinstance(weight, GgmlWeight):
        return ggml.TYPES[weight.ggml_type].bits_per_weight < SMALLEST_EXACT_BITS
    return isinstance(weight, Int8Weight) and not weight.prefers_exact


def row_rotation_group(weight: GgmlWeight) -> int:
    """The Hadamard group by which the rows of a GGML weight are rotated on their way to INT8; 0 for none."""
    return 0 if weight.shape[-1] % ROTATION_GROUP else ROTATION_GROUP


def has_fused_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device."""
    return INT8_LINEAR.import_error("triton_impl") is None and triton_refusal(device) is None


def wants_int8(x: torch.Tensor, mode: str) -> bool:
    """Whether a call with activations x [..., K] is computed by the INT8 product in this mode: not one whose gradients
    are asked for, which quantized activations have none of. Raises ValueError for a mode that is none."""
    if mode not in MODES:
        raise ValueError(f"compute mode {mode!r}: expected {' or '.join(MODES)}; see `fastest_mode` for `auto`")
    return mode == "int8" and x.numel() // x.shape[-1] > SMALL_M and not _needs_gradients(x)


def int8_weight_linear(
    x: torch.Tensor,
    weight: Int8Weight,
    bias: torch.Tensor | None,
    mode: str,
    tune: bool = True,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias for an INT8 weight; mode is `exact` or `int8`. Returns x's dtype.

    tune: whether the product may measure its configurations at the first call of a shape. low_rank: hidden [..., R] and
    up [N, R] in x's dtype of a term hidden @ up.T to be added, or None.
    """
    if wants_int8(x, mode):
        xq, x_scale = quantize_per_token(x, weight.smooth, weight.rotation_group)
        return int8_linear(xq, x_scale, weight.data, weight.scale, bias, x.dtype, tune, low_rank)
    overflows = x.dtype == torch.float16 and (weight.smooth is not None or weight.rotation_group != 0)
    if x.numel() <= SMALL_M * x.shape[-1] and not _needs_gradients(x) and not overflows:
        if weight.smooth is not None:
            x = (x.float() * weight.smooth).to(x.dtype)
        if weight.rotation_group:
            x = rotate(x.float(), weight.rotation_group).to(x.dtype)
        return add_low_rank(weight_only.weight_only_int8_linear(x, weight.data, weight.scale, bias), low_rank)
    return add_low_rank(_linear(x, unpack_int8(weight, x.dtype), bias), low_rank)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The library's product with a bias of any dtype, in x's dtype under autocast as well."""
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(x.dtype)


def _needs_gradients(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def ggml_weight_linear(
    x: torch.Tensor,
    weight: GgmlWeight,
    bias: torch.Tensor | None,
    mode: str,
    row_scale: torch.Tensor | None = None,
    tune: bool = True,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """y[..., N] = x[..., K] @ w[N, K].T + bias for a GGML weight; mode is `exact` or `int8`. Returns x's dtype.

    row_scale: float32 [N, 1] that `find_row_scale` gave for this weight, rotated by `row_rotation_group`, or None to
    find it in this call. tune, low_rank: as in `int8_weight_linear`.
    """
    if wants_int8(x, mode):
        xq, x_scale = quantize_per_token(x, None, row_rotation_group(weight))
        return ggml_weight_linear_of_codes(xq, x_scale, weight, bias, x.dtype, row_scale, tune, low_rank)
    if _needs_gradients(x):
        y = _linear(x, unpack(weight.data, weight.ggml_type, x.dtype), bias)
    else:
        y = ggml_linear(x, weight.data, weight.ggml_type, bias)
    return add_low_rank(y, low_rank)


def ggml_weight_linear_of_codes(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: GgmlWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
    tune: bool = True,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """`ggml_weight_linear` in mode `int8` for xq int8 [..., K] and x_scale float32 [..., 1], quantized per token and
    rotated by `row_rotation_group`. Returns out_dtype."""
    group = row_rotation_group(weight)
    if row_scale is None:
        row_scale = find_row_scale(weight.data, weight.ggml_type, group)
    return ggml_int8_linear(
        xq, x_scale, weight.data, weight.ggml_type, row_scale, group, bias, out_dtype, tune, low_rank
    )


def add_low_rank(y: torch.Tensor, low_rank: LowRank | None) -> torch.Tensor:
    """y[..., N] with hidden[..., R] @ up[N, R].T added in place, if there is such a term."""
    if low_rank is not None:
        hidden, up = low_rank
        y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t())
    return y
