"""Q5_K: Q4_K with a fifth bit: w = d * sc * q - dmin * m.

Format: `block_q5_K` of ggml (ggml-common.h). 176 bytes:

      0..15   d, dmin, sc and m as in Q4_K
     16..47   bit j of byte i is bit 4 of element 32 * j + i
     48..175  bits 3..0, packed as in Q4_K
"""

from __future__ import annotations

import torch

from .block_type import GgmlType, spread_bits
from .columns import by_pieces
from .q4_k import pack_low_bits, pack_scales, unpack_nibbles, unpack_scales
from .scale_min_search import BLOCKS, ELEMENTS, search

LARGEST_CODE = 31


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 160] (bytes 16..175 of a super-block) -> codes in element order, uint8 [n, 256]."""
    return unpack_nibbles(packed[:, 32:]) | (spread_bits(packed[:, :32], 1).flatten(1) << 4)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """The reverse of `unpack_codes`."""
    places = torch.arange(BLOCKS, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    high = ((codes >> 4).unflatten(-1, (BLOCKS, ELEMENTS)) << places).sum(dim=1, dtype=torch.uint8)
    return torch.cat((high, pack_low_bits(codes)), dim=-1)


def dequantize_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = unpack_scales(blocks)
    codes = unpack_codes(blocks[:, 16:]).to(torch.float32).unflatten(-1, (BLOCKS, ELEMENTS))
    return codes.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(1)


def quantize_q5_k(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The search of Q4_K (`scale_min_search.py`) with 31 as the largest code; not ggml's bytes.

    SQNR in dB on tests/golden, ggml's without an importance matrix and this one's: Gaussian rows 28.83 and 29.29,
    heavy-tailed 27.04 and 27.43, outlier columns 25.94 and 26.13, constants 75.07 and 113, 72.25 and 90, ramp 43.19 and
    43.37, absolute values 33.51 and 34.08, scaled by 1e4 29.16 and 29.61, zero super-block with a lone spike 27.52 and
    27.88. With unrounded scales Gaussian rows would gain another 0.35 dB. Starts made for 31 codes gain some rows 0.06
    dB and cost others as much, and four times as many gain 0.08: those of Q4_K serve both.

    importance: as for Q4_K. For importances exp(s * normal), the weighted error of the Gaussian rows is below ggml's by
    0.55 dB at s = 0.3, 0.7 at s = 0.5, 1.3 at s = 1 and 3.8 at s = 2, that of the rows with outlier columns by 0.25,
    0.3, 0.7 and 2.2.
    """
    return by_pieces(_quantize_piece, values, importance)


def _quantize_piece(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    scales, codes = search(values, LARGEST_CODE, importance)
    return torch.cat((pack_scales(scales), pack_codes(codes)), dim=-1)


Q5_K = GgmlType("Q5_K", 13, 256, 176, dequantize_q5_k, quantize_q5_k)
