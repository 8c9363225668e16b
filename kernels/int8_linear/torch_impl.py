"""The product by `torch._int_mm`: the int8 tensor cores through cuBLAS on CUDA, oneDNN on the CPU.

On CUDA `_int_mm` wants more than 16 rows and K and N in multiples of 8; shapes that miss it are left to the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import Int8LinearCall

# The epilogue works on float32: chunks of rows keep its temporaries near this size.
CHUNK_BYTES = 256 * 2**20


def supports(call: Int8LinearCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if call.device.type not in ("cpu", "cuda"):
        return f"needs the CPU or a CUDA device, found {call.device.type}"
    if call.device.type == "cuda":
        capability = torch.cuda.get_device_capability(call.device)
        if torch.version.hip is None and capability < (7, 5):
            return f"needs compute capability 7.5, found {capability}"
        if call.M <= 16:
            return f"needs more than 16 tokens on CUDA, found M={call.M}"
        if call.K % 8 or call.N % 8:
            return f"needs K and N in multiples of 8 on CUDA, found K={call.K}, N={call.N}"
    return None


def run(call: Int8LinearCall) -> torch.Tensor:
    product = torch._int_mm(call.xq.contiguous(), call.wq.t())
    rows = max(1, CHUNK_BYTES // (4 * call.N))
    if call.M <= rows:
        return call.epilogue(product)
    y = torch.empty((call.M, call.N), dtype=call.out_dtype, device=call.device)
    w_scale = call.w_scale.reshape(1, -1)
    for start in range(0, call.M, rows):
        part = product[start : start + rows].float() * call.x_scale[start : start + rows] * w_scale
        y[start : start + rows] = part if call.bias is None else part + call.bias.float()
    return y
