"""y[M, N] = x[M, K] @ w[N, K].T + bias[N], M <= 16: bound by reading the blocks, which are decoded in registers.

A program computes some output features of all tokens, some blocks of each row at a time, with the decoders of
`unpack`. One token is multiplied and summed directly; more go through the tensor cores, whose smallest tile has 16
rows, with the weights rounded to x's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from ..capability import interpreted
from ..unpack.triton_impl import DECODERS, aligned, blocks_refusal, first_element
from ..weight_only_int8_linear import LARGEST_M

if TYPE_CHECKING:
    from . import GgmlLinearCall


class Tile(NamedTuple):
    """block_n: output features of a program. step_elements: of a row at a time."""

    block_n: int
    num_warps: int
    step_elements: int


# The best sums of times over Q4_K and Q8_0, [18432, 512] and [12288, 4096], on an H200.
ONE_TOKEN = Tile(4, 4, 512)
MORE_TOKENS = Tile(32, 4, 256)


def supports(call: GgmlLinearCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := blocks_refusal(call.blocks, call.ggml_type):
        return reason
    if call.x.shape[0] > LARGEST_M:
        return f"is for at most {LARGEST_M} tokens, found {call.x.shape[0]}"
    if call.x.dtype not in (torch.bfloat16, torch.float16):
        return f"reads bf16 and fp16, found {call.x.dtype}"
    return None


def run(call: GgmlLinearCall) -> torch.Tensor:
    x = call.x if call.x.stride(1) == 1 else call.x.contiguous()
    blocks = aligned(call.blocks)
    M, K = x.shape
    N = blocks.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    decoder = DECODERS[call.ggml_type]
    tile = ONE_TOKEN if M == 1 else MORE_TOKENS
    if M and N:
        with torch.cuda.device_of(y):
            _ggml_linear_kernel[(triton.cdiv(N, tile.block_n),)](
                x,
                blocks,
                None if call.bias is None else call.bias.contiguous(),
                y,
                M,
                N,
                K // decoder.unit_elements,
                x.stride(0),
                blocks.shape[1],
                DIRECT=M == 1,
                BLOCK_M=LARGEST_M,
                BLOCK_N=tile.block_n,
                STEP_UNITS=max(1, tile.step_elements // decoder.unit_elements),
                DOT_DTYPE=tl.float32 if interpreted() else None,  # the interpreter has no bf16 products
                num_warps=tile.num_warps,
                **decoder.constants(call.ggml_type),
            )
    return y


@triton.jit(do_not_specialize=["M"])
def _ggml_linear_kernel(
    x_ptr,
    blocks_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    row_units,
    stride_xm,
    row_bytes,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_UNITS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """One token's products are kept apart for each place of a step until the end, where one sum crosses threads."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if DOT_DTYPE is None else DOT_DTYPE
    STEP: tl.constexpr = STEP_UNITS * RUN  # elements of a plane
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_N * STEP_UNITS)
    row = tl.minimum(tl.program_id(0) * BLOCK_N + place // STEP_UNITS, N - 1)
    rows_ptr = blocks_ptr + row.to(tl.int64)[:, None] * row_bytes
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, STEP)
    i = tl.arange(0, RUN)[None, :]
    if DIRECT:
        total = tl.zeros((BLOCK_N, STEP), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, row_units, STEP_UNITS):
        # Units beyond the end of a row are its last one again, times zeros of x.
        unit = tl.minimum(start + place % STEP_UNITS, row_units - 1)[:, None]
        values = DECODE(rows_ptr + unit // BLOCK_UNITS * TYPE_SIZE, unit % BLOCK_UNITS, i)
        x_unit = start + k // RUN
        x_k = first_element(x_unit, RUN, PLANES, SPLIT) + k % RUN
        for plane in tl.static_range(PLANES):
            w = tl.reshape(values[plane], (BLOCK_N, STEP))
            x_ptrs = x_ptr + x_k + plane * SPLIT * RUN
            if DIRECT:
                x = tl.load(x_ptrs, mask=x_unit < row_units, other=0.0).to(tl.float32)
                total += w * x[None, :]
            else:
                x_ptrs = x_ptrs[None, :] + m.to(tl.int64)[:, None] * stride_xm
                x = tl.load(x_ptrs, mask=(m < M)[:, None] & (x_unit < row_units)[None, :], other=0.0)
                total = tl.dot(x.to(dtype), tl.trans(w.to(dtype)), total)
    if DIRECT:
        y = tl.sum(total, axis=1)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
    else:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        tl.store(y_ptr + m[:, None] * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)
