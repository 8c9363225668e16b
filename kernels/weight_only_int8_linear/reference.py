"""The product in float32, a chunk of output features at a time, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks

if TYPE_CHECKING:
    from . import WeightOnlyInt8LinearCall


def supports(call: WeightOnlyInt8LinearCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: WeightOnlyInt8LinearCall) -> torch.Tensor:
    N, K = call.wq.shape
    y = torch.empty((call.x.shape[0], N), dtype=torch.float32, device=call.x.device)
    for features in row_chunks(N, K, call.x.device):
        y[:, features] = call.x.float() @ call.wq[features].float().t()
    y *= call.w_scale.reshape(1, -1)
    return (y if call.bias is None else y + call.bias.float()).to(call.x.dtype)
