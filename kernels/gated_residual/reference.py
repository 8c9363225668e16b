"""residual + gate * (y * rsqrt(mean(y**2) + eps) * weight), in float32, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks
from ..rms_norm_scale_quantize.reference import rms_norm, rows_of_tokens

if TYPE_CHECKING:
    from . import GatedResidualCall


def supports(call: GatedResidualCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: GatedResidualCall) -> torch.Tensor:
    M, K = call.residual.shape
    x = torch.empty((M, K), dtype=call.residual.dtype, device=call.residual.device)
    for tokens in row_chunks(M, K, x.device):
        branch = rms_norm(call.y[tokens], call.weight, call.eps) * rows_of_tokens(call.gate, tokens, M)
        x[tokens] = (call.residual[tokens].float() + branch).to(x.dtype)
    return x
