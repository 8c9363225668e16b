"""Smoothing that a conversion folded into the weights, found again: without it, such a file would look wrong.

`convert/smoothing.py` multiplies the input columns of some layers by powers of two and divides what makes these inputs,
a norm weight or rows of another layer, by the same. Here the exponents are read off the norm or the rows; if the
columns do not agree with them, the layer that reads them shows it as an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..convert.pieces import in_pieces
from ..convert.smoothing import LARGEST_EXPONENT, Factors, Fold, find_folds
from ..convert.source import floats_of


def folded_smoothing(
    quantized: Mapping[str, object], source: Mapping[str, object], device: torch.device | str = "cpu"
) -> dict[str, Factors]:
    """What the source's weights were multiplied by before they were quantized, by key; empty without smoothing."""
    found: dict[str, Factors] = {}
    for fold in find_folds(source):
        keys = [f"{name}.weight" for name in (*fold.consumers, fold.producer)]
        if any(key not in quantized or tuple(quantized[key].shape) != tuple(source[key].shape) for key in keys):
            continue
        exponents = _exponents(quantized, source, fold, found.get(keys[-1]), device)
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
        ratios.append((floats_of(quantized[key], everything) / floats_of(source[key], everything)).flatten())
    else:

        def row_ratios(rows: slice) -> torch.Tensor:
            actual, expected = floats_of(quantized[key], rows, device), floats_of(source[key], rows, device)
            if known is not None:
                expected = known.apply(expected, rows)
            return ((actual * expected).sum(dim=1) / expected.square().sum(dim=1)).cpu()

        ratios += (ratio for _, ratio in in_pieces(row_ratios, shape, device))
    ratio = torch.cat(ratios)[fold.first_row :]
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
    return -torch.log2(ratio).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
