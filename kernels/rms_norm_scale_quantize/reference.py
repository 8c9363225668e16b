"""xq, s = quantize(x * weight * scale); x_scale = s * rsqrt(mean(x**2) + eps), in float32.

A token's root mean square is one number: it goes into its scale, and the codes are those of the products without it.
Kept values are the products with it, rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks
from ..quantize_per_token.reference import quantize_rows

if TYPE_CHECKING:
    from . import RmsNormScaleQuantizeCall


def supports(call: RmsNormScaleQuantizeCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: RmsNormScaleQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    M, K = call.x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=call.x.device)
    values = torch.empty((M, K) if call.keep_values else (0,), dtype=call.x.dtype, device=call.x.device)
    for tokens in row_chunks(M, K, call.x.device):
        x = call.x[tokens].float()
        products = x * call.weight.float()
        if call.scale is not None:
            products *= rows_of_tokens(call.scale, tokens, M)
        token_factor = inverse_rms(x, call.eps)
        codes, code_scale = quantize_rows(products, call.smooth, call.rotation_group, call.x.dtype)
        xq[tokens], x_scale[tokens] = codes, code_scale * token_factor
        if call.keep_values:
            values[tokens] = products * token_factor
    return xq, x_scale, values


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x[M, K] normalized, in float32 and not rounded."""
    x = x.float()
    return x * inverse_rms(x, eps) * weight.float()


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x**2) + eps) of each token of float32 x [M, K]: [M, 1]."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rows_of_tokens(rows: torch.Tensor, tokens: slice, M: int) -> torch.Tensor:
    """The rows [S, K], one a sample of M // S tokens, that belong to these tokens, float32 [tokens, K]."""
    samples = torch.arange(M, device=rows.device)[tokens] // (M // rows.shape[0])
    return rows[samples].float()
