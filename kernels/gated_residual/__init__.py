"""residual[M, K] + gate * rms_norm(y[M, K]) * weight: the end of a modulated block's branch, in one pass."""

import dataclasses

import torch

from ..dispatch import Op, custom_op
from ..rms_norm_scale_quantize import sample_rows

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class GatedResidualCall:
    """One checked call: `residual` and `y` float [M, K] of one dtype, `weight` float [K], `gate` float [S, K] with M a
    multiple of S (one row a sample)."""

    residual: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor
    gate: torch.Tensor
    eps: float


def gated_residual(
    residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual + gate * rms_norm(y) * weight in float32, rounded once.

    residual, y: float [..., L, K] of one dtype. weight: float [K]. gate: float [..., 1, K], one row a sample. eps:
    added to the mean square. Returns [..., L, K] in residual's dtype.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    check_gated_residual("gated_residual", residual, y, weight)
    K = residual.shape[-1]
    rows = sample_rows("gated_residual", "gate", residual, gate)
    x = torch.ops.lowbit.gated_residual(residual.reshape(-1, K), y.reshape(-1, K), weight, rows, eps)
    return x.reshape(residual.shape)


def check_gated_residual(op: str, residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError naming shapes and dtypes that do not fit."""
    if not residual.dtype.is_floating_point or y.shape != residual.shape or y.dtype != residual.dtype:
        raise ValueError(
            f"{op}: residual and y must be floats of one shape and dtype, got {tuple(residual.shape)} "
            f"{residual.dtype} and {tuple(y.shape)} {y.dtype}"
        )
    if tuple(weight.shape) != (residual.shape[-1],):
        raise ValueError(f"{op}: weight must have shape ({residual.shape[-1]},), got {tuple(weight.shape)}")


@custom_op("gated_residual")
def _gated_residual(
    residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float
) -> torch.Tensor:
    return OP.run(GatedResidualCall(residual, y, weight, gate, eps))


@_gated_residual.register_fake
def _(residual: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    return residual.new_empty(residual.shape)
