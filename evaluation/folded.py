"""Smoothing that a conversion folded into the weights, found again: without it, such a file would look wrong.

`convert/smoothing.py` multiplies the input columns of some layers by powers of two and divides what makes these inputs,
a norm weight or rows of another layer, by the same. Here the exponents are read off the norm or the rows, and count
where the columns do not plainly carry others: a damaged norm or row is no smoothing, and is then what shows an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..convert.pieces import in_pieces
from ..convert.smoothing import LARGEST_EXPONENT, Factors, Fold, find_folds
from ..convert.source import floats_of

# A column contradicts an exponent that would leave more than so many times the error of a usual column. One of tiny
# values, which rounding alone changes by a half or more, has at most three times that of one with many steps.
CONTRADICTION = 10.0


def folded_smoothing(
    quantized: Mapping[str, object], source: Mapping[str, object], device: torch.device | str = "cpu"
) -> dict[str, Factors]:
    """What the source's weights were multiplied by before they were quantized, by key; empty without smoothing."""
    found: dict[str, Factors] = {}
    folds = find_folds(source)
    scaled_rows = {fold.producer: fold.first_row for fold in folds}
    for fold in folds:
        keys = [f"{name}.weight" for name in (*fold.consumers, fold.producer)]
        if any(key not in quantized or tuple(quantized[key].shape) != tuple(source[key].shape) for key in keys):
            continue
        exponents = _exponents(quantized, source, fold, found.get(keys[-1]), device)
        if bool(exponents.any()):
            # All readers share their columns' factors. The first one is no producer, but for the rows of V.
            reader = fold.consumers[0]
            exponents = _as_read(quantized, source, reader, scaled_rows.get(reader), exponents, device)
        if not bool(exponents.any()):
            continue
        for key in keys[:-1]:
            found.setdefault(key, Factors()).columns = torch.exp2(exponents)
        producer = found.setdefault(keys[-1], Factors())
        if len(source[keys[-1]].shape) == 1:
            producer.columns = torch.exp2(-exponents)
        else:
            producer.rows = torch.ones(source[keys[-1]].shape[0])
            producer.rows[fold.first_row :] = torch.exp2(-exponents)
    return found


def _exponents(
    quantized: Mapping[str, object],
    source: Mapping[str, object],
    fold: Fold,
    known: Factors | None,
    device: torch.device | str,
) -> torch.Tensor:
    """By what powers of two the producer was divided, [K]: 0 where that cannot be told.

    known: what the producer's own columns were multiplied by, as the reader of an earlier fold.
    """
    key = f"{fold.producer}.weight"
    shape, ratios = tuple(source[key].shape), []
    if len(shape) == 1:
        everything = slice(None)
        ratios.append((floats_of(quantized[key], everything) / floats_of(source[key], everything)).double().flatten())
    else:

        def row_ratios(rows: slice) -> torch.Tensor:
            actual, expected = (floats_of(weights[key], rows, device).double() for weights in (quantized, source))
            if known is not None:
                expected = known.apply(expected, rows)
            return ((actual * expected).sum(dim=1) / expected.square().sum(dim=1)).cpu()

        ratios += (ratio for _, ratio in in_pieces(row_ratios, shape, device))
    ratio = torch.cat(ratios)[fold.first_row :]
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    exponents = -torch.log2(ratio).round()
    # A conversion's exponents have the median 0. What all channels share is damage, such as a scale that is off.
    return (exponents - exponents.median()).float().clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def _as_read(
    quantized: Mapping[str, object],
    source: Mapping[str, object],
    reader: str,
    row_count: int | None,
    exponents: torch.Tensor,
    device: torch.device | str,
) -> torch.Tensor:
    """The exponents, and those of the reader's columns in place of the ones that these columns contradict.

    row_count: of the reader's rows, those from here on carry factors of their own; None if none do.
    """
    key = f"{reader}.weight"
    N, K = source[key].shape

    def column_sums(rows: slice) -> torch.Tensor:
        actual, expected = (floats_of(weights[key], rows, device).double() for weights in (quantized, source))
        return torch.stack(
            [(a * b).sum(dim=0) for a, b in ((actual, actual), (actual, expected), (expected, expected))]
        )

    parts = in_pieces(column_sums, (N if row_count is None else row_count, K), device)
    actual_energy, product, energy = sum(part.cpu() for _, part in parts)

    def error(exponents: torch.Tensor) -> torch.Tensor:
        """Of each column's values against the source's times these powers of two, as energy."""
        return actual_energy - 2 * torch.exp2(exponents) * product + torch.exp2(2 * exponents) * energy

    nearest = torch.log2(product / energy).round()
    smallest_error = error(nearest)
    is_plain = smallest_error < 0.5 * torch.exp2(2 * nearest) * energy
    if not bool(is_plain.any()):
        return exponents
    # Again, what nearly all columns share is damage.
    offsets = (nearest - exponents)[is_plain]
    shared = offsets.median()
    if (offsets == shared).double().mean() < 0.9:
        shared = torch.zeros(())
    is_off = error(exponents + shared) > CONTRADICTION * smallest_error[is_plain].median()
    read = (nearest - shared).float().clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(is_plain & is_off, read, exponents)
