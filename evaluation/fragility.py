"""Which linear layers suffer most from INT8: a ranking by two measures, its table, and what should stay unquantized.

The first measure, the spikiness of a layer's input, comes from the activation record alone. The second, the error of
the layer's output when it alone is quantized, also sees the weights, but only a sample of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..convert.policy import PROTECT_COUNT
from ..convert.record import FragileLayer, LayerActivations
from ..loaders.policy import quantizes
from .names import kind_and_depth
from .picture import Panel

MEASURES = ("spikiness", "output error")


@dataclasses.dataclass(frozen=True)
class Fragility:
    """All layers of a branch, most fragile first.

    by_spikiness, by_error: each layer's rank in either measure, from 1. kept: what a conversion leaves unquantized in
    any case. protected: the most fragile of the others.
    """

    layers: list[FragileLayer]
    by_spikiness: dict[str, int]
    by_error: dict[str, int]
    kept: frozenset[str]
    protected: frozenset[str]

    def most_fragile(self, ranks: Mapping[str, int]) -> set[str]:
        """As many layers as are protected, by one measure."""
        return _first([name for name in sorted(ranks, key=ranks.get) if name not in self.kept], len(self.protected))


def rank_layers(
    record: Mapping[str, LayerActivations],
    shapes: Mapping[str, tuple[int, int]],
    sqnr_db: Mapping[str, float],
    measure: str = MEASURES[0],
    protect_count: int = PROTECT_COUNT,
) -> Fragility:
    """shapes: (N, K) of each layer. sqnr_db: output errors, possibly of some layers only. measure: what decides."""
    layers = [FragileLayer(name, layer.spikiness, sqnr_db.get(name)) for name, layer in record.items()]
    by_spikiness = _ranks(sorted(layers, key=lambda layer: -layer.spikiness))
    by_error = _ranks(sorted((layer for layer in layers if layer.sqnr_db is not None), key=lambda layer: layer.sqnr_db))
    ranks = by_spikiness if measure == MEASURES[0] else by_error
    layers.sort(key=lambda layer: ranks.get(layer.name, len(layers)))
    kept = frozenset(name for name in record if not quantizes(name, *shapes[name]))
    protected = _first([layer.name for layer in layers if layer.name not in kept], protect_count)
    return Fragility(layers, by_spikiness, by_error, kept, frozenset(protected))


def _ranks(layers: Sequence[FragileLayer]) -> dict[str, int]:
    return {layer.name: rank for rank, layer in enumerate(layers, start=1)}


def _first(names: list[str], count: int) -> set[str]:
    return set(names[:count])


def table(fragility: Fragility) -> str:
    """The most fragile layers with both measures, and where the two disagree."""
    count, width = len(fragility.protected), max(len(layer.name) for layer in fragility.layers)
    shown = fragility.layers[: 2 * count + 10]
    lines = [f"{'':<10}{'layer':<{width}}{'spikiness':>11}{'rank':>6}{'error, dB':>11}{'rank':>6}"]
    for layer in shown:
        mark = "protect" if layer.name in fragility.protected else "kept" if layer.name in fragility.kept else ""
        error = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        rank = fragility.by_error.get(layer.name, "-")
        lines.append(
            f"{mark:<10}{layer.name:<{width}}{layer.spikiness:>11.1f}{fragility.by_spikiness[layer.name]:>6}"
            f"{error:>11}{rank:>6}"
        )
    if len(shown) < len(fragility.layers):
        lines.append(f"{'':<10}and {len(fragility.layers) - len(shown)} more, less fragile")
    lines += [
        "",
        "spikiness: the loudest input channel over the median one. error: of the layer's output when it alone is INT8,",
        "signal to noise, lower is worse. protect: should stay unquantized. kept: stays so in any case.",
        *_disagreement(fragility),
    ]
    return "\n".join(lines)


def _disagreement(fragility: Fragility) -> list[str]:
    spiky = fragility.most_fragile(fragility.by_spikiness)
    inexact = fragility.most_fragile(fragility.by_error)
    if not inexact or not spiky or spiky == inexact:
        return []
    count = len(spiky)
    return [
        f"The two measures name different layers as the {count} most fragile:",
        f"  only by spikiness: {', '.join(sorted(spiky - inexact)) or 'none'}",
        f"  only by output error: {', '.join(sorted(inexact - spiky)) or 'none'}",
    ]


def panels(title: str, fragility: Fragility) -> list[Panel]:
    """Both measures by kind of layer and depth, protected layers framed."""
    places = {layer.name: kind_and_depth(layer.name) for layer in fragility.layers}
    framed = {places[name] for name in fragility.protected}
    spiky = {places[layer.name]: layer.spikiness for layer in fragility.layers}
    errors = {places[layer.name]: layer.sqnr_db for layer in fragility.layers if layer.sqnr_db is not None}
    found = [Panel(f"{title}: spikiness of the input (framed: protected)", spiky, framed, logarithmic=True)]
    if errors:
        found.append(Panel(f"{title}: output error of INT8, dB", errors, framed, low_is_bad=True))
    return found
