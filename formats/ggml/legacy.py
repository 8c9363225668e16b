"""Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 elements with float16 scales; the 4-bit part is packed alike in all four.

Formats: `block_q4_0`, `block_q4_1`, `block_q5_0`, `block_q5_1` of ggml (ggml-common.h).

    Q4_0, 18 bytes: scale | nibbles             w = scale * (q - 8)
    Q4_1, 20 bytes: scale | offset | nibbles    w = scale * q + offset
    Q5_0, 22 bytes: scale | high | nibbles      w = scale * (q - 16)
    Q5_1, 24 bytes: scale | offset | high | nibbles   w = scale * q + offset

    scale, offset   float16, 2 bytes each (the offset is signed, and added)
    nibbles         16 bytes; byte i, bits 7..0:  bbbbaaaa   a: element i, b: element i + 16
    high            4 bytes; bit j of byte i is bit 4 of element 8 * i + j

The quantizers write what ggml's reference code writes, byte for byte: codes come from the float32 scale, before it is
rounded to float16, and are cut off after adding a half.
"""

from __future__ import annotations

import torch

from ..division import divided
from .block_type import GgmlType, float16_at, float16_bytes, inverse_or_zero, pack_nibbles, spread_bits


def _low_codes(nibbles: torch.Tensor) -> torch.Tensor:
    return spread_bits(nibbles, 4).flatten(1)  # [n, 32]


def _high_bits(high: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> bit 4 of every element, 0 or 16, uint8 [n, 32]."""
    return (spread_bits(high, 1).transpose(1, 2) << 4).flatten(1)


def dequantize_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _low_codes(blocks[:, 2:]).to(torch.float32).sub_(8.0)
    return codes.mul_(float16_at(blocks, 0))


def dequantize_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _low_codes(blocks[:, 4:]).to(torch.float32)
    return codes.mul_(float16_at(blocks, 0)).add_(float16_at(blocks, 2))


def dequantize_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _low_codes(blocks[:, 6:]) | _high_bits(blocks[:, 2:6])
    return codes.to(torch.float32).sub_(16.0).mul_(float16_at(blocks, 0))


def dequantize_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _low_codes(blocks[:, 8:]) | _high_bits(blocks[:, 4:8])
    return codes.to(torch.float32).mul_(float16_at(blocks, 0)).add_(float16_at(blocks, 2))


def _pack_low(codes: torch.Tensor) -> torch.Tensor:
    return pack_nibbles((codes & 15).unflatten(-1, (2, 16)))


def _pack_high(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n, 32] -> their bits 4, uint8 [n, 4]."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).unflatten(-1, (4, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def _symmetric_codes(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale [n, 1] and codes [n, 32]: the element of largest magnitude gets code 0, whatever its sign."""
    position = values.abs().argmax(dim=-1, keepdim=True)
    scale = values.gather(-1, position) / -(levels // 2)
    codes = (values * inverse_or_zero(scale) + (levels // 2 + 0.5)).trunc_().clamp_(0, levels - 1)
    return scale, codes.to(torch.uint8)


def _offset_codes(values: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale [n, 1], offset [n, 1] and codes [n, 32]: codes run from the smallest element to the largest."""
    offset = values.amin(dim=-1, keepdim=True)
    scale = divided(values.amax(dim=-1, keepdim=True) - offset, levels - 1)
    codes = ((values - offset) * inverse_or_zero(scale) + 0.5).trunc_().clamp_(0, levels - 1)
    return scale, offset, codes.to(torch.uint8)


def quantize_q4_0(values: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(values, 16)
    return torch.cat((float16_bytes(scale), _pack_low(codes)), dim=-1)


def quantize_q4_1(values: torch.Tensor) -> torch.Tensor:
    scale, offset, codes = _offset_codes(values, 16)
    return torch.cat((float16_bytes(scale), float16_bytes(offset), _pack_low(codes)), dim=-1)


def quantize_q5_0(values: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(values, 32)
    return torch.cat((float16_bytes(scale), _pack_high(codes), _pack_low(codes)), dim=-1)


def quantize_q5_1(values: torch.Tensor) -> torch.Tensor:
    scale, offset, codes = _offset_codes(values, 32)
    return torch.cat((float16_bytes(scale), float16_bytes(offset), _pack_high(codes), _pack_low(codes)), dim=-1)


Q4_0 = GgmlType("Q4_0", 2, 32, 18, dequantize_q4_0, quantize_q4_0)
Q4_1 = GgmlType("Q4_1", 3, 32, 20, dequantize_q4_1, quantize_q4_1)
Q5_0 = GgmlType("Q5_0", 6, 32, 22, dequantize_q5_0, quantize_q5_0)
Q5_1 = GgmlType("Q5_1", 7, 32, 24, dequantize_q5_1, quantize_q5_1)
