"""The definition, exact on any device: the product in slices of K whose sums float32 holds exactly, summed in int32.

float64 would hold the whole sum, but some devices have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import Int8LinearCall

EXACT_K = 1024  # 1024 * 128 * 128 = 2**24, the largest run of integers that float32 holds


def supports(call: Int8LinearCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: Int8LinearCall) -> torch.Tensor:
    product = torch.zeros((call.M, call.N), dtype=torch.int32, device=call.device)
    for xq, wq in zip(call.xq.split(EXACT_K, dim=1), call.wq.split(EXACT_K, dim=1), strict=True):
        product += (xq.float() @ wq.float().t()).to(torch.int32)
    return call.epilogue(product)
