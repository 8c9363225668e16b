"""Q4_K: a super-block of 8 blocks of 32 elements, 4 bits each: w = d * sc * q - dmin * m.

Format: `block_q4_K` of ggml (ggml-common.h). 144 bytes; sc and m are 6-bit numbers, one of each a block:

      0..1    d, float16
      2..3    dmin, float16
      4..7    EEaaaaaa FFbbbbbb GGcccccc HHdddddd   a..d: sc of blocks 0..3; EE..HH: bits 5..4 of sc of blocks 4..7
      8..11   MMiiiiii NNjjjjjj OOkkkkkk PPllllll   i..l: m of blocks 0..3; MM..PP: bits 5..4 of m of blocks 4..7
     12..15   mmmmeeee nnnnffff oooogggg pppphhhh   bits 3..0 of sc (e..h) and m (m..p) of blocks 4..7
     16..143  four runs of 32 bytes; run r, byte i: bbbbaaaa   a: element i of block 2r, b: of block 2r + 1
"""

from __future__ import annotations

import torch

from .block_type import GgmlType, float16_at, float16_bytes, pack_nibbles, spread_bits
from .columns import by_pieces
from .scale_min_search import BLOCKS, ELEMENTS, Scales, search

LARGEST_CODE = 15


def unpack_scale_codes(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 12] (bytes 4..15 of a block) -> sc and m, uint8 [n, 8] each."""
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    sc = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), dim=-1)
    m = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), dim=-1)
    return sc, m


def pack_scale_codes(sc: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The reverse of `unpack_scale_codes`."""
    first = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat((first, second, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)), dim=-1)


def unpack_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and min of every block, float32 [n, 8] each, from the first 16 bytes (Q5_K shares them)."""
    sc, m = unpack_scale_codes(blocks[:, 4:16])
    return float16_at(blocks, 0) * sc.to(torch.float32), float16_at(blocks, 2) * m.to(torch.float32)


def pack_scales(scales: Scales) -> torch.Tensor:
    """Scales of n super-blocks -> the first 16 bytes, uint8 [n, 16]."""
    d, dmin = (float16_bytes(unit.unsqueeze(-1)) for unit in (scales.d, scales.dmin))
    sc, m = (six_bits.t().to(torch.uint8) for six_bits in (scales.sc, scales.m))
    return torch.cat((d, dmin, pack_scale_codes(sc, m)), dim=-1)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 128] -> the 4-bit codes in element order, uint8 [n, 256]."""
    return spread_bits(packed.unflatten(-1, (4, 32)), 4).flatten(1)


def pack_low_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bits 3..0 of codes: the reverse of `unpack_nibbles`."""
    return pack_nibbles((codes & 15).unflatten(-1, (BLOCKS // 2, 2, ELEMENTS))).flatten(1)


def dequantize_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = unpack_scales(blocks)
    codes = unpack_nibbles(blocks[:, 16:]).to(torch.float32).unflatten(-1, (BLOCKS, ELEMENTS))
    # Two rounded steps, product then difference, as the C library does without fused multiply-add.
    return codes.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(1)


def quantize_q4_k(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Plain least squares by a search, see `scale_min_search.py`; not ggml's bytes.

    That quantizer weights errors by magnitude and rounds scale and min apart. SQNR in dB on tests/golden, ggml's
    without an importance matrix and this one's: Gaussian rows 22.97 and 23.22, heavy-tailed 21.05 and 21.35, outlier
    columns 21.43 and 21.76, constants 68.95 and 111, 72.25 and 90, ramp 37.54 and 37.67, absolute values 27.34 and
    27.81, scaled by 1e4 22.94 and 23.21, zero super-block with a lone spike 20.91 and 21.34. Rows of 1e-7 become zeros
    in both: their scale underflows float16. With unrounded scales Gaussian rows would gain another 0.07 dB.

    importance: of every element, float32 like `values`, > 0 and near 1 on average; the weight of its squared error.
    For importances exp(s * normal), the weighted error of the Gaussian rows is below ggml's by 0.3 dB at s = 0.3, 0.45
    at s = 0.5, 1.2 at s = 1 and 4.7 at s = 2, that of the rows with outlier columns by 0.4, 0.45, 0.8 and 2.9. Without
    importance it would be by 0.24 dB; at s = 0.3 not even unrounded scales would gain another 0.2. No super-block has
    more weighted error than without importance.
    """
    return by_pieces(_quantize_piece, values, importance)


def _quantize_piece(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    scales, codes = search(values, LARGEST_CODE, importance)
    return torch.cat((pack_scales(scales), pack_low_bits(codes)), dim=-1)


Q4_K = GgmlType("Q4_K", 12, 256, 144, dequantize_q4_k, quantize_q4_k)
