"""wq = round(w * (1 / row_scale)) with w in float32, rotated or not; in chunks of rows to bound the temporaries.

One division a row, not one a value: a kernel that multiplies by the same reciprocal gives the same codes, for a tenth
of the instructions that a division of float32 takes.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def run(call: UnpackToInt8Call) -> torch.Tensor:
    wq = torch.empty((call.blocks.shape[0], call.K), dtype=torch.int8, device=call.blocks.device)
    for rows, w in _weights(call):
        # A row that is not finite says so in its scale; the cast of its codes to int8 would be undefined.
        codes = (w * call.row_scale[rows].reciprocal()).round_().clamp_(-127, 127).nan_to_num_(nan=0.0)
        wq[rows] = codes.to(torch.int8)
    return wq


def find_row_scale(call: UnpackToInt8Call) -> torch.Tensor:
    row_scale = torch.empty((call.blocks.shape[0], 1), dtype=torch.float32, device=call.blocks.device)
    for rows, w in _weights(call):
        row_scale[rows] = symmetric_scale(w.abs().amax(dim=1, keepdim=True))
    return row_scale


def _weights(call: UnpackToInt8Call) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows in row_chunks(call.blocks.shape[0], call.K, call.blocks.device):
        w = ggml.dequantize(call.blocks[rows], call.ggml_type)
        yield rows, rotate(w, call.rotation_group) if call.rotation_group else w
