"""Rows in CSV files that grow run by run, the ratios asked of them, and the README's picture."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
from collections.abc import Iterable, Sequence

import torch

from . import shapes

ENVIRONMENT = ("date", "device", "torch", "triton")


def environment(cpu: str | None = None) -> dict[str, str]:
    """The columns that all rows of one run share: the date tells runs apart. cpu: names the device of a run without a
    GPU, which uses no Triton either."""
    return {
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "device": cpu or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": "none" if cpu else _triton_version(),
    }


def _triton_version() -> str:
    for package in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def check_columns(path: pathlib.Path, columns: Sequence[str]) -> None:
    """Raises ValueError for a file that was written with other columns."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != list(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(found)}; this benchmark writes {', '.join(columns)}. "
            "Move the file away to start a new one."
        )


def append(path: pathlib.Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Rows after those that the file holds. Raises ValueError where its columns, or a row's, are others."""
    check_columns(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            if missing := set(columns) - set(row):
                raise ValueError(f"a row for {path} lacks {', '.join(sorted(missing))}")
            writer.writerow({name: written(value) for name, value in row.items()})


def written(value: object) -> str:
    """A value as the files hold it: floats with five digits."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_latest(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of the last run in a file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["date"] == rows[-1]["date"]]


# What is asked


@dataclasses.dataclass(frozen=True)
class Demand:
    """A ratio and the floor that it has to reach; None for a ratio that has no rows."""

    text: str
    value: float | None
    floor: float

    @property
    def verdict(self) -> str:
        if self.value is None or math.isnan(self.value):
            return "no rows"
        return "PASS" if self.value >= self.floor else "short"


class Times:
    """The milliseconds of a run's rows, by variant and shape."""

    def __init__(self, rows: Iterable[dict]):
        self._ms = {(row["variant"], row["M"], row["N"], row["K"]): float(row["ms"]) for row in rows}

    def tokens(self, N: int, K: int) -> list[int]:
        """The values of M that were measured for a weight [N, K]."""
        return sorted({shape[1] for shape in self._ms if shape[2:] == (N, K)})

    def speedup(self, variant: str, peers: Sequence[str], M: int, N: int, K: int) -> float | None:
        """How many times faster than the fastest of the peers a variant is; None where there is nothing to compare."""
        ours = self._ms.get((variant, M, N, K))
        theirs = [self._ms[peer, M, N, K] for peer in peers if (peer, M, N, K) in self._ms]
        return min(theirs) / ours if ours and theirs else None


def table(demands: Sequence[Demand]) -> str:
    """One line a demand: what, how much, the floor, PASS or short."""
    width = max(len(demand.text) for demand in demands)
    return "\n".join(
        f"{demand.text:{width}}  {'-' if demand.value is None else f'{demand.value:.3f}':>7}"
        f"  floor {demand.floor:.2f}  {demand.verdict}"
        for demand in demands
    )


# The picture

BARS = {
    "fp8_unpacked": ("FP8 unpacked to bf16", "#c9c9c9"),
    "torch_int8": ("torch: quantize + _int_mm", "#9a9a9a"),
    "comfy_kitchen_triton": ("comfy-kitchen, Triton", "#f2c57c"),
    "comfy_kitchen_cuda": ("comfy-kitchen, CUDA", "#e08e2b"),
    "comfy_kitchen_cuda_convrot": ("comfy-kitchen, CUDA, ConvRot", "#a85f10"),
    "lowbit_int8": ("Lowbit", "#5b9bd5"),
    "lowbit_int8_rotated": ("Lowbit, rotated", "#1f5f9f"),
}


def draw(csv_path: pathlib.Path, picture: pathlib.Path) -> None:
    """The last run of int8_linear.csv as bars: speed against bf16, a panel a number of tokens, a group a layer.

    Needs matplotlib. Raises ValueError where the run holds no such rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_latest(csv_path)
    ratios = {
        (row["variant"], int(row["M"]), int(row["N"]), int(row["K"])): float(row["ratio_to_bf16"]) for row in rows
    }
    layers = [layer for layer in shapes.BLOCK_LAYERS if any(shape[2:] == (layer.N, layer.K) for shape in ratios)]
    tokens = sorted({shape[1] for shape in ratios if any(shape[2:] == (layer.N, layer.K) for layer in layers)})
    if not layers:
        raise ValueError(f"{csv_path}: the last run holds none of the block's layers, there is nothing to draw")
    bars = [name for name in BARS if any(shape[0] == name for shape in ratios)]

    figure, panels = pyplot.subplots(
        len(tokens), 1, figsize=(10, 3.4 * len(tokens) + 0.9), sharex=True, squeeze=False, layout="constrained"
    )
    width = 0.85 / max(1, len(bars))
    for axes, M in zip(panels[:, 0], tokens, strict=True):
        for number, name in enumerate(bars):
            label, color = BARS[name]
            heights = [ratios.get((name, M, layer.N, layer.K), math.nan) for layer in layers]
            positions = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(layers))]
            drawn = axes.bar(positions, heights, width, label=label, color=color)
            axes.bar_label(drawn, fmt=lambda ratio: "" if math.isnan(ratio) else f"{ratio:.2f}", fontsize=7)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"M = {M} tokens", fontsize=10)
        axes.set_ylabel("speed, bf16 = 1")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xticks(range(len(layers)), [f"{layer.name}\n{layer.N} x {layer.K}" for layer in layers])
    last = rows[-1]
    figure.suptitle(
        "Linear layers of Ideogram 4, bf16 in and out, activation quantization included\n"
        f"{last['device']}, torch {last['torch']}, triton {last['triton']}",
        fontsize=11,
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
