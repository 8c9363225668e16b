"""quantize(silu(gate) * up), in float32; kept values are rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks
from ..quantize_per_token.reference import quantize_rows

if TYPE_CHECKING:
    from . import SwigluQuantizeCall

LARGEST_FP16 = 65504.0


def supports(call: SwigluQuantizeCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: SwigluQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M, K = call.gate.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=call.gate.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=call.gate.device)
    values = torch.empty((M, K) if call.keep_values else (0,), dtype=call.gate.dtype, device=call.gate.device)
    for tokens in row_chunks(M, K, call.gate.device):
        products = swiglu(call.gate[tokens], call.up[tokens])
        xq[tokens], x_scale[tokens] = quantize_rows(products, call.smooth, call.rotation_group, call.gate.dtype)
        if call.keep_values:
            values[tokens] = products
    return xq, x_scale, values


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32, not rounded."""
    values = torch.nn.functional.silu(gate.float()) * up.float()
    if gate.dtype == torch.float16:
        values = values.nan_to_num(nan=0.0).clamp(-LARGEST_FP16, LARGEST_FP16)
    return values
