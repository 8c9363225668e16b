"""x = residual + gate * norm(y); xq, x_scale = quantize(norm(x) * scale): a token at a time, held in registers.

A program computes some tokens of one sample and keeps both norms' factors for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..gated_residual.triton_impl import store_features
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
from ..rms_norm_scale_quantize.triton_impl import inverse_root, load_factor

if TYPE_CHECKING:
    from . import GatedResidualNormQuantizeCall


def supports(call: GatedResidualNormQuantizeCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.residual, call.rotation_group, HELD_K)


def run(call: GatedResidualNormQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual, y, gate, scale = (row_major(t) for t in (call.residual, call.y, call.gate, call.scale))
    M, K = residual.shape
    x = torch.empty((M, K), dtype=residual.dtype, device=residual.device)
    xq = torch.empty((M, K), dtype=torch.int8, device=residual.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=residual.device)
    sample_tokens = M // gate.shape[0]
    rows = rows_of_program(sample_tokens, x.device)
    if M:
        with torch.cuda.device_of(x):
            _gated_residual_norm_quantize_kernel[(triton.cdiv(sample_tokens, rows), gate.shape[0])](
                residual,
                y,
                call.y_weight.contiguous(),
                gate,
                call.weight.contiguous(),
                scale,
                call.smooth,
                x,
                xq,
                x_scale,
                K,
                residual.stride(0),
                y.stride(0),
                gate.stride(0),
                scale.stride(0),
                sample_tokens,
                rows,
                call.eps,
                ROTATE=call.rotation_group != 0,
                **token_constants(K),
            )
    return x, xq, x_scale


@triton.jit(do_not_specialize=["sample_tokens", "rows"])
def _gated_residual_norm_quantize_kernel(
    residual_ptr,
    y_ptr,
    y_weight_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    smooth_ptr,
    x_ptr,
    xq_ptr,
    x_scale_ptr,
    K,
    stride_rm,
    stride_ym,
    stride_gate,
    stride_scale,
    sample_tokens,
    rows,
    eps,
    ROTATE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    gate_ptr += tl.program_id(1).to(tl.int64) * stride_gate
    scale_ptr += tl.program_id(1).to(tl.int64) * stride_scale
    gate_a = load_factor(y_weight_ptr, gate_ptr, 0, K, BLOCK_A)
    factor_a = load_factor(weight_ptr, scale_ptr, 0, K, BLOCK_A)
    if BLOCK_B:
        gate_b = load_factor(y_weight_ptr, gate_ptr, BLOCK_A, K, BLOCK_B)
        factor_b = load_factor(weight_ptr, scale_ptr, BLOCK_A, K, BLOCK_B)
    first = tl.program_id(0) * rows
    for row in range(first, tl.minimum(first + rows, sample_tokens)):
        m = tl.program_id(1).to(tl.int64) * sample_tokens + row
        a = load_features(y_ptr + m * stride_ym, 0, K, BLOCK_A)
        residual_a = load_features(residual_ptr + m * stride_rm, 0, K, BLOCK_A)
        square_sum = tl.sum(a * a)
        if BLOCK_B:
            b = load_features(y_ptr + m * stride_ym, BLOCK_A, K, BLOCK_B)
            residual_b = load_features(residual_ptr + m * stride_rm, BLOCK_A, K, BLOCK_B)
            square_sum += tl.sum(b * b)
        inverse_rms = inverse_root(square_sum / K + eps)
        a = store_features(x_ptr + m * K, residual_a + a * (inverse_rms * gate_a), 0, K, BLOCK_A)
        square_sum = tl.sum(a * a)
        if BLOCK_B:
            b = store_features(x_ptr + m * K, residual_b + b * (inverse_rms * gate_b), BLOCK_A, K, BLOCK_B)
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
