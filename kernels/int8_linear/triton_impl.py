"""y[M, N] = (xq[M, K] @ wq[N, K].T) * x_scale[M, 1] * w_scale[N, 1].T + bias[N] + hidden[M, R] @ up[N, R].T
xq per-token int8, wq per-channel or per-tensor int8, scales float32; the int32 sum is exact for K < 131072.

A program computes one tile of y. Tiles are visited in groups of rows of tiles, so that programs that run at the same
time read the same weights, and a group's tokens stay in the L2 cache. Where the tiles are too few to fill the device (a
long K behind few tokens), the sum is split along K: the parts leave int32 sums, which a second kernel adds up exactly.

On sm_90 the bulk copy engine brings the operands: 3 to 5 % faster on an H200 at K = 4608, as fast at K = 12288.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

try:  # Triton 3.4 and newer
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

from .. import tuning
from ..capability import interpreted, triton_refusal
from . import configs

if TYPE_CHECKING:
    from . import Int8LinearCall

SOURCE = tuning.source_hash(__file__, configs.__file__)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SUM_BLOCK = 1024
RANKS = (16, 32, 64, 128)  # of a low-rank term that the epilogue adds: others, and in split products, are added after
RANK_STEP = 16


def supports(call: Int8LinearCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := triton_refusal(call.device):
        return reason
    return None if call.out_dtype in OUT_DTYPES else f"writes bf16, fp16 and fp32, not {call.out_dtype}"


def run(call: Int8LinearCall) -> torch.Tensor:
    y = torch.empty((call.M, call.N), dtype=call.out_dtype, device=call.device)
    if call.M == 0 or call.N == 0:
        return y
    xq = call.xq if call.xq.stride(1) == 1 else call.xq.contiguous()
    wq = call.wq if call.wq.stride(1) == 1 else call.wq.contiguous()
    with torch.cuda.device_of(y):
        bucket = tuning.bucket(call.M)
        config = tuning.choose(
            "int8_linear",
            SOURCE,
            call.device,
            _tuning_key(bucket, call.N, call.K, call.out_dtype),
            configs.candidates(call.device, bucket),
            lambda config: _launch(call, xq, wq, y, config),
            call.tune,
        )
        adds_low_rank = _launch(call, xq, wq, y, config)
    if call.hidden is not None and not adds_low_rank:
        y.addmm_(call.hidden, call.up.t())
    return y


@functools.lru_cache(maxsize=4096)
def _tuning_key(bucket: int, N: int, K: int, out_dtype: torch.dtype) -> str:
    return f"M{bucket} N{N} K{K} {str(out_dtype).removeprefix('torch.')}"


def _descriptors(
    xq: torch.Tensor, wq: torch.Tensor, y: torch.Tensor, config: dict
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor] | None:
    """The operands for the bulk copy engine, or None where their addresses do not suit it."""
    if TensorDescriptor is None or y.dtype == torch.int32:
        return None
    if (xq.data_ptr() | wq.data_ptr() | y.data_ptr()) % 16:
        return None
    if (xq.stride(0) | wq.stride(0) | y.stride(0) * y.element_size()) % 16:
        return None
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    return _descriptor(xq, block_m, block_k), _descriptor(wq, block_n, block_k), _descriptor(y, block_m, block_n)


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a tensor whose address and strides are known to suit: Triton's constructor checks all that again, for 10 us,
    and is spared by filling in a copy."""
    copy = object.__new__(TensorDescriptor)
    copy.__dict__.update(_unfilled(tensor.dtype, tuple(tensor.shape), tensor.stride(), rows, columns).__dict__)
    copy.base = tensor
    return copy


@functools.lru_cache(maxsize=4096)
def _unfilled(dtype: torch.dtype, shape: tuple, strides: tuple, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor without its tensor."""
    descriptor = TensorDescriptor(torch.empty(1, dtype=dtype), list(shape), list(strides), [rows, columns])
    descriptor.base = None
    return descriptor


def _launch(call: Int8LinearCall, xq: torch.Tensor, wq: torch.Tensor, y: torch.Tensor, config: dict) -> bool:
    """Returns whether the low-rank term, if any, is in y."""
    M, N, K = call.M, call.N, call.K
    tiles_m = -(-M // config["BLOCK_M"])
    tiles = tiles_m * -(-N // config["BLOCK_N"])
    # Groups of equal size: a rest of few rows would read all weights for little work.
    group_m = -(-tiles_m // -(-tiles_m // config["GROUP_M"]))
    steps = -(-K // config["BLOCK_K"])
    part_steps = -(-steps // configs.parts_along_k(tiles, K, config["num_warps"], call.device))
    parts = -(-steps // part_steps)
    sums = y if parts == 1 else torch.empty((parts, M, N), dtype=torch.int32, device=y.device)
    descriptors = _descriptors(xq, wq, sums, config) if config["TMA"] else None
    low_rank = call.hidden is not None and call.up.shape[1] in RANKS and call.up.element_size() == 2
    fused = low_rank and parts == 1
    _int8_linear_kernel[(tiles, parts)](
        *(descriptors or (xq, wq, sums)),
        call.x_scale.contiguous(),
        call.w_scale.contiguous(),
        None if call.bias is None else call.bias.contiguous(),
        call.hidden.contiguous() if fused else None,
        call.up.contiguous() if fused else None,
        M,
        N,
        K,
        part_steps,
        group_m,
        xq.stride(0),
        wq.stride(0),
        PER_CHANNEL=call.w_scale.numel() > 1,
        SPLIT=parts > 1,
        EVEN_K=K % config["BLOCK_K"] == 0,
        TMA=descriptors is not None,
        RANK=call.up.shape[1] if fused else 0,
        RANK_STEP=min(call.up.shape[1], RANK_STEP) if fused else 0,
        DOT_DTYPE=tl.float32 if interpreted() else None,  # the interpreter has no bf16 products
        **{name: value for name, value in config.items() if name not in ("GROUP_M", "TMA")},
    )
    if parts > 1:
        _add_parts_kernel[(M, -(-N // SUM_BLOCK))](
            sums,
            call.x_scale.contiguous(),
            call.w_scale.contiguous(),
            None if call.bias is None else call.bias.contiguous(),
            y,
            parts,
            M,
            N,
            PER_CHANNEL=call.w_scale.numel() > 1,
            BLOCK=SUM_BLOCK,
        )
    return fused


@triton.jit(do_not_specialize=["M", "part_steps", "group_m"])
def _int8_linear_kernel(
    xq_ptr,
    wq_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    M,
    N,
    K,
    part_steps,
    group_m,
    stride_xm,
    stride_wn,
    PER_CHANNEL: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,  # xq_ptr, wq_ptr and y_ptr are tensor descriptors
    RANK: tl.constexpr,  # of the low-rank term, or 0
    RANK_STEP: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = _tile(M, N, group_m, BLOCK_M, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1) * part_steps * BLOCK_K
    length = tl.minimum(K - first_k, part_steps * BLOCK_K)
    if TMA:
        total = _sum_by_copy_engine(
            xq_ptr, wq_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, first_k, length, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        total = _sum(
            xq_ptr, wq_ptr, m, n, M, N, first_k, length, stride_xm, stride_wn, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
        )
    if SPLIT:
        sum_ptrs = y_ptr + (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
        tl.store(sum_ptrs, total, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        y = _scaled(total, x_scale[:, None], w_scale_ptr, bias_ptr, n, N, PER_CHANNEL)
        if RANK:
            dtype: tl.constexpr = hidden_ptr.dtype.element_ty if DOT_DTYPE is None else DOT_DTYPE
            r = tl.arange(0, RANK_STEP)
            hidden_ptrs = hidden_ptr + m.to(tl.int64)[:, None] * RANK + r[None, :]
            up_ptrs = up_ptr + n[None, :] * RANK + r[:, None]
            for start in range(0, RANK, RANK_STEP):  # a loop, because all operands at once would spill registers
                hidden = tl.load(hidden_ptrs + start, mask=(m < M)[:, None], other=0.0)
                up = tl.load(up_ptrs + start, mask=(n < N)[None, :], other=0.0)
                y = tl.dot(hidden.to(dtype), up.to(dtype), y)
        if TMA:
            y_ptr.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y.to(y_ptr.dtype))
        else:
            y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _sum(
    xq_ptr,
    wq_ptr,
    m,
    n,
    M,
    N,
    first_k,
    length,
    stride_xm,
    stride_wn,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """xq[m, k] @ wq[n, k].T for `length` features from first_k on, int32 [BLOCK_M, BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge read row 0 instead of being masked: their results are not stored.
    x_ptrs = xq_ptr + first_k + tl.where(m < M, m, 0).to(tl.int64)[:, None] * stride_xm + k[None, :]
    # Read as rows of K and transposed in the product. Read as columns, it is the same machine code under Triton 3.6 and
    # 3.7; from 3.8 on, sm_8x then carries operands to the next step byte by byte: 397 spills in 128x256x64, not 0.
    w_ptrs = wq_ptr + first_k + tl.where(n < N, n, 0).to(tl.int64)[:, None] * stride_wn + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, length, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(start + k < length)[None, :], other=0)
            w = tl.load(w_ptrs, mask=(start + k < length)[None, :], other=0)
        total = tl.dot(x, w.T, total, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return total


@triton.jit
def _sum_by_copy_engine(
    xq,
    wq,
    first_m,
    first_n,
    first_k,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`_sum` with operands brought by the bulk copy engine, which fills what lies beyond an edge with zeros."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, length, BLOCK_K):
        x = xq.load([first_m, first_k + start])
        w = wq.load([first_n, first_k + start])
        total = tl.dot(x, w.T, total, out_dtype=tl.int32)
    return total


@triton.jit(do_not_specialize=["parts", "M"])
def _add_parts_kernel(
    sums_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    parts,
    M,
    N,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    sums_ptrs = sums_ptr + m * N + n
    for _ in range(parts):
        total += tl.load(sums_ptrs, mask=n < N, other=0)
        sums_ptrs += M.to(tl.int64) * N
    y = _scaled(total[None, :], tl.load(x_scale_ptr + m), w_scale_ptr, bias_ptr, n, N, PER_CHANNEL)
    tl.store(y_ptr + m * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=(n < N)[None, :])


@triton.jit
def _tile(M, N, group_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile of y that this program computes: down group_m tiles, then right."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group_tiles = group_m * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // group_tiles * group_m
    rows = tl.minimum(tiles_m - first_m, group_m)
    within = tl.program_id(0) % group_tiles
    return first_m + within % rows, within // rows


@triton.jit
def _scaled(total, x_scale, w_scale_ptr, bias_ptr, n, N, PER_CHANNEL: tl.constexpr):
    """The epilogue in float32: total[., n] * x_scale * w_scale[n] + bias[n]."""
    if PER_CHANNEL:
        w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
        y = total.to(tl.float32) * x_scale * w_scale[None, :]
    else:
        y = total.to(tl.float32) * x_scale * tl.load(w_scale_ptr)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y
