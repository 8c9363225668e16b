"""xq, x_scale = quantize(x * rsqrt(mean(x**2) + eps) * weight * scale): one token at a time, held in registers.

The norm's own reduction and the quantizer's run on the same registers, so x is read once and only codes are written. A
program computes some tokens of one sample and keeps weight * scale for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..quantize_per_token.triton_impl import (
    HELD_K,
    absmax_bits,
    load_features,
    row_major,
    rows_of_program,
    scale_of,
    store_codes,
    token_constants,
    token_refusal,
    transform_features,
)

if TYPE_CHECKING:
    from . import RmsNormScaleQuantizeCall


def supports(call: RmsNormScaleQuantizeCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.x, call.rotation_group, HELD_K)


def run(call: RmsNormScaleQuantizeCall) -> tuple[torch.Tensor, torch.Tensor]:
    x = row_major(call.x)
    scale = None if call.scale is None else row_major(call.scale)
    M, K = x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    samples = 1 if scale is None else scale.shape[0]
    sample_tokens = M // samples
    rows = rows_of_program(sample_tokens, x.device)
    if M:
        with torch.cuda.device_of(x):
            _rms_norm_scale_quantize_kernel[(triton.cdiv(sample_tokens, rows), samples)](
                x,
                call.weight.contiguous(),
                scale,
                call.smooth,
                xq,
                x_scale,
                K,
                x.stride(0),
                0 if scale is None else scale.stride(0),
                sample_tokens,
                rows,
                call.eps,
                ROTATE=call.rotation_group != 0,
                **token_constants(K),
            )
    return xq, x_scale


@triton.jit(do_not_specialize=["sample_tokens", "rows"])
def _rms_norm_scale_quantize_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    smooth_ptr,
    xq_ptr,
    x_scale_ptr,
    K,
    stride_xm,
    stride_scale,
    sample_tokens,
    rows,
    eps,
    ROTATE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if scale_ptr is not None:
        scale_ptr += tl.program_id(1).to(tl.int64) * stride_scale
    factor_a = load_factor(weight_ptr, scale_ptr, 0, K, BLOCK_A)
    if BLOCK_B:
        factor_b = load_factor(weight_ptr, scale_ptr, BLOCK_A, K, BLOCK_B)
    first = tl.program_id(0) * rows
    for row in range(first, tl.minimum(first + rows, sample_tokens)):
        m = tl.program_id(1).to(tl.int64) * sample_tokens + row
        a = load_features(x_ptr + m * stride_xm, 0, K, BLOCK_A)
        square_sum = tl.sum(a * a)
        if BLOCK_B:
            b = load_features(x_ptr + m * stride_xm, BLOCK_A, K, BLOCK_B)
            square_sum += tl.sum(b * b)
        inverse_rms = inverse_root(square_sum / K + eps)
        a *= inverse_rms * factor_a
        a = transform_features(a, smooth_ptr, 0, K, ROTATE, dtype, BLOCK_A, HADAMARD_DTYPE)
        absmax = absmax_bits(a)
        if BLOCK_B:
            b *= inverse_rms * factor_b
            b = transform_features(b, smooth_ptr, BLOCK_A, K, ROTATE, dtype, BLOCK_B, HADAMARD_DTYPE)
            absmax = tl.maximum(absmax, absmax_bits(b))
        x_scale = scale_of(absmax)
        tl.store(x_scale_ptr + m, x_scale)
        store_codes(xq_ptr + m * K, a, x_scale, 0, K, BLOCK_A)
        if BLOCK_B:
            store_codes(xq_ptr + m * K, b, x_scale, BLOCK_A, K, BLOCK_B)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), correctly rounded steps: once a token, so exactness costs nothing."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def load_factor(weight_ptr, scale_ptr, start, K, BLOCK: tl.constexpr):
    """weight * scale, the scale optional: the factors of all tokens of a sample."""
    factor = load_features(weight_ptr, start, K, BLOCK)
    if scale_ptr is not None:
        factor *= load_features(scale_ptr, start, K, BLOCK)
    return factor
