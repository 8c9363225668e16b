"""xq = round(rotate(x * smooth) * (1 / x_scale)), x_scale = max(absmax / 127, 1e-30), in float32, a chunk at a time.

One division a token, not one a feature: a kernel that multiplies by the same reciprocal gives the same codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats.chunks import row_chunks
from ...formats.int8 import rotate, symmetric_scale

if TYPE_CHECKING:
    from . import QuantizePerTokenCall


def supports(call: QuantizePerTokenCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: QuantizePerTokenCall) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = call.x.shape
    xq = torch.empty((M, K), dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty((M, 1), dtype=torch.float32, device=call.x.device)
    for tokens in row_chunks(M, K, call.x.device):
        xq[tokens], x_scale[tokens] = quantize_rows(
            call.x[tokens].float(), call.smooth, call.rotation_group, call.x.dtype
        )
    return xq, x_scale


def quantize_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, rotation_group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [M, K] and scales float32 [M, 1] of float32 values x [M, K].

    dtype: of the activations. If it is bfloat16, what is rotated is rounded to it first, as it is where no op is fused:
    then bf16 operands carry the rotation's first product.
    """
    if smooth is not None:
        x = x * smooth
    if rotation_group:
        x = rotate(x.to(dtype).float() if dtype == torch.bfloat16 else x, rotation_group)
    x_scale = symmetric_scale(x.abs().amax(dim=-1, keepdim=True))
    # The cast of a NaN to int8 is undefined: zero it, the scale already carries it.
    codes = (x * x_scale.reciprocal()).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return codes.to(torch.int8), x_scale
