"""What a Q4_K or Q5_K super-block stores for given values: w = d * sc * q - dmin * m of least squared error.

1. Starts: for every block a grid of scales and mins. Each gives codes q, and those the scale and min that fit them best
   (a line through 32 points). What a start is worth follows from three sums over its codes: of q, q * q, q * value.
2. Nearby: the same around the best scale and min, and at them.
3. Six bits: with those codes held, what another scale and min lose is a quadratic form of the same sums. A grid of d
   and dmin is tried, then the nearest sc and its two neighbours, each with the m that is best beside it.
4. Again from there: new codes, the d and dmin that fit all eight blocks together, sc and m anew. The better one stays.

All of it is arithmetic element by element and sums in a fixed order: threads and chunks do not change a bit.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from .block_type import inverse_or_zero, to_float16
from .columns import as_columns, in_element_order, nearest_float16, sum_in_order

BLOCKS = 8
ELEMENTS = 32
LARGEST_SIX_BITS = 63

# Starts: which codes, before rounding and clamping, the smallest value of a block gets, and how far above the largest
# code that of the largest value lies.
STARTS = tuple(itertools.product((-0.5, -0.1, 0.3, 0.7), (-0.7, -0.3, 0.1, 0.5)))
# Where elements differ in importance it may pay to cut off an unimportant smallest or largest one.
WEIGHTED_STARTS = (*STARTS, (-1.5, 0.3), (-1.5, 1.2), (-0.3, 1.8), (-3.0, 0.3), (-3.0, 2.0))
# By how many codes the two ends move for the second step.
NEARBY = ((0.0, 0.0), *itertools.product((-0.2, 0.2), repeat=2))
# What sc and m a super-block's largest scale and min get, before rounding: one d and dmin of each pair is tried.
SIX_BITS_OF_LARGEST = tuple(itertools.product(map(float, range(63, 55, -1)), (63.0, 62.0, 60.0, 58.0)))
# Codes with a spread below this part of their squares are all alike; what is left of it is rounding.
SMALLEST_SPREAD = 1e-6


class Scales(NamedTuple):
    """d, dmin: float32 [n], exact in float16. sc, m: float32 [8, n], whole numbers from 0 to 63."""

    d: torch.Tensor
    dmin: torch.Tensor
    sc: torch.Tensor
    m: torch.Tensor

    def of_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and min of every block, [8, n] each."""
        return self.d * self.sc, self.dmin * self.m


class Fit(NamedTuple):
    """The best line through each block's values over its codes; float32 [8, n] each.

    code, square, product: weighted sums of q, q * q and q * value.
    mean_code, spread: the weighted mean of q, and the weighted sum of the squared distances from it.
    free_scale: of the best line of all. scale, minimum: of the best one whose min is not negative.
    """

    code: torch.Tensor
    square: torch.Tensor
    product: torch.Tensor
    mean_code: torch.Tensor
    spread: torch.Tensor
    free_scale: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


class SuperBlocks:
    """Values as columns, [32, 8, n] (element, block, super-block): a sum over a block adds whole rows.

    largest_code: 15 in Q4_K, 31 in Q5_K. centered: the values less `mean`, the weighted mean of their block.
    total: a block's sum of weights. low, span: its smallest value or 0, and how far above that its largest one is.
    [8, n] each.
    """

    def __init__(self, values: torch.Tensor, largest_code: int, importance: torch.Tensor | None):
        self.largest_code = largest_code
        columns = as_columns(values, ELEMENTS)
        self.weights = None if importance is None else as_columns(importance, ELEMENTS)
        # For codes and their products: fresh memory for each would cost more than the arithmetic.
        self._codes, self._products = torch.empty_like(columns), torch.empty_like(columns)
        if self.weights is None:
            self.total = torch.full_like(columns[0], ELEMENTS)
            self.mean = sum_in_order(self._products.copy_(columns)) / self.total
        else:
            self._weighted = torch.empty_like(columns)
            self.total = sum_in_order(self._products.copy_(self.weights)).clone()
            self.mean = sum_in_order(torch.mul(columns, self.weights, out=self._products)) / self.total
        self.low = columns.amin(dim=0).clamp_(max=0)
        self.span = columns.amax(dim=0).sub_(self.low)
        self.centered = columns.sub_(self.mean)

    def codes(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """The nearest codes, float32 [32, 8, n]; the next call overwrites them."""
        return self._codes_at(inverse_or_zero(scale), minimum)

    def _codes_at(self, inverse_scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        shifted = torch.add(self.centered, minimum + self.mean, out=self._codes)
        return shifted.mul_(inverse_scale).round_().clamp_(0, self.largest_code)

    def error(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """The weighted squared error of each super-block, [n]."""
        codes = self.codes(scale, minimum)
        squares = codes.mul_(scale).sub_(minimum + self.mean).sub_(self.centered).square_()
        return sum_in_order(sum_in_order(squares if self.weights is None else squares.mul_(self.weights))).clone()

    def sums(self, scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
        """Scales and mins [tries, 8, n] -> weighted sums of q, q * q and q * centered, [3, tries, 8, n]."""
        sums = scales.new_empty((3, *scales.shape))
        for i, (inverse, minimum) in enumerate(zip(inverse_or_zero(scales), minimums, strict=True)):
            codes = weighted = self._codes_at(inverse, minimum)
            if self.weights is not None:
                weighted = torch.mul(codes, self.weights, out=self._weighted)
            sums[1, i] = sum_in_order(torch.mul(weighted, codes, out=self._products))
            sums[2, i] = sum_in_order(torch.mul(weighted, self.centered, out=self._products))
            sums[0, i] = sum_in_order(weighted)
        return sums


def search(
    values: torch.Tensor, largest_code: int, importance: torch.Tensor | None = None
) -> tuple[Scales, torch.Tensor]:
    """Values and their importance, float32 [n, 256] -> scales, and codes uint8 [n, 256]."""
    blind = None if importance is None else search(values, largest_code)[0]
    blocks = SuperBlocks(values, largest_code, importance)
    scales = _search(blocks)
    if blind is not None:
        scales = _better(blocks, scales, blind)
    return scales, in_element_order(blocks.codes(*scales.of_blocks()))


def _search(blocks: SuperBlocks) -> Scales:
    fit = _nearby(blocks, _start(blocks))
    first = _six_bits(blocks, fit, *_units(blocks, fit))
    scale, minimum = first.of_blocks()
    fit = _best_fit(blocks, scale.unsqueeze(0), minimum.unsqueeze(0))
    again = _six_bits(blocks, fit, *_refitted_units(blocks, fit, first))
    return _better(blocks, again, first)


def _better(blocks: SuperBlocks, new: Scales, old: Scales) -> Scales:
    """Of each super-block the scales of less error; the old ones where they are alike."""
    better = blocks.error(*new.of_blocks()) < blocks.error(*old.of_blocks())
    return Scales(*(torch.where(better, *pair) for pair in zip(new, old, strict=True)))


def _start(blocks: SuperBlocks) -> Fit:
    starts = STARTS if blocks.weights is None else WEIGHTED_STARTS
    ends = tuple((low, blocks.largest_code + above) for low, above in starts)
    low_code, high_code = _columns_of(ends, blocks.low.device)
    scales = blocks.span / (high_code - low_code)
    return _best_fit(blocks, scales, (low_code * scales - blocks.low).clamp_(min=0))


def _nearby(blocks: SuperBlocks, fit: Fit) -> Fit:
    low_step, high_step = _columns_of(NEARBY, blocks.low.device)
    scales = fit.scale * (blocks.largest_code / (blocks.largest_code + high_step - low_step))
    return _best_fit(blocks, scales, (fit.minimum + low_step * scales).clamp_(min=0))


def _best_fit(blocks: SuperBlocks, scales: torch.Tensor, minimums: torch.Tensor) -> Fit:
    """Of the codes that scales and mins [tries, 8, n] give, each block's best."""
    sums = blocks.sums(scales, minimums)
    if len(scales) > 1:
        best = _gain(blocks, sums).max(dim=0, keepdim=True).indices
        sums, scales = sums.gather(1, best.expand(3, -1, -1, -1)), scales.gather(0, best)
    code, square, centered_product = sums[:, 0]
    mean_code = code / blocks.total
    spread = square - code * mean_code
    product = centered_product + blocks.mean * code
    # Where all codes are alike any scale fits.
    free_scale = torch.where(spread > SMALLEST_SPREAD * square, centered_product / spread, scales[0])
    minimum = free_scale * mean_code - blocks.mean
    scale = torch.where(minimum < 0, product * inverse_or_zero(square), free_scale).clamp_(min=0)
    return Fit(code, square, product, mean_code, spread, free_scale, scale, minimum.clamp_(min=0))


def _gain(blocks: SuperBlocks, sums: torch.Tensor) -> torch.Tensor:
    """How much of a block's squared distance from its mean the best line with a min >= 0 explains, [tries, 8, n]."""
    code, square, product = sums
    mean_code = code / blocks.total
    spread = (code * mean_code).neg_().add_(square)
    square = square.clamp(min=1e-20)  # codes that are all 0: never 0 / 0, what is no number would win over all others
    free_scale = product / torch.maximum(spread, SMALLEST_SPREAD * square)
    missing = mean_code.mul_(free_scale).sub_(blocks.mean).clamp_(max=0)
    return free_scale.mul_(product).sub_(missing.square_().mul_(blocks.total).mul_(spread.div_(square)))


def _units(blocks: SuperBlocks, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
    """The d and dmin, [n], with which six bits lose least. Raises ValueError where they overflow float16."""
    sc, m = _columns_of(SIX_BITS_OF_LARGEST, fit.scale.device)
    d = to_float16(fit.scale.amax(dim=0) / sc).to(torch.float32)
    dmin = to_float16(fit.minimum.amax(dim=0) / m).to(torch.float32)
    loss, _, _ = _rounded(blocks, fit, d, dmin)
    best = sum_in_order(loss.transpose(0, 1)).min(dim=0, keepdim=True).indices
    return d.squeeze(1).gather(0, best)[0], dmin.squeeze(1).gather(0, best)[0]


def _six_bits(blocks: SuperBlocks, fit: Fit, d: torch.Tensor, dmin: torch.Tensor) -> Scales:
    least, sc, m = _rounded(blocks, fit, d, dmin)
    for step in (-1, 1):
        loss, other_sc, other_m = _rounded(blocks, fit, d, dmin, step)
        better = loss < least
        least = torch.where(better, loss, least)
        sc, m = torch.where(better, other_sc, sc), torch.where(better, other_m, m)
    return Scales(d, dmin, sc, m)


def _rounded(
    blocks: SuperBlocks, fit: Fit, d: torch.Tensor, dmin: torch.Tensor, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For d and dmin [..., n] the sc `step` above the nearest, its best m, and what both lose with the fit's codes."""
    sc = (fit.scale * inverse_or_zero(d)).round_().add_(step).clamp_(0, LARGEST_SIX_BITS)
    scale = sc * d
    minimum = (scale * fit.mean_code).sub_(blocks.mean)  # the best one beside this scale
    m = (minimum * inverse_or_zero(dmin)).round_().clamp_(0, LARGEST_SIX_BITS)
    loss = minimum.sub_(m * dmin).square_().mul_(blocks.total)
    return loss.add_(scale.sub_(fit.free_scale).square_().mul_(fit.spread)), sc, m


def _refitted_units(blocks: SuperBlocks, fit: Fit, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    """The d and dmin, [n], that fit the codes of all eight blocks best beside their sc and m: two linear equations."""
    sc, m = scales.sc, scales.m
    dd, dm, mm = map(sum_in_order, (sc * sc * fit.square, sc * m * fit.code, m * m * blocks.total))
    dx, mx = sum_in_order(sc * fit.product), sum_in_order(m * blocks.mean * blocks.total)
    inverse_mm = inverse_or_zero(mm)
    d = nearest_float16(((dx - dm * mx * inverse_mm) * inverse_or_zero(dd - dm * dm * inverse_mm)).clamp_(min=0))
    return d, nearest_float16(((d * dm - mx) * inverse_mm).clamp_(min=0))


def _columns_of(pairs: tuple[tuple[float, float], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second numbers, float32 [tries, 1, 1] each."""
    first, second = torch.tensor(pairs, dtype=torch.float32, device=device).unbind(dim=1)
    return first.view(-1, 1, 1), second.view(-1, 1, 1)
