"""x[M, K] -> xq[M, K] int8, x_scale[M, 1] of rms_norm(x) * weight * scale: the input of a modulated block's linears.

The values themselves, which nothing but a LoRA reads, are stored only if asked for.
"""

import dataclasses

import torch

from ..dispatch import Op, custom_op
from ..quantize_per_token import check_quantizer

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class RmsNormScaleQuantizeCall:
    """One checked call: `x` float [M, K], `weight` float [K], `scale` float [S, K] or None with M a multiple of S (one
    row a sample), `smooth` float32 [K] or None, `rotation_group` 0 or a divisor of K, `keep_values` whether the values
    are a result beside their codes."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    eps: float
    smooth: torch.Tensor | None
    rotation_group: int
    keep_values: bool = False


def rms_norm_scale_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
    smooth: torch.Tensor | None = None,
    rotation_group: int = 0,
    keep_values: bool = False,
) -> tuple[torch.Tensor, ...]:
    """RMSNorm and modulation, quantized per token in the same pass; everything in float32 up to the codes.

    What is rounded before a rotation, if x is bf16, is x * weight * scale, before the division by the token's rms.

    x: float [..., L, K]. weight: float [K]. scale: float, multiplies the normalized tokens: [..., 1, K], one row a
    sample, or None. eps: added to the mean square. smooth, rotation_group: as in `quantize_per_token`. keep_values:
    store rms_norm(x) * weight * scale too, rounded once to x's dtype, neither smoothed nor rotated. Returns xq int8
    [..., L, K] and x_scale float32 [..., L, 1], and with keep_values those values [..., L, K].

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    K = x.shape[-1]
    check_quantizer("rms_norm_scale_quantize", x, smooth, rotation_group)
    if tuple(weight.shape) != (K,):
        raise ValueError(f"rms_norm_scale_quantize: weight must have shape ({K},), got {tuple(weight.shape)}")
    rows = sample_rows("rms_norm_scale_quantize", "scale", x, scale)
    xq, x_scale, values = torch.ops.lowbit.rms_norm_scale_quantize(
        x.reshape(-1, K), weight, rows, eps, smooth, rotation_group, keep_values
    )
    codes = xq.reshape(x.shape), x_scale.reshape(*x.shape[:-1], 1)
    return (*codes, values.reshape(x.shape)) if keep_values else codes


def sample_rows(op: str, name: str, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
    """A factor [..., 1, K] of tokens x [..., L, K] as rows [S, K]. Raises ValueError for any other shape."""
    if rows is None:
        return None
    if tuple(rows.shape) != (*x.shape[:-2], 1, x.shape[-1]):
        expected = (*x.shape[:-2], 1, x.shape[-1])
        raise ValueError(f"{op}: {name} must have shape {expected}, one row a sample, got {tuple(rows.shape)}")
    return rows.reshape(-1, x.shape[-1])


@custom_op("rms_norm_scale_quantize")
def _rms_norm_scale_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
    smooth: torch.Tensor | None,
    rotation_group: int,
    keep_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return OP.run(RmsNormScaleQuantizeCall(x, weight, scale, eps, smooth, rotation_group, keep_values))


@_rms_norm_scale_quantize.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
    smooth: torch.Tensor | None,
    rotation_group: int,
    keep_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
        x.new_empty(x.shape if keep_values else (0,)),
    )
