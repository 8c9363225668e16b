"""Q2_K, Q3_K: super-blocks of 256 elements whose block scales are themselves quantized. Read only.

Formats: `block_q2_K`, `block_q3_K` of ggml (ggml-common.h). Two-bit fields named `two` lie
in 64 bytes: each half of 32 bytes holds 128 elements, byte i of a half, bits 7..0: ddccbbaa with a: element i,
b: i + 32, c: i + 64, d: i + 96.

    Q2_K, 84 bytes, 16 blocks of 16: w = d * sc * two - dmin * m
          0..15   byte k: mmmmssss   s: sc of block k, m: its m
         16..79   two
         80..81   d, float16        82..83  dmin, float16

    Q3_K, 110 bytes, 16 blocks of 16: w = d * (six - 32) * (two + 4 * high - 4)
          0..31   high: bit j of byte i belongs to element 32 * j + i
         32..95   two
         96..103  bits 3..0 of six: byte k: bbbbaaaa   a: block k, b: block k + 8
        104..107  bits 5..4 of six: byte k: ddccbbaa   a: block k, b: k + 4, c: k + 8, d: k + 12
        108..109  d, float16
"""

from __future__ import annotations

import torch

from .block_type import GgmlType, float16_at, spread_bits


def unpack_two(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 64] -> [n, 256]."""
    return spread_bits(packed.unflatten(-1, (2, 32)), 2).flatten(1)


def scale_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 codes [n, 256] times the scale of each block [n, blocks], in place, as [n, blocks, elements]."""
    blocks = scale.shape[1]
    return codes.unflatten(-1, (blocks, 256 // blocks)).mul_(scale.unsqueeze(-1))


def dequantize_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scale = float16_at(blocks, 80) * (blocks[:, :16] & 15).to(torch.float32)
    minimum = float16_at(blocks, 82) * (blocks[:, :16] >> 4).to(torch.float32)
    codes = unpack_two(blocks[:, 16:80]).to(torch.float32)
    return scale_blocks(codes, scale).sub_(minimum.unsqueeze(-1)).flatten(1)


def dequantize_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = spread_bits(blocks[:, 96:104], 4).flatten(1)
    high = spread_bits(blocks[:, 104:108], 2).flatten(1)
    six = (low | (high << 4)).to(torch.float32).sub_(32.0)
    codes = unpack_two(blocks[:, 32:96]) | (spread_bits(blocks[:, :32], 1).flatten(1) << 2)
    return scale_blocks(codes.to(torch.float32).sub_(4.0), float16_at(blocks, 108) * six).flatten(1)


Q2_K = GgmlType("Q2_K", 10, 256, 84, dequantize_q2_k)
Q3_K = GgmlType("Q3_K", 11, 256, 110, dequantize_q3_k)
