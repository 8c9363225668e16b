"""wq = round(w * (1 / row_scale)) with w in float32, rotated or not; in chunks of rows to bound the temporaries.

One division a row, not one a value: a kernel that multiplies by the same reciprocal gives the same codes, for a tenth
of the instructions that a division of float32 takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats import ggml
from ...formats.chunks import row_chunks
from ...formats.int8 import rotate, symmetric_scale

if TYPE_CHECKING:
    from . import UnpackToInt8Call


def supports(call: UnpackToInt8Call) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: UnpackToInt8Call) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = call.blocks.shape[0], ggml.logical_K(call.ggml_type, call.blocks.shape[1])
    wq = torch.empty((N, K), dtype=torch.int8, device=call.blocks.device)
    row_scale = call.row_scale
    if row_scale is None:
        row_scale = torch.empty((N, 1), dtype=torch.float32, device=call.blocks.device)
    for chunk in row_chunks(N, K, call.blocks.device):
        w = ggml.dequantize(call.blocks[chunk], call.ggml_type)
        if call.rotation_group:
            w = rotate(w, call.rotation_group)
        if call.row_scale is None:
            row_scale[chunk] = symmetric_scale(w.abs().amax(dim=1, keepdim=True))
        # A row that is not finite says so in its scale; the cast of its codes to int8 would be undefined.
        codes = (w * row_scale[chunk].reciprocal()).round_().clamp_(-127, 127).nan_to_num_(nan=0.0)
        wq[chunk] = codes.to(torch.int8)
    return wq, row_scale
