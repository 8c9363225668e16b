"""What smoothing, rotation and protected layers are worth where outliers are known: a model with planted ones.

17 of its 34 feed-forward down-projections have loud input channels. Each variant quantizes the model in its own way,
and its output is compared with that of the float model, on inputs that the record has not seen. `recovered` is the part
of the loss in dB that a variant makes up for: 0 is naive INT8, 1 what naive INT8 loses without the planted channels.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import os
from collections.abc import Iterable, Mapping

import torch

from ..convert.int8 import rotation_group
from ..convert.record import LayerActivations
from ..convert.smoothing import DEFAULT_ALPHA, smoothing_factors
from ..formats import Int8Weight, int8
from ..loaders.policy import linears_worth_quantizing
from .activations import ActivationRecorder
from .fragility import Fragility, rank_layers
from .int8_error import output_sqnr_db, quantized_tokens, weight_values
from .metrics import sqnr_of
from .small_model import SmallModel, noisy_inputs, plant_outliers

LAYERS, PLANTED, TOKENS = 34, 17, 64
LOUDEST, QUIETEST = 200.0, 30.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """smooth, rotate: SmoothQuant folded into the weights, ConvRot. protect: how many fragile layers stay floats."""

    name: str
    smooth: bool = False
    rotate: bool = False
    protect: int = 0


VARIANTS = (
    Variant("naive"),
    Variant("smooth", smooth=True),
    Variant("rotate", rotate=True),
    Variant("protect 4", protect=4),
    Variant("protect 8", protect=8),
    Variant("protect 17", protect=17),
    Variant("smooth + rotate", smooth=True, rotate=True),
    Variant("smooth + rotate + protect 17", smooth=True, rotate=True, protect=17),
)
COLUMNS = ("variant", "protected_layers", "output_sqnr_db", "recovered")


@dataclasses.dataclass(frozen=True)
class Ablation:
    """planted: names of the layers with loud channels. fragility: the ranking of all layers. rows: of the table."""

    planted: list[str]
    fragility: Fragility
    rows: list[dict]

    @property
    def planted_rank_first(self) -> bool:
        return {layer.name for layer in self.fragility.layers[: len(self.planted)]} == set(self.planted)


class Int8Linear(torch.nn.Module):
    def __init__(self, weight: Int8Weight):
        super().__init__()
        self.values, self.rotation_group = weight_values(weight), weight.rotation_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_tokens(x, rotation_group=self.rotation_group) @ self.values.t()


def run(seed: int = 0) -> Ablation:
    """The experiment, on the CPU; the same seed gives the same table."""
    # On one thread: of such small products several would mostly wait for each other, and sums would depend on them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _run(seed)
    finally:
        torch.set_num_threads(threads)


def _run(seed: int) -> Ablation:
    without = SmallModel(LAYERS, seed)
    model = copy.deepcopy(without)
    planted = plant_outliers(model, _strengths(seed), seed=seed)
    recorder = _record(model, noisy_inputs(TOKENS, seed + 1))
    record = recorder.activations()
    fragility = _rank(model, recorder, record)

    inputs = noisy_inputs(TOKENS, seed + 2)
    expected = torch.cat([model(x) for x in inputs])

    def output_db(floats: SmallModel, variant: Variant) -> float:
        quantized = quantize(floats, variant, record, fragility)
        return sqnr_of(expected, torch.cat([quantized(x) for x in inputs]))

    found = {variant: output_db(model, variant) for variant in VARIANTS}
    naive, ceiling = found[VARIANTS[0]], output_db(without, VARIANTS[0])
    rows = [_row(v.name, v.protect, db, (db - naive) / (ceiling - naive)) for v, db in found.items()]
    return Ablation(planted, fragility, [*rows, _row("naive, nothing planted", 0, ceiling, 1.0)])


def quantize(
    model: SmallModel, variant: Variant, record: Mapping[str, LayerActivations], fragility: Fragility
) -> SmallModel:
    """A copy of the model with INT8 layers, made as a conversion makes them."""
    quantized = copy.deepcopy(model)
    weights = quantized.state_dict()  # its own parameters: what is folded into them is folded into the copy
    protected = [layer.name for layer in fragility.layers if layer.name not in fragility.kept][: variant.protect]
    names = [name for name in linears_worth_quantizing(weights) if name not in protected]
    if variant.smooth:
        for key, factors in smoothing_factors(weights, names, record, DEFAULT_ALPHA).items():
            factors.apply(weights[key], slice(None))
    for name in names:
        w = weights[f"{name}.weight"]
        group = rotation_group(w.shape[1]) if variant.rotate else 0
        quantized.set_submodule(name, Int8Linear(int8.quantize_weight(w, rotation_group=group)))
    return quantized


def _strengths(seed: int) -> dict[int, float]:
    """Loud layers and how loud: from LOUDEST down to QUIETEST by equal factors."""
    layers = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed))[:PLANTED].tolist()
    step = (QUIETEST / LOUDEST) ** (1 / (PLANTED - 1))
    return {layer: LOUDEST * step**index for index, layer in enumerate(layers)}


def _record(model: SmallModel, inputs: list[torch.Tensor]) -> ActivationRecorder:
    recorder = ActivationRecorder()
    recorder.attach(model)
    for x in inputs:
        model(x)
    recorder.detach(model)
    return recorder


def _rank(model: SmallModel, recorder: ActivationRecorder, record: Mapping[str, LayerActivations]) -> Fragility:
    shapes = {name: (statistics.N, statistics.K) for name, statistics in recorder.layers.items()}
    errors = {
        name: output_sqnr_db(statistics.sample, model.get_submodule(name).weight)
        for name, statistics in recorder.layers.items()
    }
    return rank_layers(record, shapes, errors, protect_count=PLANTED)


def _row(variant: str, protected: int, output_db: float, recovered: float) -> dict:
    return dict(zip(COLUMNS, (variant, protected, round(output_db, 1), round(recovered, 2)), strict=True))


def as_text(rows: Iterable[dict]) -> str:
    lines = [f"{'variant':<30}{'protected':>10}{'output SQNR, dB':>17}{'recovered':>11}"]
    lines += [
        f"{row['variant']:<30}{row['protected_layers']:>10}{row['output_sqnr_db']:>17.1f}{row['recovered']:>11.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def write_csv(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
