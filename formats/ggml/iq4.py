"""IQ4_NL and IQ4_XS: 4-bit codes that index a fixed table of 16 unevenly spaced values, w = scale * TABLE[q].

Formats: `block_iq4_nl`, `block_iq4_xs` of ggml (ggml-common.h). The table is ggml's `kvalues_iq4nl`.

    IQ4_NL, 18 bytes, 32 elements:
         0..1    scale, float16
         2..17   byte i: bbbbaaaa   a: element i, b: element i + 16

    IQ4_XS, 136 bytes, a super-block of 8 blocks of 32 elements; the scale of block k is d * (six - 32):
         0..1    d, float16
         2..3    bits 5..4 of six:  DDCCBBAA HHGGFFEE     A: block 0 .. H: block 7
         4..7    bits 3..0 of six:  bbbbaaaa ddddcccc ffffeeee hhhhgggg
         8..135  16 bytes a block, packed as in IQ4_NL
"""

from __future__ import annotations

import torch

from .block_type import GgmlType, float16_at, spread_bits

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _look_up(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(TABLE, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)


def dequantize_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _look_up(spread_bits(blocks[:, 2:], 4).flatten(1)).mul_(float16_at(blocks, 0))


def dequantize_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    high = spread_bits(blocks[:, 2:4], 2).transpose(1, 2).flatten(1)
    low = spread_bits(blocks[:, 4:8], 4).transpose(1, 2).flatten(1)
    six = (low | (high << 4)).to(torch.float32).sub_(32.0)
    scale = (float16_at(blocks, 0) * six).unsqueeze(-1)  # [n, 8, 1]
    codes = spread_bits(blocks[:, 8:].unflatten(-1, (8, 16)), 4).flatten(2)  # [n, 8, 32]
    return _look_up(codes).mul_(scale).flatten(1)


IQ4_NL = GgmlType("IQ4_NL", 20, 32, 18, dequantize_iq4_nl)
IQ4_XS = GgmlType("IQ4_XS", 23, 256, 136, dequantize_iq4_xs)
