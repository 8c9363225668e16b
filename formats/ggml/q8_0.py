"""Q8_0: 32 elements under one float16 scale, 8 bits each: w = scale * q.

Format: `block_q8_0` of ggml (ggml-common.h). 34 bytes:

     0..1   scale, float16
     2..33  q of elements 0..31, int8
"""

from __future__ import annotations

import torch

from ..division import divided
from .block_type import GgmlType, float16_at, float16_bytes, inverse_or_zero


def dequantize_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = blocks[:, 2:].view(torch.int8).to(torch.float32)
    return codes.mul_(float16_at(blocks, 0))


def quantize_q8_0(values: torch.Tensor) -> torch.Tensor:
    """Byte for byte what ggml writes: codes come from the float32 scale, before it is rounded to float16."""
    scale = divided(values.abs().amax(dim=-1, keepdim=True), 127.0)
    scaled = values * inverse_or_zero(scale)
    # Halves go away from zero, as C's roundf does; adding 0.5 first would round 0.49999997 up.
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = whole + (magnitude - whole >= 0.5)
    codes = rounded.copysign(scaled).to(torch.int8)
    return torch.cat((float16_bytes(scale), codes.view(torch.uint8)), dim=-1)


Q8_0 = GgmlType("Q8_0", 8, 32, 34, dequantize_q8_0, quantize_q8_0)
