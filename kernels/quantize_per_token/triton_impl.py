"""xq = round(rotate(x * smooth) * (1 / x_scale)), x_scale = max(absmax / 127, 1e-30): one program a token.

A token of up to HELD_K features stays in registers between finding its scale and rounding, so it is read once. It is
held in two parts, the largest power of two that fits in K and the rest: K = 12288 is 8192 + 4096 and fills its lanes,
where one power of two (16384) would leave a quarter of them idle. A longer token is read twice, the second time from
the L2 cache, by several programs: few tokens would not fill the device otherwise.

The fused producers (RMSNorm, SwiGLU) share the building blocks below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..capability import interpreted, triton_refusal

if TYPE_CHECKING:
    from . import QuantizePerTokenCall

HELD_K = 16384  # beyond, a token spills the registers of one program
LONG_BLOCK = 4096
ROTATION_GROUP = 256

# The interpreter has no bf16 products; float32 ones are exact in its stead.
HADAMARD_DTYPE = tl.float32 if interpreted() else tl.bfloat16


def supports(call: QuantizePerTokenCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.x, call.rotation_group)


def token_refusal(x: torch.Tensor, rotation_group: int, longest_K: int | None = None) -> str | None:
    """What every kernel on tokens x[m, :] refuses, or None. longest_K: the limit of one that must hold the token."""
    if reason := triton_refusal(x.device):
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"reads bf16, fp16 and fp32, found {x.dtype}"
    if longest_K is not None and x.shape[-1] > longest_K:
        return f"holds K up to {longest_K} in registers, found K={x.shape[-1]}"
    if rotation_group not in (0, ROTATION_GROUP):
        return f"rotates groups of {ROTATION_GROUP}, found {rotation_group}"
    return None


def run(call: QuantizePerTokenCall) -> tuple[torch.Tensor, torch.Tensor]:
    x = row_major(call.x)
    M, K = x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    smooth = None if call.smooth is None else call.smooth.contiguous()
    rotate = call.rotation_group != 0
    if M == 0:
        return xq, x_scale
    with torch.cuda.device_of(x):
        if K <= HELD_K:
            _quantize_per_token_kernel[(M,)](
                x, smooth, xq, x_scale, x.stride(0), ROTATE=rotate, enable_fp_fusion=False, **token_constants(K)
            )
        else:
            absmax = torch.zeros((M,), dtype=torch.int32, device=x.device)
            for store in (False, True):
                _quantize_long_token_kernel[(M, triton.cdiv(K, LONG_BLOCK))](
                    x,
                    smooth,
                    absmax,
                    xq,
                    x_scale,
                    K,
                    x.stride(0),
                    STORE=store,
                    ROTATE=rotate,
                    BLOCK=LONG_BLOCK,
                    HADAMARD_DTYPE=HADAMARD_DTYPE,
                    num_warps=8,
                    enable_fp_fusion=False,
                )
    return xq, x_scale


def row_major(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with neighbouring features side by side; tokens may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_constants(K: int) -> dict:
    """The launch constants of a kernel that holds one token of K features: the two parts and the warps.

    About 32 features a thread: fewer leave too few loads in flight, more take registers that further programs need.
    """
    block_a = max(ROTATION_GROUP, 1 << (K.bit_length() - 1))
    num_warps = min(max(block_a // 1024, 1), 16)
    block_b = max(ROTATION_GROUP, triton.next_power_of_2(K - block_a)) if K > block_a else 0
    return {"K": K, "BLOCK_A": block_a, "BLOCK_B": block_b, "HADAMARD_DTYPE": HADAMARD_DTYPE, "num_warps": num_warps}


@triton.jit
def _quantize_per_token_kernel(
    x_ptr,
    smooth_ptr,
    xq_ptr,
    x_scale_ptr,
    stride_xm,
    K: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_xm
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    a = load_features(x_ptr, 0, K, BLOCK_A)
    b = a
    if BLOCK_B:
        b = load_features(x_ptr, BLOCK_A, K, BLOCK_B)
        b = transform_features(b, smooth_ptr, BLOCK_A, K, ROTATE, dtype, BLOCK_B, HADAMARD_DTYPE)
    a = transform_features(a, smooth_ptr, 0, K, ROTATE, dtype, BLOCK_A, HADAMARD_DTYPE)
    scale = scale_of(absmax_of_parts(a, b, BLOCK_A, BLOCK_B))
    tl.store(x_scale_ptr + m, scale)
    xq_ptr += m * K
    store_codes(xq_ptr, a, scale, 0, K, BLOCK_A)
    if BLOCK_B:
        store_codes(xq_ptr, b, scale, BLOCK_A, K, BLOCK_B)


@triton.jit
def _quantize_long_token_kernel(
    x_ptr,
    smooth_ptr,
    absmax_ptr,
    xq_ptr,
    x_scale_ptr,
    K,
    stride_xm,
    STORE: tl.constexpr,  # the second launch, when the first has found every absmax
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = load_features(x_ptr + m * stride_xm, start, K, BLOCK)
    x = transform_features(x, smooth_ptr, start, K, ROTATE, dtype, BLOCK, HADAMARD_DTYPE)
    if STORE:
        scale = scale_of(tl.load(absmax_ptr + m))
        store_codes(xq_ptr + m * K, x, scale, start, K, BLOCK)
        tl.store(x_scale_ptr + m, scale)
    else:
        tl.atomic_max(absmax_ptr + m, absmax_bits(x))


# Building blocks of every kernel that holds a token


@triton.jit
def load_features(ptr, start, K, BLOCK: tl.constexpr):
    """Features start ... start + BLOCK of a token as float32 [BLOCK], zero beyond K."""
    k = start + tl.arange(0, BLOCK)
    if start + BLOCK <= K:  # known at compile time where K is: a mask costs instructions that bound these kernels
        x = tl.load(ptr + k)
    else:
        x = tl.load(ptr + k, mask=k < K, other=0.0)
    return x.to(tl.float32)


@triton.jit
def transform_features(
    x,
    smooth_ptr,
    start,
    K,
    ROTATE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    """x[BLOCK] smoothed, then rotated, in `rotate_features`' shape. DTYPE bfloat16: rounded to that before."""
    if smooth_ptr is not None:
        x *= load_features(smooth_ptr, start, K, BLOCK)
    if ROTATE:
        x = rotate_features(x.to(tl.bfloat16) if DTYPE == tl.bfloat16 else x, BLOCK, HADAMARD_DTYPE)
    return x


@triton.jit
def rotate_features(x, BLOCK: tl.constexpr, HADAMARD_DTYPE: tl.constexpr):
    """x[BLOCK] with each group of 256 multiplied by H256 = kron(H16, H16): float32 [BLOCK // 256, 16, 16].

    A group is a 16 x 16 matrix X, and its product with H256 is H16 X H16. The result of the first product has the
    layout of the second's operand, so nothing is exchanged between threads in between.
    """
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    # The regular H16 = kron(H4, H4) / 4, with -1 where the indices of H4 sum to 3: exact in any float.
    negative = ((i // 4 + j // 4) == 3) != ((i % 4 + j % 4) == 3)
    h = tl.where(negative, -0.25, 0.25).to(HADAMARD_DTYPE)
    h = tl.broadcast_to(h[None, :, :], (BLOCK // 256, 16, 16))
    # Two bfloat16 parts carry 16 bits of a wider value, where rounding to codes needs 9.
    x = tl.reshape(x, (BLOCK // 256, 16, 16))
    high = x.to(HADAMARD_DTYPE)
    y = tl.dot(h, high)
    if x.dtype != tl.bfloat16:
        y = tl.dot(h, (x.to(tl.float32) - high.to(tl.float32)).to(HADAMARD_DTYPE), y)
    high = y.to(HADAMARD_DTYPE)
    z = tl.dot(high, h)
    return tl.dot((y - high.to(tl.float32)).to(HADAMARD_DTYPE), h, z)


@triton.jit
def sum_of_parts(a, b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sum over both parts of a token. b is ignored if BLOCK_B is 0."""
    if BLOCK_A == 2 * BLOCK_B:  # the first folds into the second within each thread, then one exchange does for both
        total = tl.sum(tl.sum(tl.reshape(a, (2, BLOCK_B)), axis=0) + b)
    else:
        total = tl.sum(a)
        if BLOCK_B:
            total += tl.sum(b)
    return total


@triton.jit
def absmax_of_parts(a, b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """`absmax_bits` over both parts of a token, as in `sum_of_parts`."""
    if BLOCK_A == 2 * BLOCK_B:
        a = tl.max(tl.reshape(a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (2, BLOCK_B)), axis=0)
        absmax = tl.max(tl.maximum(a, tl.reshape(b.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (BLOCK_B,))))
    else:
        absmax = absmax_bits(a)
        if BLOCK_B:
            absmax = tl.maximum(absmax, absmax_bits(b))
    return absmax


@triton.jit
def absmax_bits(x):
    """The largest magnitude of a float32 x of any shape, as its bits: they order like magnitudes, NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def scale_of(absmax):
    """x_scale from the bits of absmax. A NaN stays one."""
    value = absmax.to(tl.float32, bitcast=True)
    return tl.where(absmax > 0x7F800000, value, tl.maximum(tl.div_rn(value, 127.0), 1e-30))


@triton.jit
def store_codes(ptr, x, scale, start, K, BLOCK: tl.constexpr):
    """round(x * (1 / scale)) with halves to even, zeros where the scale is not finite. x: BLOCK features, any shape."""
    k = start + tl.arange(0, BLOCK)
    if tl.abs(scale) < float("inf"):
        # 1.5 * 2**23 leaves no fraction bits: adding it rounds, and the low byte of the sum is the code. For the very
        # codes of the reference, product and sum are rounded apart (`enable_fp_fusion` at the launch); a fused producer
        # rounds once, and its codes may differ by one where a value lies halfway.
        # The code is offset by 128, which an integer instruction takes back: the assembler has been seen to convert the
        # sum to an integer, saturating, where its low byte alone is stored.
        code = ((x * tl.div_rn(1.0, scale) + (12582912.0 + 128.0)).to(tl.int32, bitcast=True) ^ 128).to(tl.int8)
        code = tl.reshape(code, (BLOCK,))
        if start + BLOCK <= K:
            tl.store(ptr + k, code)
        else:
            tl.store(ptr + k, code, mask=k < K)
    else:
        tl.store(ptr + k, tl.zeros((BLOCK,), tl.int8), mask=k < K)
