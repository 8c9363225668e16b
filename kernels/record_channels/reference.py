"""absmax = max(absmax, |x|), square_sum += x**2, sample[slots] = x[rows], in plain torch; nothing waits for the
device, and CUDA makes no float32 copy of x."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import RecordChannelsCall


def supports(call: RecordChannelsCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: RecordChannelsCall) -> None:
    largest = torch.linalg.vector_norm(call.x, float("inf"), dim=0).float()
    torch.maximum(call.absmax, largest, out=call.absmax)
    root = torch.linalg.vector_norm(call.x, 2, dim=0, dtype=torch.float32)
    call.square_sum.addcmul_(root, root)
    if call.rows.numel():
        drawn = call.x.index_select(0, call.rows).to(torch.bfloat16)
        call.sample[call.slots] = drawn  # not index_copy_, which Apple's GPUs lack in torch 2.7
