"""x = residual + gate * (y * rsqrt(mean(y**2) + eps) * weight): one program a token, every tensor is moved once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..quantize_per_token.triton_impl import (
    HELD_K,
    load_features,
    row_major,
    sum_of_parts,
    token_constants,
    token_refusal,
)
from ..rms_norm_scale_quantize.triton_impl import inverse_root, modulate, store_features

if TYPE_CHECKING:
    from . import GatedResidualCall


def supports(call: GatedResidualCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.residual, 0, HELD_K)


def run(call: GatedResidualCall) -> torch.Tensor:
    residual, y, gate = row_major(call.residual), row_major(call.y), row_major(call.gate)
    M, K = residual.shape
    x = torch.empty((M, K), dtype=residual.dtype, device=residual.device)
    constants = token_constants(K)
    del constants["HADAMARD_DTYPE"]
    if M:
        with torch.cuda.device_of(x):
            _gated_residual_kernel[(M,)](
                residual,
                y,
                call.weight.contiguous(),
                gate,
                x,
                residual.stride(0),
                y.stride(0),
                gate.stride(0),
                M // gate.shape[0],
                call.eps,
                **constants,
            )
    return x


@triton.jit(do_not_specialize=["sample_tokens"])
def _gated_residual_kernel(
    residual_ptr,
    y_ptr,
    weight_ptr,
    gate_ptr,
    x_ptr,
    stride_rm,
    stride_ym,
    stride_gate,
    sample_tokens,
    eps,
    K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    residual_ptr += m * stride_rm
    y_ptr += m * stride_ym
    gate_ptr += m // sample_tokens * stride_gate
    a = load_features(y_ptr, 0, K, BLOCK_A)
    b = load_features(y_ptr, BLOCK_A, K, BLOCK_B) if BLOCK_B else a
    # Loaded before the exchange between threads, so that both are on their way at the same time.
    residual_a = load_features(residual_ptr, 0, K, BLOCK_A)
    residual_b = load_features(residual_ptr, BLOCK_A, K, BLOCK_B) if BLOCK_B else a
    inverse_rms = inverse_root(sum_of_parts(a * a, b * b, BLOCK_A, BLOCK_B) / K + eps)
    a = residual_a + modulate(a * inverse_rms, weight_ptr, gate_ptr, 0, K, BLOCK_A)
    store_features(x_ptr + m * K, a, 0, K, BLOCK_A)
    if BLOCK_B:
        b = residual_b + modulate(b * inverse_rms, weight_ptr, gate_ptr, BLOCK_A, K, BLOCK_B)
        store_features(x_ptr + m * K, b, BLOCK_A, K, BLOCK_B)
