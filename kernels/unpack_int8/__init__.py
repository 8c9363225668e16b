"""INT8 weight [N, K] with its scales -> float weight [N, K]: unrotated and with smoothing undone."""

import dataclasses

import torch

from ...formats import Int8Weight
from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class UnpackInt8Call:
    """One checked call: the weight and the dtype wanted."""

    weight: Int8Weight
    dtype: torch.dtype


def unpack_int8(weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Unpack an INT8 weight for a product in floating point: [N, K] in dtype, computed in float32, rounded once."""
    return torch.ops.lowbit.unpack_int8(weight.data, weight.scale, weight.smooth, weight.rotation_group, dtype)


@custom_op("unpack_int8")
def _unpack_int8(
    wq: torch.Tensor, w_scale: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int, dtype: torch.dtype
) -> torch.Tensor:
    return OP.run(UnpackInt8Call(Int8Weight(wq, tuple(wq.shape), w_scale, smooth, rotation_group), dtype))


@_unpack_int8.register_fake
def _(
    wq: torch.Tensor, w_scale: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int, dtype: torch.dtype
) -> torch.Tensor:
    return wq.new_empty(wq.shape, dtype=dtype)
