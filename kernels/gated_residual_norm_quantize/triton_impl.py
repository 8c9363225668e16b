"""x = residual + gate * norm(y); xq, x_scale = quantize(norm(x) * scale): one program a token, held in registers."""

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
from ..rms_norm_scale_quantize.triton_impl import inverse_root, modulate, store_features

if TYPE_CHECKING:
    from . import GatedResidualNormQuantizeCall


def supports(call: GatedResidualNormQuantizeCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.residual, call.rotation_group, HELD_K)


def run(call: GatedResidualNormQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    residual, y, gate, scale = (row_major(t) for t in (call.residual, call.y, call.gate, call.scale))
    M, K = residual.shape
    x = torch.empty((M, K), dtype=residual.dtype, device=residual.device)
    xq = torch.empty((M, K), dtype=torch.int8, device=residual.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=residual.device)
    values = torch.empty((M, K) if call.keep_values else (0,), dtype=residual.dtype, device=residual.device)
    if M:
        with torch.cuda.device_of(x):
            _gated_residual_norm_quantize_kernel[(M,)](
                residual,
                y,
                call.y_weight.contiguous(),
                gate,
                call.weight.contiguous(),
                scale,
                None if call.smooth is None else call.smooth.contiguous(),
                x,
                xq,
                x_scale,
                values if call.keep_values else None,
                residual.stride(0),
                y.stride(0),
                gate.stride(0),
                scale.stride(0),
                M // gate.shape[0],
                call.eps,
                ROTATE=call.rotation_group != 0,
                **token_constants(K),
            )
    return x, xq, x_scale, values


@triton.jit(do_not_specialize=["sample_tokens"])
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
    values_ptr,
    stride_rm,
    stride_ym,
    stride_gate,
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
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    residual_ptr += m * stride_rm
    y_ptr += m * stride_ym
    gate_ptr += m // sample_tokens * stride_gate
    scale_ptr += m // sample_tokens * stride_scale
    a = load_features(y_ptr, 0, K, BLOCK_A)
    b = load_features(y_ptr, BLOCK_A, K, BLOCK_B) if BLOCK_B else a
    residual_a = load_features(residual_ptr, 0, K, BLOCK_A)
    residual_b = load_features(residual_ptr, BLOCK_A, K, BLOCK_B) if BLOCK_B else a
    inverse_rms = inverse_root(sum_of_parts(a * a, b * b, BLOCK_A, BLOCK_B) / K + eps)
    a = residual_a + modulate(a * inverse_rms, y_weight_ptr, gate_ptr, 0, K, BLOCK_A)
    a = store_features(x_ptr + m * K, a, 0, K, BLOCK_A)
    if BLOCK_B:
        b = residual_b + modulate(b * inverse_rms, y_weight_ptr, gate_ptr, BLOCK_A, K, BLOCK_B)
        b = store_features(x_ptr + m * K, b, BLOCK_A, K, BLOCK_B)
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
