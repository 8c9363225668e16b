"""The product by `torch._int_mm`: the int8 tensor cores through cuBLAS on CUDA, oneDNN on the CPU.

On CUDA `_int_mm` wants more than 16 rows and K and N in multiples of 8; shapes that miss it are left to the definition.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch

from ..capability import device_capability

if TYPE_CHECKING:
    from . import Int8LinearCall

# The product is int32 and the epilogue float32: parts of the tokens keep each near this size.
CHUNK_BYTES = 256 * 2**20


def supports(call: Int8LinearCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if call.device.type not in ("cpu", "cuda"):
        return f"needs the CPU or a CUDA device, found {call.device.type}"
    if call.device.type == "cpu" and not _is_exact_on_the_cpu():
        return "needs a CPU with VNNI, whose sums are exact"
    if call.device.type == "cuda":
        if torch.version.hip is not None:
            return "is not tested on ROCm, where some GPUs fail in it"
        capability = device_capability(call.device)
        if capability < (7, 5):
            return f"needs compute capability 7.5, found {capability[0]}.{capability[1]}"
        if call.M <= 16:
            return f"needs more than 16 tokens on CUDA, found M={call.M}"
        if call.K % 8 or call.N % 8:
            return f"needs K and N in multiples of 8 on CUDA, found K={call.K}, N={call.N}"
    return None


@functools.cache
def _is_exact_on_the_cpu() -> bool:
    """Whether `_int_mm` sums exactly: without VNNI oneDNN adds pairs of products in 16 bits, which saturate."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


def run(call: Int8LinearCall) -> torch.Tensor:
    wq = call.wq if call.wq.stride(1) == 1 and call.wq.stride(0) == call.K else call.wq.contiguous()
    parts = max(1, -(-4 * call.M * call.N // CHUNK_BYTES))
    if parts == 1:
        return call.epilogue(torch._int_mm(call.xq.contiguous(), wq.t()))
    y = torch.empty((call.M, call.N), dtype=call.out_dtype, device=call.device)
    # Nearly equal parts: a short last one could fall below the 17 tokens that CUDA wants.
    hidden = [None] * parts if call.hidden is None else call.hidden.tensor_split(parts)
    parted = (tensor.tensor_split(parts) for tensor in (call.xq, call.x_scale, y))
    for xq, x_scale, out, part_hidden in zip(*parted, hidden, strict=True):
        part = dataclasses.replace(call, xq=xq, x_scale=x_scale, hidden=part_hidden)
        out.copy_(part.epilogue(torch._int_mm(xq.contiguous(), wq.t())))
    return y
