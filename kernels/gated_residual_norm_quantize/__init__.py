"""x = residual + gate * rms_norm(y), and the codes of rms_norm(x) * scale: from one linear to the next in one pass."""

import dataclasses

import torch

from ..dispatch import Op, custom_op
from ..gated_residual import check_gated_residual
from ..quantize_per_token import check_quantizer
from ..rms_norm_scale_quantize import sample_rows

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class GatedResidualNormQuantizeCall:
    """One checked call: `residual` and `y` float [M, K] of one dtype, `y_weight` and `weight` float [K], `gate` and
    `scale` float [S, K] with M a multiple of S, `smooth` float32 [K] or None, `rotation_group` 0 or a divisor of K,
    `keep_values` whether the values of the codes are a result too."""

    residual: torch.Tensor
    y: torch.Tensor
    y_weight: torch.Tensor
    gate: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    eps: float
    smooth: torch.Tensor | None
    rotation_group: int
    keep_values: bool = False


def gated_residual_norm_quantize(
    residual: torch.Tensor,
    y: torch.Tensor,
    y_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    smooth: torch.Tensor | None = None,
    rotation_group: int = 0,
    keep_values: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`gated_residual` followed by `rms_norm_scale_quantize`, without reading x back.

    residual, y: float [..., L, K] of one dtype. y_weight, weight: float [K], of the norms of y and of the sum. gate,
    scale: float [..., 1, K], one row a sample. eps: of both norms. smooth, rotation_group: as in `quantize_per_token`.
    keep_values: store rms_norm(x) * weight * scale too, rounded once to residual's dtype, neither smoothed nor rotated.
    Returns x [..., L, K] in residual's dtype, and of rms_norm(x) * weight * scale the codes xq int8 [..., L, K] and
    x_scale float32 [..., L, 1], and with keep_values the values [..., L, K]. The second norm reads x as rounded.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    name = "gated_residual_norm_quantize"
    check_gated_residual(name, residual, y, y_weight)
    check_quantizer(name, residual, smooth, rotation_group)
    K = residual.shape[-1]
    if tuple(weight.shape) != (K,):
        raise ValueError(f"{name}: weight must have shape ({K},), got {tuple(weight.shape)}")
    x, xq, x_scale, values = torch.ops.lowbit.gated_residual_norm_quantize(
        residual.reshape(-1, K),
        y.reshape(-1, K),
        y_weight,
        sample_rows(name, "gate", residual, gate),
        weight,
        sample_rows(name, "scale", residual, scale),
        eps,
        smooth,
        rotation_group,
        keep_values,
    )
    x_and_codes = x.reshape(residual.shape), xq.reshape(residual.shape), x_scale.reshape(*residual.shape[:-1], 1)
    return (*x_and_codes, values.reshape(residual.shape)) if keep_values else x_and_codes


@custom_op("gated_residual_norm_quantize")
def _gated_residual_norm_quantize(
    residual: torch.Tensor,
    y: torch.Tensor,
    y_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    smooth: torch.Tensor | None,
    rotation_group: int,
    keep_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return OP.run(
        GatedResidualNormQuantizeCall(
            residual, y, y_weight, gate, weight, scale, eps, smooth, rotation_group, keep_values
        )
    )


@_gated_residual_norm_quantize.register_fake
def _(
    residual: torch.Tensor,
    y: torch.Tensor,
    y_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    smooth: torch.Tensor | None,
    rotation_group: int,
    keep_values: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape, dtype=torch.int8),
        residual.new_empty((residual.shape[0], 1), dtype=torch.float32),
        residual.new_empty(residual.shape if keep_values else (0,)),
    )
