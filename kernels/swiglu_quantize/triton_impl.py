"""xq, x_scale = quantize(silu(gate) * up): one program a token, held in registers, so both inputs are read once."""

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
    token_constants,
    token_refusal,
    transform_features,
)
from ..rms_norm_scale_quantize.triton_impl import store_features

if TYPE_CHECKING:
    from . import SwigluQuantizeCall


def supports(call: SwigluQuantizeCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    return token_refusal(call.gate, call.rotation_group, HELD_K)


def run(call: SwigluQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = row_major(call.gate), row_major(call.up)
    M, K = gate.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=gate.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=gate.device)
    values = torch.empty((M, K) if call.keep_values else (0,), dtype=gate.dtype, device=gate.device)
    if M:
        with torch.cuda.device_of(gate):
            _swiglu_quantize_kernel[(M,)](
                gate,
                up,
                None if call.smooth is None else call.smooth.contiguous(),
                xq,
                x_scale,
                values if call.keep_values else None,
                gate.stride(0),
                up.stride(0),
                ROTATE=call.rotation_group != 0,
                **token_constants(K),
            )
    return xq, x_scale, values


@triton.jit
def _swiglu_quantize_kernel(
    gate_ptr,
    up_ptr,
    smooth_ptr,
    xq_ptr,
    x_scale_ptr,
    values_ptr,
    stride_gm,
    stride_um,
    K: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    gate_ptr += m * stride_gm
    up_ptr += m * stride_um
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    a = _swiglu(gate_ptr, up_ptr, 0, K, BLOCK_A)
    if values_ptr is not None:
        store_features(values_ptr + m * K, a, 0, K, BLOCK_A)
    a = transform_features(a, smooth_ptr, 0, K, ROTATE, dtype, BLOCK_A, HADAMARD_DTYPE)
    b = a
    if BLOCK_B:
        b = _swiglu(gate_ptr, up_ptr, BLOCK_A, K, BLOCK_B)
        if values_ptr is not None:
            store_features(values_ptr + m * K, b, BLOCK_A, K, BLOCK_B)
        b = transform_features(b, smooth_ptr, BLOCK_A, K, ROTATE, dtype, BLOCK_B, HADAMARD_DTYPE)
    x_scale = scale_of(absmax_of_parts(a, b, BLOCK_A, BLOCK_B))
    tl.store(x_scale_ptr + m, x_scale)
    xq_ptr += m * K
    store_codes(xq_ptr, a, x_scale, 0, K, BLOCK_A)
    if BLOCK_B:
        store_codes(xq_ptr, b, x_scale, BLOCK_A, K, BLOCK_B)


@triton.jit
def _swiglu(gate_ptr, up_ptr, start, K, BLOCK: tl.constexpr):
    gate = load_features(gate_ptr, start, K, BLOCK)
    x = gate / (1.0 + tl.exp(-gate)) * load_features(up_ptr, start, K, BLOCK)
    if gate_ptr.dtype.element_ty == tl.float16:
        x = tl.where(x == x, tl.clamp(x, -65504.0, 65504.0), 0.0)
    return x
