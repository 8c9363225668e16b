"""FP8 weights: w = scale * q. Only ever a source to quantize from, or to unpack: nothing here computes in FP8."""

from __future__ import annotations

import dataclasses

import torch

from .base import QuantizedWeight, described, require_floating
from .chunks import row_chunks

FORMAT_NAMES = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


@dataclasses.dataclass(frozen=True, eq=False)
class Fp8Weight(QuantizedWeight):
    """data: float8_e4m3fn or float8_e5m2 [N, K]; shape: (N, K).

    scale: float32, per-tensor () or [1], or per-channel [N] or [N, 1].
    """

    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.data.dtype not in FORMAT_NAMES or self.data.dim() != 2 or tuple(self.data.shape) != tuple(self.shape):
            raise ValueError(
                f"an FP8 weight of shape {list(self.shape)} is float8_e4m3fn or float8_e5m2 [N, K], "
                f"found {described(self.data)}"
            )
        N = self.data.shape[0]
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) not in ((), (1,), (N,), (N, 1)):
            raise ValueError(
                f"the scale of an FP8 weight is float32 [], [1], [{N}] or [{N}, 1] (N={N}), "
                f"found {described(self.scale)}"
            )

    @property
    def per_channel(self) -> bool:
        return tuple(self.scale.shape) not in ((), (1,))

    @property
    def format_name(self) -> str:
        return FORMAT_NAMES[self.data.dtype]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        require_floating(dtype)
        scale = self.scale.reshape(-1, 1) if self.per_channel else self.scale
        weight = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
        for rows in row_chunks(*self.data.shape, self.data.device):
            values = self.data[rows].to(torch.float32)
            weight[rows].copy_(values.mul_(scale[rows] if self.per_channel else scale))
        return weight
