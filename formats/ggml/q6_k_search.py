"""What a Q6_K super-block stores for given values: w = d * sc * (q - 32) of least squared error.

Codes here are q - 32, from -32 to 31; scales have signs, so a block's value of largest magnitude may always get -32.

1. Starts: for every block a row of scales. Each gives codes, and those the scale that fits them best. What a start is
   worth follows from two sums over its codes: of code * code and code * value.
2. Eight bits: with those codes held, what another scale loses is a square. A row of d is tried, each with nearest sc.
3. Again from there: new codes, the d that fits all sixteen blocks together, and of the sc near the best ones those
   whose own codes err least. The better one stays.

All of it is arithmetic element by element and sums in a fixed order: threads and chunks do not change a bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .block_type import inverse_or_zero, to_float16
from .columns import as_columns, in_element_order, nearest_float16, sum_in_order

ELEMENTS = 16
SMALLEST_CODE, LARGEST_CODE = -32, 31
SMALLEST_SC, LARGEST_SC = -128, 127

# Starts: which code, without its sign and before rounding and clamping, the value of largest magnitude gets. First that
# by which constants of few bits are exact: of equals the first stays. Steps of 0.4 gain nothing over these.
STARTS = (32.0, *(26.0 + 0.75 * step for step in range(12) if step != 8))
# Where elements differ in importance it may pay to cut off an unimportant largest one.
WEIGHTED_STARTS = (*STARTS, 36.0, 39.0, 43.0, 48.0)
# What the block of largest scale gets as sc, before rounding: one d of each is tried. The small ones are for values so
# small that float16 has no d for larger ones.
SC_OF_LARGEST = (*map(float, range(-128, -96)), -64.0, -32.0, -16.0, -8.0, -4.0, -2.0, -1.0)
# How far from the nearest sc others are tried: values that hardly differ gain up to 0.5 dB by it, others 0.01.
NEARBY_SC = (-1, 1, -2, 2, -3, 3)
# A fit whose error is below this part of the values' squares is exact; what is left of it is rounding.
EXACT = 1e-6


class Scales(NamedTuple):
    """d: float32 [n], exact in float16. sc: float32 [16, n], whole numbers from -128 to 127."""

    d: torch.Tensor
    sc: torch.Tensor

    def of_blocks(self) -> torch.Tensor:
        return self.d * self.sc  # [16, n]


class Fit(NamedTuple):
    """The best scale of each block for its codes; float32 [16, n] each. square: weighted sum of code * code."""

    square: torch.Tensor
    scale: torch.Tensor


class SuperBlocks:
    """Values as columns, [16, 16, n] (element, block, super-block): a sum over a block adds whole rows.

    extreme: a block's value of largest magnitude. most: what a fit can explain of its squares, see EXACT. [16, n] each.
    """

    def __init__(self, values: torch.Tensor, importance: torch.Tensor | None):
        self.values = as_columns(values, ELEMENTS)
        self.weights = None if importance is None else as_columns(importance, ELEMENTS)
        # For codes and their products: fresh memory for each would cost more than the arithmetic.
        self._codes, self._products = torch.empty_like(self.values), torch.empty_like(self.values)
        self._weighted = self.values if self.weights is None else self.values * self.weights
        largest, smallest = self.values.amax(dim=0), self.values.amin(dim=0)
        self.extreme = torch.where(largest > -smallest, largest, smallest)
        self.most = sum_in_order(torch.mul(self.values, self._weighted, out=self._products)) * (1 - EXACT)

    def codes(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest codes, float32 [16, 16, n]; the next call overwrites them."""
        scaled = torch.mul(self.values, inverse_or_zero(scale), out=self._codes)
        return scaled.round_().clamp_(SMALLEST_CODE, LARGEST_CODE)

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        """The weighted squared error of each block, [16, n]."""
        squares = self.codes(scale).mul_(scale).sub_(self.values).square_()
        return sum_in_order(squares if self.weights is None else squares.mul_(self.weights)).clone()

    def sums(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums of code * code and code * value, [16, n] each."""
        codes = self.codes(scale)
        product = sum_in_order(torch.mul(codes, self._weighted, out=self._products)).clone()
        squares = codes.square_()
        return sum_in_order(squares if self.weights is None else squares.mul_(self.weights)).clone(), product


def search(values: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[Scales, torch.Tensor]:
    """Values and their importance, float32 [n, 256] -> scales, and q, uint8 [n, 256]."""
    blind = None if importance is None else search(values)[0]
    blocks = SuperBlocks(values, importance)
    _check_range(blocks)
    scales = _search(blocks)
    if blind is not None:
        scales = _better(blocks, scales, blind)
    return scales, in_element_order(blocks.codes(scales.of_blocks()).sub_(SMALLEST_CODE))


def _check_range(blocks: SuperBlocks) -> None:
    """Raises ValueError where no d of float16 is large enough."""
    to_float16(blocks.extreme.abs() / (SMALLEST_SC * SMALLEST_CODE))  # a power of two: exact on every device


def _search(blocks: SuperBlocks) -> Scales:
    first = _eight_bits(_start(blocks))
    square, product = blocks.sums(first.of_blocks())
    sc = first.sc
    d = nearest_float16(sum_in_order(sc * product) * inverse_or_zero(sum_in_order(sc * sc * square)))
    again = _of_least_error(blocks, d, _nearest_sc(d, product * inverse_or_zero(square)))
    return _better(blocks, again, first)


def _better(blocks: SuperBlocks, new: Scales, old: Scales) -> Scales:
    """Of each super-block the scales of less error; the old ones where they are alike."""
    better = sum_in_order(blocks.error(new.of_blocks())) < sum_in_order(blocks.error(old.of_blocks()))
    return Scales(*(torch.where(better, *pair) for pair in zip(new, old, strict=True)))


def _start(blocks: SuperBlocks) -> Fit:
    most = torch.full_like(blocks.extreme, -1.0)
    best_square, best_product = torch.zeros_like(most), torch.zeros_like(most)
    for code in STARTS if blocks.weights is None else WEIGHTED_STARTS:
        square, product = blocks.sums(blocks.extreme / torch.full_like(blocks.extreme, -code))
        # How much of the values' squares the best scale of these codes explains.
        gain = torch.minimum(product.square() * inverse_or_zero(square), blocks.most)
        better = gain > most
        most = torch.where(better, gain, most)
        best_square = torch.where(better, square, best_square)
        best_product = torch.where(better, product, best_product)
    return Fit(best_square, best_product * inverse_or_zero(best_square))


def _eight_bits(fit: Fit) -> Scales:
    """The d with which eight bits lose least, and the nearest sc."""
    position = fit.scale.abs().max(dim=0, keepdim=True).indices
    sc = torch.tensor(SC_OF_LARGEST, dtype=torch.float32, device=fit.scale.device).unsqueeze(-1)
    d = nearest_float16(fit.scale.gather(0, position) / sc)  # [tries, n]
    loss = _nearest_sc(d.unsqueeze(1), fit.scale).mul_(d.unsqueeze(1)).sub_(fit.scale).square_().mul_(fit.square)
    best = sum_in_order(loss.transpose(0, 1)).min(dim=0, keepdim=True).indices
    d = d.gather(0, best)[0] + 0.0  # a zero has no sign then
    return Scales(d, _nearest_sc(d, fit.scale))


def _of_least_error(blocks: SuperBlocks, d: torch.Tensor, sc: torch.Tensor) -> Scales:
    """Of each block's sc and those near it the one of least error."""
    best, least = sc, blocks.error(d * sc)
    for step in NEARBY_SC:
        other = (sc + step).clamp_(SMALLEST_SC, LARGEST_SC)
        error = blocks.error(d * other)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, other, best)
    return Scales(d, best)


def _nearest_sc(d: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (scale * inverse_or_zero(d)).round_().clamp_(SMALLEST_SC, LARGEST_SC)
