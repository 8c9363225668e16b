"""x[M, K] -> xq[M, K] int8, x_scale[M, 1] float32: symmetric, one scale a token, found on the values themselves."""

import dataclasses

import torch

from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class QuantizePerTokenCall:
    """One checked call: `x` float [M, K] of any strides, `smooth` float32 [K] or None, `rotation_group` 0 or a divisor
    of K."""

    x: torch.Tensor
    smooth: torch.Tensor | None
    rotation_group: int


def quantize_per_token(
    x: torch.Tensor, smooth: torch.Tensor | None = None, rotation_group: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to INT8 with one dynamic scale a token.

    x: float [..., K]. smooth: float32 [K], multiplies x first. rotation_group: 0, or the size of the Hadamard groups
    that x is rotated by along K (after smoothing, and after rounding if x is bf16). Returns xq int8 [..., K] and
    x_scale float32 [..., 1] with `x_scale = absmax / 127` in float32 and codes rounded from x * (1 / x_scale), halves
    to even. An all-zero token gets scale 1e-30 and zeros. A token that holds a NaN or an infinity gets a scale that is
    not finite and zeros, so that a product with it is NaN.

    Raises ValueError for a dtype that is not floating, a smooth that is not [K] and a group that does not divide K.
    """
    K = x.shape[-1]
    check_quantizer("quantize_per_token", x, smooth, rotation_group)
    xq, x_scale = torch.ops.lowbit.quantize_per_token(x.reshape(-1, K), smooth, rotation_group)
    return xq.reshape(x.shape), x_scale.reshape(*x.shape[:-1], 1)


def check_quantizer(op: str, x: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int) -> None:
    """Raises ValueError for activations x [..., K] or quantizer options that do not fit."""
    K = x.shape[-1]
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op} needs floating-point activations, got {x.dtype}")
    if smooth is not None and (tuple(smooth.shape) != (K,) or smooth.dtype != torch.float32):
        raise ValueError(f"{op}: smooth must be float32 of shape ({K},), got {smooth.dtype} {tuple(smooth.shape)}")
    if rotation_group and K % rotation_group:
        raise ValueError(f"{op}: rotation group {rotation_group} does not divide K={K}")


@custom_op("quantize_per_token")
def _quantize_per_token(
    x: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return OP.run(QuantizePerTokenCall(x, smooth, rotation_group))


@_quantize_per_token.register_fake
def _(x: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)
