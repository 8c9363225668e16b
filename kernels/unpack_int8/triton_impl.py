"""w[N, K] = unrotate(wq * w_scale) * smooth, in float32, rounded once: one pass over memory.

A program unpacks a few rows' pieces of 512 features, two rotation groups each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..capability import triton_refusal
from ..quantize_per_token.triton_impl import HADAMARD_DTYPE, ROTATION_GROUP, rotate_features

if TYPE_CHECKING:
    from . import UnpackInt8Call

BLOCK_N, BLOCK_K = 4, 512


def supports(call: UnpackInt8Call) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := triton_refusal(call.weight.data.device):
        return reason
    if call.weight.rotation_group not in (0, ROTATION_GROUP):
        return f"rotates groups of {ROTATION_GROUP}, found {call.weight.rotation_group}"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"writes bf16, fp16 and fp32, not {call.dtype}"
    return None


def run(call: UnpackInt8Call) -> torch.Tensor:
    wq = call.weight.data.contiguous()
    N, K = wq.shape
    weight = torch.empty((N, K), dtype=call.dtype, device=wq.device)
    if N and K:
        with torch.cuda.device_of(wq):
            _unpack_int8_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))](
                wq,
                call.weight.scale.contiguous(),
                None if call.weight.smooth is None else call.weight.smooth.contiguous(),
                weight,
                N,
                K,
                PER_CHANNEL=call.weight.per_channel,
                ROTATE=call.weight.rotation_group != 0,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                HADAMARD_DTYPE=HADAMARD_DTYPE,
            )
    return weight


@triton.jit
def _unpack_int8_kernel(
    wq_ptr,
    w_scale_ptr,
    smooth_ptr,
    weight_ptr,
    N,
    K,
    PER_CHANNEL: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    offsets = n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(wq_ptr + offsets, mask=mask, other=0)
    if ROTATE:
        # The codes are exact in bfloat16, so they are rotated first and scaled after.
        w = tl.reshape(w.to(tl.float32).to(tl.bfloat16), (BLOCK_N * BLOCK_K,))
        w = rotate_features(w, BLOCK_N * BLOCK_K, HADAMARD_DTYPE)
    w = tl.reshape(w.to(tl.float32), (BLOCK_N, BLOCK_K))
    w *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0)[:, None] if PER_CHANNEL else tl.load(w_scale_ptr)
    if smooth_ptr is not None:
        w *= tl.load(smooth_ptr + k, mask=k < K, other=0.0)[None, :]
    tl.store(weight_ptr + offsets, w.to(weight_ptr.dtype.element_ty), mask=mask)
