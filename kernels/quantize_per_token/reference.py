"""xq = round(rotate(x * smooth) / x_scale), x_scale = max(absmax / 127, 1e-30), everything in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.int8 import rotate, symmetric_scale

if TYPE_CHECKING:
    from . import QuantizePerTokenCall


def supports(call: QuantizePerTokenCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: QuantizePerTokenCall) -> tuple[torch.Tensor, torch.Tensor]:
    x = call.x.float()
    if call.smooth is not None:
        x = x * call.smooth
    if call.rotation_group:
        x = rotate(x, call.rotation_group)
    x_scale = symmetric_scale(x.abs().amax(dim=-1, keepdim=True))
    # The cast of a NaN to int8 is undefined: zero it, the scale already carries it.
    xq = (x / x_scale).round().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return xq.to(torch.int8), x_scale
