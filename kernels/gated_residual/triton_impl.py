"""x = residual + gate * (y * rsqrt(mean(y**2) + eps) * weight): every tensor is moved once.

A program computes some tokens of one sample and keeps gate * weight for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..quantize_per_token.triton_impl import (
    HELD_K,
    load_features,
    row_major,
    rows_of_program,
    token_constants,
    token_refusal,
)
from ..rms_norm_scale_quantize.triton_impl import inverse_root, load_factor

if TYPE_CHECKING:
    from . import GatedResidualCall


def supports(call: GatedResidualCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.residual, 0, HELD_K)


def run(call: GatedResidualCall) -> torch.Tensor:
    residual, y, gate = row_major(call.residual), row_major(call.y), row_major(call.gate)
    M, K = residual.shape
    x = torch.empty((M, K), dtype=residual.dtype, device=residual.device)
    sample_tokens = M // gate.shape[0]
    rows = rows_of_program(sample_tokens, x.device)
    constants = token_constants(K)
    del constants["HADAMARD_DTYPE"]
    if M:
        with torch.cuda.device_of(x):
            _gated_residual_kernel[(triton.cdiv(sample_tokens, rows), gate.shape[0])](
                residual,
                y,
                call.weight.contiguous(),
                gate,
                x,
                K,
                residual.stride(0),
                y.stride(0),
                gate.stride(0),
                sample_tokens,
                rows,
                call.eps,
                **constants,
            )
    return x


@triton.jit(do_not_specialize=["sample_tokens", "rows"])
def _gated_residual_kernel(
    residual_ptr,
    y_ptr,
    weight_ptr,
    gate_ptr,
    x_ptr,
    K,
    stride_rm,
    stride_ym,
    stride_gate,
    sample_tokens,
    rows,
    eps,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    gate_ptr += tl.program_id(1).to(tl.int64) * stride_gate
    factor_a = load_factor(weight_ptr, gate_ptr, 0, K, BLOCK_A)
    if BLOCK_B:
        factor_b = load_factor(weight_ptr, gate_ptr, BLOCK_A, K, BLOCK_B)
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
        store_features(x_ptr + m * K, residual_a + a * (inverse_rms * factor_a), 0, K, BLOCK_A)
        if BLOCK_B:
            store_features(x_ptr + m * K, residual_b + b * (inverse_rms * factor_b), BLOCK_A, K, BLOCK_B)


@triton.jit
def store_features(ptr, x, start, K, BLOCK: tl.constexpr):
    """Rounds x[BLOCK] to the pointer's dtype and stores it; returns the float32 of what was stored."""
    x = x.to(ptr.dtype.element_ty)
    k = start + tl.arange(0, BLOCK)
    tl.store(ptr + k, x, mask=k < K)
    return x.to(tl.float32)
