"""quantize(x * rsqrt(mean(x**2) + eps) * weight * scale), in float32."""

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


def run(call: RmsNormScaleQuantizeCall) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = call.x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=call.x.device)
    for tokens in row_chunks(M, K, call.x.device):
        values = rms_norm(call.x[tokens], call.weight, call.eps)
        if call.scale is not None:
            values *= rows_of_tokens(call.scale, tokens, M)
        xq[tokens], x_scale[tokens] = quantize_rows(values, call.smooth, call.rotation_group, call.x.dtype)
    return xq, x_scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x[M, K] normalized, in float32 and not rounded."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def rows_of_tokens(rows: torch.Tensor, tokens: slice, M: int) -> torch.Tensor:
    """The rows [S, K], one a sample of M // S tokens, that belong to these tokens, float32 [tokens, K]."""
    samples = torch.arange(M, device=rows.device)[tokens] // (M // rows.shape[0])
    return rows[samples].float()
