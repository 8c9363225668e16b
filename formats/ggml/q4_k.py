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

import itertools

import torch

from .block_type import GgmlType, float16_at, float16_bytes, inverse_or_zero, pack_nibbles, spread_bits

BLOCKS = 8
ELEMENTS = 32


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


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 128] -> the 4-bit codes in element order, uint8 [n, 256]."""
    return spread_bits(packed.unflatten(-1, (4, 32)), 4).flatten(1)


def dequantize_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = unpack_scales(blocks)
    codes = unpack_nibbles(blocks[:, 16:]).to(torch.float32).unflatten(-1, (BLOCKS, ELEMENTS))
    # Two rounded steps, product then difference, as the C library does without fused multiply-add.
    return codes.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(1)


def _codes(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The nearest codes, float32: values [..., 32], scale and minimum [..., 1]."""
    return ((values + minimum) * inverse_or_zero(scale)).round_().clamp_(0, 15)


def _sum(terms: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The sum over the last dimension, [..., 1], each term times its weight."""
    return (terms if weights is None else terms * weights).sum(dim=-1, keepdim=True)


def _error(
    values: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    return _sum((codes * scale).sub_(minimum).sub_(values).square_(), weights)


# How far beyond the plain range, in codes, the search stretches a block before it fits scale and min to the codes.
SEARCH_STRETCH = (-1.0, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8, 1.1, 1.4)
# Where elements differ in importance it may pay to cut off an unimportant largest or smallest one: further stretches,
# and the part of the lower end that is cut off before.
WEIGHTED_STRETCH = (*SEARCH_STRETCH, 2.2, 3.5)
WEIGHTED_CUT = (0.0, 0.2)


def _fit_blocks(values: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., 32] -> the scale and min [..., 1] of least weighted squared error found: both >= 0, not yet rounded."""
    low = values.amin(dim=-1, keepdim=True).clamp_(max=0)
    span = values.amax(dim=-1, keepdim=True).sub_(low)
    scale, minimum = span / 15, -low
    best = _error(values, _codes(values, scale, minimum), scale, minimum, weights)
    count = ELEMENTS if weights is None else weights.sum(dim=-1, keepdim=True)
    x_sum = _sum(values, weights)
    search = itertools.product((0.0,), SEARCH_STRETCH)
    if weights is not None:
        search = itertools.product(WEIGHTED_CUT, WEIGHTED_STRETCH)
    for cut, stretch in search:
        q = _codes(values, span / (15 + stretch), low * (cut - 1))
        q_sum = _sum(q, weights)
        qq_sum = _sum(q * q, weights)
        qx_sum = _sum(q * values, weights)
        # Least squares of x = scale * q - min for these codes; where min would turn negative, of x = scale * q.
        fit_scale = (count * qx_sum - q_sum * x_sum) / (count * qq_sum - q_sum * q_sum)
        fit_minimum = (fit_scale * q_sum - x_sum) / count
        fit_scale = torch.where(fit_minimum < 0, qx_sum / qq_sum, fit_scale)
        fit_minimum = fit_minimum.clamp_(min=0)
        error = _error(values, q, fit_scale, fit_minimum, weights)
        # Equal codes make the fit 0 / 0; both comparisons are then false and the earlier pair stays.
        better = (error < best) & (fit_scale > 0)
        scale = torch.where(better, fit_scale, scale)
        minimum = torch.where(better, fit_minimum, minimum)
        best = torch.where(better, error, best)
    return scale, minimum


def _round_scales(
    values: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    d: torch.Tensor,
    dmin: torch.Tensor,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """6-bit sc and m, float32 [n, 8, 1]: of the nearest pair and its eight neighbours that of least squared error."""
    nearest_sc = (scale * inverse_or_zero(d)).round_().clamp_(0, 63)
    nearest_m = (minimum * inverse_or_zero(dmin)).round_().clamp_(0, 63)
    sc, m, best = nearest_sc, nearest_m, torch.full_like(scale, torch.inf)
    # The nearest pair comes first, so that it wins ties.
    for step_sc, step_m in sorted(((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)), key=lambda step: step != (0, 0)):
        try_sc, try_m = (nearest_sc + step_sc).clamp_(0, 63), (nearest_m + step_m).clamp_(0, 63)
        block_scale, block_minimum = d * try_sc, dmin * try_m
        error = _error(values, _codes(values, block_scale, block_minimum), block_scale, block_minimum, weights)
        better = error < best
        sc, m = torch.where(better, try_sc, sc), torch.where(better, try_m, m)
        best = torch.where(better, error, best)
    return sc, m


def quantize_q4_k(values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Plain least squares: a search over stretched ranges, then over the rounding of each block's scale and min.

    Not ggml's bytes: that quantizer weights errors by magnitude and rounds scale and min apart. SQNR in dB on
    tests/golden, ggml's without an importance matrix and this one's: Gaussian rows 22.97 and 23.11, heavy-tailed 21.05
    and 21.25, outlier columns 21.43 and 21.71, constants 68.95 and 72.25 alike, ramp 37.54 and 37.57, its absolute
    value 27.34 and 27.38, scaled by 1e4 22.94 and 23.05, zero super-block with a lone spike 20.91 and 21.21. Rows of
    1e-7 become zeros in both: their scale underflows float16.

    importance: of every element, float32 like `values`, > 0 and near 1 on average; the weight of its squared error.
    Against none, for importances exp(s * normal), the weighted error of the Gaussian and heavy-tailed rows falls by
    0.2 dB at s = 0.5, 0.8 dB at s = 1 and 3.4 dB at s = 2, that of the rows with outlier columns by 0.05, 0.2 and 1.3.
    A super-block whose weighted error would rise is quantized without it: blocks are fitted before their scale and min
    are rounded to 6 bits, and where one element outweighs its block, that rounding alone decides how near it comes.
    """
    plain = _quantized(values, None)
    if importance is None:
        return plain
    weighted = _quantized(values, importance)
    better = _weighted_error(values, weighted, importance) <= _weighted_error(values, plain, importance)
    return torch.where(better, weighted, plain)


def _weighted_error(values: torch.Tensor, blocks: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of each super-block, [n, 1]."""
    return _sum(dequantize_q4_k(blocks).sub_(values).square_(), importance)


def _quantized(values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    values = values.unflatten(-1, (BLOCKS, ELEMENTS))
    weights = None if importance is None else importance.unflatten(-1, (BLOCKS, ELEMENTS))
    scale, minimum = _fit_blocks(values, weights)
    d_bytes = float16_bytes(scale.amax(dim=1) / 63)
    dmin_bytes = float16_bytes(minimum.amax(dim=1) / 63)
    d, dmin = float16_at(d_bytes, 0).unsqueeze(-1), float16_at(dmin_bytes, 0).unsqueeze(-1)
    sc, m = _round_scales(values, scale, minimum, d, dmin, weights)
    codes = _codes(values, d * sc, dmin * m).to(torch.uint8)
    packed = pack_nibbles(codes.unflatten(1, (BLOCKS // 2, 2))).flatten(1)
    scale_codes = pack_scale_codes(sc.squeeze(-1).to(torch.uint8), m.squeeze(-1).to(torch.uint8))
    return torch.cat((d_bytes, dmin_bytes, scale_codes, packed), dim=-1)


Q4_K = GgmlType("Q4_K", 12, 256, 144, dequantize_q4_k, quantize_q4_k)
