"""One launch, x is read once: a program takes BLOCK_K channels over all tokens, so it adds up in one order, and nobody
else writes to its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..quantize_per_token.triton_impl import row_major, token_refusal

if TYPE_CHECKING:
    from . import RecordChannelsCall

BLOCK_M = 256
BLOCK_K = 32
LARGEST_SAMPLE = 128  # tokens, moved as one tile in registers


def supports(call: RecordChannelsCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := token_refusal(call.x, 0):
        return reason
    if call.sample.shape[0] > LARGEST_SAMPLE:
        return f"fills samples of up to {LARGEST_SAMPLE} tokens, found {call.sample.shape[0]}"
    return None


def run(call: RecordChannelsCall) -> None:
    x = row_major(call.x)
    M, K = x.shape
    with torch.cuda.device_of(x):
        _record_channels_kernel[(triton.cdiv(K, BLOCK_K),)](
            x,
            call.absmax,
            call.square_sum,
            call.sample,
            call.rows,
            call.slots,
            M,
            K,
            call.rows.shape[0],
            x.stride(0),
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            BLOCK_S=triton.next_power_of_2(max(call.sample.shape[0], 1)),
            num_warps=8,
        )


@triton.jit(do_not_specialize=["M", "n"])
def _record_channels_kernel(
    x_ptr,
    absmax_ptr,
    square_sum_ptr,
    sample_ptr,
    rows_ptr,
    slots_ptr,
    M,
    K,
    n,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Each thread goes over its own tokens; threads exchange once, at the end.
    bits = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        # The bits of magnitudes order like them, NaN above all.
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        squares += x * x
    absmax = tl.max(bits, axis=0)
    before = tl.load(absmax_ptr + k, mask=k < K, other=0.0).to(tl.int32, bitcast=True)
    tl.store(absmax_ptr + k, tl.maximum(absmax, before).to(tl.float32, bitcast=True), mask=k < K)
    square_sum = tl.load(square_sum_ptr + k, mask=k < K, other=0.0) + tl.sum(squares, axis=0)
    tl.store(square_sum_ptr + k, square_sum, mask=k < K)

    i = tl.arange(0, BLOCK_S)
    row = tl.load(rows_ptr + i, mask=i < n, other=0)
    slot = tl.load(slots_ptr + i, mask=i < n, other=0)
    mask = (i[:, None] < n) & (k[None, :] < K)
    drawn = tl.load(x_ptr + row[:, None] * stride_xm + k[None, :], mask=mask)
    tl.store(sample_ptr + slot[:, None] * K + k[None, :], drawn.to(tl.bfloat16), mask=mask)
