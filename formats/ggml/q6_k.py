"""Q6_K: a super-block of 16 blocks of 16 elements, 6 bits each, with signed scales and no mins: w = d * sc * (q - 32).

Format: `block_q6_K` of ggml (ggml-common.h). 210 bytes:

      0..127  bits 3..0 of q: each half of 64 bytes holds 128 elements, byte i: bbbbaaaa   a: element i, b: i + 64
    128..191  bits 5..4 of q: each half of 32 bytes holds 128 elements, byte i, bits 7..0: ddccbbaa   a: element i,
              b: i + 32, c: i + 64, d: i + 96
    192..207  sc, int8
    208..209  d, float16
"""

from __future__ import annotations

import torch

from .block_type import GgmlType, float16_at, float16_bytes, pack_nibbles, spread_bits
from .columns import by_pieces
from .k_quants import scale_blocks, unpack_two
from .q6_k_search import search

ZERO_CODE = 32  # what a value of 0 is stored as


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 192] (bytes 0..191 of a super-block) -> codes in element order, uint8 [n, 256]."""
    low = spread_bits(packed[:, :128].unflatten(-1, (2, 64)), 4).flatten(1)
    return low | (unpack_two(packed[:, 128:]) << 4)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """The reverse of `unpack_codes`."""
    low = pack_nibbles((codes & 15).unflatten(-1, (2, 2, 64)))
    places = 2 * torch.arange(4, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    high = ((codes >> 4).unflatten(-1, (2, 4, 32)) << places).sum(dim=2, dtype=torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1)), dim=-1)


def dequantize_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    scale = float16_at(blocks, 208) * blocks[:, 192:208].view(torch.int8).to(torch.float32)
    codes = unpack_codes(blocks[:, :192]).to(torch.float32).sub_(float(ZERO_CODE))
    return scale_blocks(codes, scale).flatten(1)


def quantize_q6_k(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Plain least squares by a search, see `q6_k_search.py`; not ggml's bytes.

    That quantizer weights errors by magnitude, and rounds scales for a d that float16 then changes. SQNR in dB on
    tests/golden, ggml's without an importance matrix and this one's: Gaussian rows 35.00 and 35.66, heavy-tailed 32.55
    and 33.13, outlier columns 29.42 and 29.53, constants exact in both, ramp 41.42 and 41.45, absolute values 34.98 and
    35.70, scaled by 1e4 35.05 and 35.74, zero super-block with a lone spike 31.80 and 31.99. Of 400 super-blocks from
    ramps 45.72 and 46.20: the single one of tests/golden is a matter of luck. Small values have a d for which float16
    has few bits: Gaussian ones times 1e-3 have 33.83 and 35.56, times 1e-4 18.91 and 35.49, times 1e-5 0 and 34.5.
    Rows of 1e-7 become zeros in both. With unrounded scales Gaussian rows would gain another 0.18 dB.

    importance: of every element, float32 like `values`, > 0 and near 1 on average; the weight of its squared error.
    For importances exp(s * normal), the weighted error of the Gaussian rows is below ggml's by 0.75 dB at s = 0.3, 0.9
    at s = 0.5, 1.5 at s = 1 and 3.9 at s = 2, that of the rows with outlier columns by 0.1, 0.1, 0.15 and 0.7: most of
    theirs is the error of blocks whose sc is small. No super-block has more weighted error than without importance.
    """
    return by_pieces(_quantize_piece, values, importance)


def _quantize_piece(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    scales, codes = search(values, importance)
    sc = scales.sc.t().to(torch.int8).contiguous().view(torch.uint8)
    return torch.cat((pack_codes(codes), sc, float16_bytes(scales.d.unsqueeze(-1))), dim=-1)


Q6_K = GgmlType("Q6_K", 14, 256, 210, dequantize_q6_k, quantize_q6_k)
