"""xq, s = quantize(x * weight * scale), x_scale = s * rsqrt(mean(x**2) + eps): one program a token, held in registers.

The norm's own reduction and the quantizer's run on the same registers and do not wait for each other: the root mean
square goes into the token's scale. x is read once and only codes are written, and the values if they are to be kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..quantize_per_token.triton_impl import (
    HELD_K,
    absmax_of_parts,
    load_features,
    row_major,
    scale_of,
    store_codes,
    sum_of_parts,
    token_constants,
    token_refusal,
    transform_features,
)

if TYPE_CHECKING:
    from . import RmsNormScaleQuantizeCall


def supports(call: RmsNormScaleQuantizeCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.x, call.rotation_group, HELD_K)


def run(call: RmsNormScaleQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = row_major(call.x)
    scale = None if call.scale is None else row_major(call.scale)
    M, K = x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    values = torch.empty((M, K) if call.keep_values else (0,), dtype=x.dtype, device=x.device)
    if M:
        with torch.cuda.device_of(x):
            _rms_norm_scale_quantize_kernel[(M,)](
                x,
                call.weight.contiguous(),
                scale,
                None if call.smooth is None else call.smooth.contiguous(),
                xq,
                x_scale,
                values if call.keep_values else None,
                x.stride(0),
                0 if scale is None else scale.stride(0),
                1 if scale is None else M // scale.shape[0],
                call.eps,
                ROTATE=call.rotation_group != 0,
                **token_constants(K),
            )
    return xq, x_scale, values


@triton.jit(do_not_specialize=["sample_tokens"])
def _rms_norm_scale_quantize_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    smooth_ptr,
    xq_ptr,
    x_scale_ptr,
    values_ptr,
    stride_xm,
    stride_scale,
    sample_tokens,
    eps,
    K: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += m * stride_xm
    if scale_ptr is not None:
        scale_ptr += m // sample_tokens * stride_scale
    a = load_features(x_ptr, 0, K, BLOCK_A)
    b = load_features(x_ptr, BLOCK_A, K, BLOCK_B) if BLOCK_B else a
    square_sum = sum_of_parts(a * a, b * b, BLOCK_A, BLOCK_B)
    a = modulate(a, weight_ptr, scale_ptr, 0, K, BLOCK_A)
    if values_ptr is not None:
        store_features(values_ptr + m * K, a * inverse_root(square_sum / K + eps), 0, K, BLOCK_A)
    a = transform_features(a, smooth_ptr, 0, K, ROTATE, dtype, BLOCK_A, HADAMARD_DTYPE)
    if BLOCK_B:
        b = modulate(b, weight_ptr, scale_ptr, BLOCK_A, K, BLOCK_B)
        if values_ptr is not None:
            store_features(values_ptr + m * K, b * inverse_root(square_sum / K + eps), BLOCK_A, K, BLOCK_B)
        b = transform_features(b, smooth_ptr, BLOCK_A, K, ROTATE, dtype, BLOCK_B, HADAMARD_DTYPE)
    code_scale = scale_of(absmax_of_parts(a, b, BLOCK_A, BLOCK_B))
    tl.store(x_scale_ptr + m, code_scale * inverse_root(square_sum / K + eps))
    store_codes(xq_ptr + m * K, a, code_scale, 0, K, BLOCK_A)
    if BLOCK_B:
        store_codes(xq_ptr + m * K, b, code_scale, BLOCK_A, K, BLOCK_B)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), correctly rounded steps: once a token, so exactness costs nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def modulate(x, weight_ptr, scale_ptr, start, K, BLOCK: tl.constexpr):
    """x[BLOCK] * weight * scale, the scale optional: the same factors for all tokens of a sample, in the L1 cache."""
    x = x * load_features(weight_ptr, start, K, BLOCK)
    if scale_ptr is not None:
        x *= load_features(scale_ptr, start, K, BLOCK)
    return x


@triton.jit
def store_features(ptr, x, start, K, BLOCK: tl.constexpr):
    """Rounds x[BLOCK] to the pointer's dtype and stores it; returns the float32 of what was stored."""
    x = x.to(ptr.dtype.element_ty)
    k = start + tl.arange(0, BLOCK)
    if start + BLOCK <= K:
        tl.store(ptr + k, x)
    else:
        tl.store(ptr + k, x, mask=k < K)
    return x.to(tl.float32)
