"""xq = round(rotate(x * smooth) / x_scale), x_scale = max(absmax / 127, 1e-30), in float32, a chunk at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks
from ...formats.int8 import rotate, symmetric_scale

if TYPE_CHECKING:
    from . import QuantizePerTokenCall


def supports(call: QuantizePerTokenCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: QuantizePerTokenCall) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = call.x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=call.x.device)
    for tokens in row_chunks(M, K, call.x.device):
        x = call.x[tokens].float()
        if call.smooth is not None:
            x = x * call.smooth
        if call.rotation_group:
            x = rotate(x, call.rotation_group)
        x_scale[tokens] = symmetric_scale(x.abs().amax(dim=-1, keepdim=True))
        # The cast of a NaN to int8 is undefined: zero it, the scale already carries it.
        codes = (x / x_scale[tokens]).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        xq[tokens] = codes.to(torch.int8)
    return xq, x_scale
