"""y[M, N] = (x[M, K] @ wq[N, K].T) * w_scale[N, 1].T + bias[N], M <= 16: bound by reading wq, one byte a weight.

A program computes some output features of all tokens. One token is multiplied and summed directly, more go through
the tensor cores, whose smallest tile has 16 rows; codes are exact in bf16 and fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..capability import interpreted, triton_refusal
from . import LARGEST_M

if TYPE_CHECKING:
    from . import WeightOnlyInt8LinearCall


def supports(call: WeightOnlyInt8LinearCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := triton_refusal(call.x.device):
        return reason
    if call.x.dtype not in (torch.bfloat16, torch.float16):
        return f"reads bf16 and fp16, found {call.x.dtype}"
    return None


def run(call: WeightOnlyInt8LinearCall) -> torch.Tensor:
    x, wq = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (call.x, call.wq))
    M, K = x.shape
    N = wq.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    block_n = 32 if N >= 8192 else 16  # enough programs to keep the memory busy
    direct = M == 1
    # A direct sum has no pipeline: long steps keep its loads in flight.
    block_k = min(max(triton.next_power_of_2(K), 64), 1024) if direct else 256
    if M and N:
        with torch.cuda.device_of(y):
            _weight_only_int8_linear_kernel[(triton.cdiv(N, block_n),)](
                x,
                wq,
                call.w_scale.contiguous(),
                None if call.bias is None else call.bias.contiguous(),
                y,
                M,
                N,
                K,
                x.stride(0),
                wq.stride(0),
                PER_CHANNEL=call.w_scale.numel() > 1,
                EVEN_K=K % block_k == 0,
                BLOCK_M=LARGEST_M,
                DIRECT=direct,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                DOT_DTYPE=tl.float32 if interpreted() else None,  # the interpreter has no bf16 products
                num_warps=4,
                num_stages=4,
            )
    return y


@triton.jit(do_not_specialize=["M"])
def _weight_only_int8_linear_kernel(
    x_ptr,
    wq_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    PER_CHANNEL: tl.constexpr,
    EVEN_K: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if DIRECT:
        total = _direct_sum(x_ptr, wq_ptr, n, N, K, stride_wn, EVEN_K, BLOCK_N, BLOCK_K)
        y = _scaled(total, w_scale_ptr, bias_ptr, n, N, PER_CHANNEL)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
    else:
        m = tl.arange(0, BLOCK_M)
        total = _tile_sum(
            x_ptr, wq_ptr, m, n, M, N, K, stride_xm, stride_wn, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, DOT_DTYPE
        )
        y = _scaled(total, w_scale_ptr, bias_ptr, n, N, PER_CHANNEL)
        mask = (m < M)[:, None] & (n < N)[None, :]
        tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _direct_sum(x_ptr, wq_ptr, n, N, K, stride_wn, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[K] @ wq[n, K].T of one token, float32 [BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)
    w_ptrs = wq_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * stride_wn + k[None, :]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + start + k)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0)
            w = tl.load(w_ptrs, mask=(start + k < K)[None, :], other=0)
        total += tl.sum(x.to(tl.float32)[None, :] * w.to(tl.float32), axis=1)
        w_ptrs += BLOCK_K
    return total


@triton.jit
def _tile_sum(
    x_ptr,
    wq_ptr,
    m,
    n,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """x[m, K] @ wq[n, K].T by the tensor cores, float32 [BLOCK_M, BLOCK_N]."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if DOT_DTYPE is None else DOT_DTYPE
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    w_ptrs = wq_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * stride_wn + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=(m < M)[:, None], other=0.0)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(m < M)[:, None] & (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + k < K)[:, None], other=0)
        total = tl.dot(x.to(dtype), w.to(dtype), total)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return total


@triton.jit
def _scaled(total, w_scale_ptr, bias_ptr, n, N, PER_CHANNEL: tl.constexpr):
    """The epilogue: total[..., n] * w_scale[n] + bias[n]."""
    if PER_CHANNEL:
        total *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    else:
        total *= tl.load(w_scale_ptr)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return total
