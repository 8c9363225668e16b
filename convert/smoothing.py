"""SmoothQuant without cost: activations are divided by powers of two, folded exactly into the weights that make them.

A linear layer's input channel j is divided by f[j] and column j of its weight multiplied by it, which moves outliers of
the activations into the weight. What produces the input is divided in its place, in a transformer block of the NextDiT
family (Ideogram 4, Lumina 2, Z-Image):

    attention.qkv               <- attention_norm1.weight         (modulation multiplies after it, and commutes)
    attention.o, attention.out  <- the rows of attention.qkv that make V: attention is linear in V, channel by channel
    feed_forward.w1, .w3        <- ffn_norm1.weight
    feed_forward.w2             <- the rows of feed_forward.w3: w2(silu(w1 x) * w3 x)

Powers of two change exponents alone, so the folded model computes the same numbers (short of overflow and underflow).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from .pieces import in_pieces
from .record import LayerActivations
from .source import floats_of

DEFAULT_ALPHA = 0.5
# Factors from 2^-8 to 2^8 around the layer's median: more would only carry one channel's noise into others.
LARGEST_EXPONENT = 8

# Consumers, the module whose rows or norm weight make their input, both without the block's prefix. V is the last
# third of qkv's rows.
_FOLDS = (
    (("attention.qkv",), "attention_norm1"),
    (("attention.o", "attention.out"), "attention.qkv"),
    (("feed_forward.w1", "feed_forward.w3"), "ffn_norm1"),
    (("feed_forward.w2",), "feed_forward.w3"),
)
_MARKS = ("attention_norm1", "ffn_norm1", "attention.qkv", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


@dataclasses.dataclass(frozen=True)
class Fold:
    """One producer and the linear layers that read it. first_row: of the producer's rows, where theirs start."""

    consumers: tuple[str, ...]
    producer: str
    first_row: int


@dataclasses.dataclass
class Factors:
    """What a weight [N, K] is multiplied by: rows [N] and columns [K], powers of two; None for ones."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """Multiply these rows of the weight, float32, in place."""
        if self.rows is not None:
            values *= self.rows[rows].to(values.device).unsqueeze(1)
        if self.columns is not None:
            values *= self.columns.to(values.device)
        return values


def find_folds(weights: Mapping[str, object]) -> list[Fold]:
    """The folds of all blocks whose names and shapes are those of the family."""
    marks = _MARKS[0] + ".weight"
    prefixes = [key.removesuffix(marks) for key in weights if key.endswith(marks)]
    folds = []
    for prefix in prefixes:
        if not all(f"{prefix}{mark}.weight" in weights for mark in _MARKS):
            continue
        for names, producer in _FOLDS:
            consumers = tuple(prefix + name for name in names if f"{prefix}{name}.weight" in weights)
            fold = _checked_fold(weights, consumers, prefix + producer)
            if fold is not None:
                folds.append(fold)
    return folds


def _checked_fold(weights: Mapping[str, object], consumers: tuple[str, ...], producer: str) -> Fold | None:
    shapes = {tuple(weights[f"{name}.weight"].shape[1:]) for name in consumers}
    shape = tuple(weights[f"{producer}.weight"].shape)
    if len(shapes) != 1 or len(shape) > 2 or f"{producer}.bias" in weights:
        return None
    (K,) = shapes.pop()
    # Shared heads (GQA) have fewer rows of V than inputs of the output projection.
    parts = 3 if producer.endswith("attention.qkv") else 1
    return Fold(consumers, producer, (parts - 1) * K) if shape[0] == parts * K else None


def smoothing_factors(
    weights: Mapping[str, object],
    quantized: Iterable[str],
    record: Mapping[str, LayerActivations],
    alpha: float,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda elements: None,
) -> dict[str, Factors]:
    """Factors by weight key, for every fold of which a consumer is among the `quantized` modules.

    record: one that fits the model (`record.check_record`); a fold of which it lacks a consumer is left out. advance:
    hears of every weight read, in elements. Raises ValueError when no fold is left.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"the alpha of smoothing is between 0 and 1, found {alpha}")
    quantized, factors = set(quantized), {}
    folds = [fold for fold in find_folds(weights) if quantized & set(fold.consumers)]
    if not folds:
        raise ValueError(
            "smoothing has nothing to fold into: none of the layers to quantize is in a block as Ideogram 4, Lumina 2 "
            "and Z-Image have it. Convert without an activation record."
        )
    covered = [fold for fold in folds if all(consumer in record for consumer in fold.consumers)]
    if not covered:
        raise ValueError(
            f"the activation record lacks all layers that can be smoothed, such as {folds[0].consumers[0]}. Record the "
            "activations of the whole model, or convert without an activation record."
        )
    for fold in covered:
        exponents = _exponents(weights, fold, record, alpha, device)
        for consumer in fold.consumers:
            factors.setdefault(f"{consumer}.weight", Factors()).columns = torch.exp2(exponents)
            advance(math.prod(weights[f"{consumer}.weight"].shape))
        producer = f"{fold.producer}.weight"
        inverse = torch.exp2(-exponents)
        if len(weights[producer].shape) == 1:
            factors.setdefault(producer, Factors()).columns = inverse
        else:
            rows = torch.ones(weights[producer].shape[0])
            rows[fold.first_row :] = inverse
            factors.setdefault(producer, Factors()).rows = rows
    return factors


def _exponents(
    weights: Mapping[str, object],
    fold: Fold,
    record: Mapping[str, LayerActivations],
    alpha: float,
    device: torch.device | str,
) -> torch.Tensor:
    """The powers of two nearest to absmax(x)^alpha / absmax(w)^(1 - alpha), as exponents [K] around their median."""
    K = weights[f"{fold.consumers[0]}.weight"].shape[1]
    x_max, w_max = torch.zeros(K), torch.zeros(K, device=device)
    for consumer in fold.consumers:
        x_max = torch.maximum(x_max, record[consumer].absmax)
        weight = weights[f"{consumer}.weight"]
        for _, part_max in in_pieces(partial(_column_max, weight, device=device), tuple(weight.shape), device):
            w_max = torch.maximum(w_max, part_max)
    w_max = w_max.cpu()
    used = (x_max > 0) & (w_max > 0)
    exponents = torch.zeros(K)
    exponents[used] = alpha * torch.log2(x_max[used]) - (1 - alpha) * torch.log2(w_max[used])
    if bool(used.any()):
        exponents[used] -= exponents[used].median()
    return exponents.round_().clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def _column_max(weight: object, rows: slice, device: torch.device | str) -> torch.Tensor:
    """The largest magnitude in each column of some rows, [K]."""
    return floats_of(weight, rows, device).abs().amax(dim=0)
