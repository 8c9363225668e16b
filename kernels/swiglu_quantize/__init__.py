"""gate[M, K], up[M, K] -> xq[M, K] int8, x_scale[M, 1] of silu(gate) * up: the input of an FFN's down-projection."""

import dataclasses

import torch

from ..dispatch import Op, custom_op
from ..quantize_per_token import check_quantizer

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class SwigluQuantizeCall:
    """One checked call: `gate` and `up` float [M, K] of one dtype, `smooth` float32 [K] or None, `rotation_group` 0 or
    a divisor of K, `keep_values` whether the values are a result beside their codes."""

    gate: torch.Tensor
    up: torch.Tensor
    smooth: torch.Tensor | None
    rotation_group: int
    keep_values: bool = False


def swiglu_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    smooth: torch.Tensor | None = None,
    rotation_group: int = 0,
    keep_values: bool = False,
) -> tuple[torch.Tensor, ...]:
    """SwiGLU, quantized per token in the same pass; everything in float32 up to the codes.

    gate, up: float [..., K] of one dtype. smooth, rotation_group: as in `quantize_per_token`. keep_values: store
    silu(gate) * up too, rounded once to gate's dtype, neither smoothed nor rotated. Returns xq int8 [..., K] and
    x_scale float32 [..., 1] of silu(gate) * up, and with keep_values those values [..., K]. A product of float16 inputs
    is limited to what float16 holds, and a NaN becomes 0, as in the host's float16 models.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    K = gate.shape[-1]
    check_quantizer("swiglu_quantize", gate, smooth, rotation_group)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu_quantize: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ"
        )
    xq, x_scale, values = torch.ops.lowbit.swiglu_quantize(
        gate.reshape(-1, K), up.reshape(-1, K), smooth, rotation_group, keep_values
    )
    codes = xq.reshape(gate.shape), x_scale.reshape(*gate.shape[:-1], 1)
    return (*codes, values.reshape(gate.shape)) if keep_values else codes


@custom_op("swiglu_quantize")
def _swiglu_quantize(
    gate: torch.Tensor, up: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int, keep_values: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return OP.run(SwigluQuantizeCall(gate, up, smooth, rotation_group, keep_values))


@_swiglu_quantize.register_fake
def _(
    gate: torch.Tensor, up: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int, keep_values: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        gate.new_empty(gate.shape, dtype=torch.int8),
        gate.new_empty((gate.shape[0], 1), dtype=torch.float32),
        gate.new_empty(gate.shape if keep_values else (0,)),
    )
