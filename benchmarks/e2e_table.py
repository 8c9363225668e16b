"""Rows, ratios and demands of a run through ComfyUI, its table and its picture."""

from __future__ import annotations

import collections
import csv
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from . import results
from .e2e_variants import PLAIN_TORCH, PROFILED, REFERENCE, without_extra, without_loras

COLUMNS = (
    *(*results.ENVIRONMENT, "comfyui", "variant", "size", "free_vram_gb"),
    *("load_s", "first_step_s", "step_s", "peak_vram_gb", "peak_ram_gb", "error"),
)
PEERS = (REFERENCE, "stock_fp8_unpacked", "stock_int8")
SIZE_OF_FLOORS = 1024

# What is printed: heading, key, digits. The CSV holds some of it, the JSON file all.
PRINTED = (
    ("load s", "load_s", 1),
    ("first s", "first_step_s", 2),
    ("s/step", "step_s", 3),
    ("1st run", "first_sampling_step_s", 3),
    ("call s", "call_s", 3),
    ("VRAM", "peak_vram_gb", 1),
    ("torch", "torch_allocated_gb", 1),
    ("reserved", "torch_reserved_gb", 1),
    ("RAM", "peak_ram_gb", 1),
    ("anon", "peak_anonymous_ram_gb", 1),
    ("error", "error", 4),
    ("latent", "latent_error", 4),
)


def csv_row(environment: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row; what this machine or this run cannot know stays empty."""
    values = environment | row
    return {column: "" if values[column] is None else values[column] for column in COLUMNS}


# What is asked


@dataclasses.dataclass(frozen=True)
class Demand:
    """A number that has to be at least (or `at_most`) a bound; None where a variant that it needs was not run."""

    text: str
    value: float | None
    bound: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None or math.isnan(self.value):
            return "no rows"
        reached = self.value <= self.bound if self.at_most else self.value >= self.bound
        return "PASS" if reached else "short"

    def line(self, width: int) -> str:
        value = "-" if self.value is None else f"{self.value:.3f}"
        return (
            f"{self.text:{width}}  {value:>7}  {'most' if self.at_most else 'floor'} {self.bound:.2f}  {self.verdict}"
        )


class Measured:
    """The rows of one image size and one amount of free memory, by variant."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self._rows = {row["variant"]: row for row in rows}

    def ratio(self, key: str, over: str, under: str) -> float | None:
        """One variant's number over another's; None where either is missing."""
        above, below = (self._rows.get(name, {}).get(key) for name in (over, under))
        return above / below if above is not None and below else None

    def speedup(self, variant: str, peer: str) -> float | None:
        """How many times faster a step of a variant is than a peer's."""
        return self.ratio("step_s", peer, variant)

    def cost(self, variant: str) -> float | None:
        """What a variant's LoRAs or extra add to a step of its base, as a fraction of that."""
        ratio = self.number("times_base", variant)
        return None if ratio is None else ratio - 1

    def number(self, key: str, variant: str) -> float | None:
        return self._rows.get(variant, {}).get(key)

    def with_loras(self, suffix: str) -> list[str]:
        return [name for name in self._rows if name.startswith("lowbit") and name.endswith(suffix)]


FLOORS = (  # a variant's speed against a peer's
    ("lowbit_int8", "stock_fp8_unpacked", 1.5),
    ("lowbit_int8", "stock_int8", 1.38),
    ("lowbit_q4_k", "stock_fp8_unpacked", 1.4),
    ("lowbit_q4_k", REFERENCE, 1.33),
    ("lowbit_q4_k", PLAIN_TORCH, 2.3),
    ("lowbit_q4_k_exact", REFERENCE, 0.96),
)
ERRORS = (  # a variant's error, as a multiple of a peer's
    ("lowbit_q8_0", "lowbit_q8_0_exact", 1.3),
    ("lowbit_int8", "stock_int8", 1.0),
    ("lowbit_q4_k", "lowbit_q4_k_exact", 1.15),
)
PROFILING_COST = 0.10
LORA_COSTS = (("_lora", 0.08), ("_lora2", 0.14))
CARD_GB, CARD_PEAK_GB = 24, 14.0
SMALL_CARD_GB, Q4_K_ON_SMALL_CARD, INT8_ON_SMALL_CARD = 12, 0.95, 1.2
SLOWEST_LOAD = 1.3  # from a cold file to the end of the first step, without a later step's time; of reading and copying


def demands(
    rows: Sequence[dict[str, Any]],
    size: int,
    free_vram_gb: float | None,
    unlimited: Sequence[dict[str, Any]] = (),
) -> Iterator[Demand]:
    """What a run of one size is to reach; without rows for it there is one demand less or one without a verdict.

    unlimited: the same run's rows of that size with all of the device's memory.
    """
    measured = Measured(rows)
    if size == SIZE_OF_FLOORS and free_vram_gb is None:
        for variant, peer, floor in FLOORS:
            yield Demand(f"speed of {variant} / {peer}", measured.speedup(variant, peer), floor)
        for variant, peer, most in ERRORS:
            yield Demand(f"error of {variant} / {peer}", measured.ratio("error", variant, peer), most, at_most=True)
        for suffix, most in LORA_COSTS:
            for variant in measured.with_loras(suffix) or [f"lowbit_...{suffix}"]:
                yield Demand(f"cost of {variant}, of a step", measured.cost(variant), most, at_most=True)
    if size == SIZE_OF_FLOORS and free_vram_gb == CARD_GB:
        peak = measured.number("peak_vram_gb", "lowbit_q4_k")
        yield Demand("peak VRAM of lowbit_q4_k in GB", peak, CARD_PEAK_GB, at_most=True)
    if size == SIZE_OF_FLOORS and free_vram_gb == SMALL_CARD_GB:
        step, full_step = measured.number("step_s", "lowbit_q4_k"), Measured(unlimited).number("step_s", "lowbit_q4_k")
        speed = None if step is None or full_step is None else full_step / step
        yield Demand("speed of lowbit_q4_k / with all memory", speed, Q4_K_ON_SMALL_CARD)
        yield Demand(
            "speed of lowbit_int8 / stock_int8", measured.speedup("lowbit_int8", "stock_int8"), INT8_ON_SMALL_CARD
        )
    for row in rows:
        if row["variant"].endswith(PROFILED):
            cost = measured.cost(row["variant"])
            yield Demand(f"cost of {row['variant']}, of a step", cost, PROFILING_COST, at_most=True)
        if row["variant"].startswith("lowbit") and row.get("read_and_copy_s"):
            loading = row["cold_load_s"] + row["cold_first_step_s"] - row["step_s"]
            text = f"cold file to first step of {row['variant']} / reading and copying"
            yield Demand(text, loading / row["read_and_copy_s"], SLOWEST_LOAD, at_most=True)


# What is printed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one size: numbers, how many times faster a step is than the peers', and what a variant adds to a step
    of its base (less than nothing where it is faster)."""
    measured = Measured(rows)
    width = max(len(row["variant"]) for row in rows)
    headings = [heading for heading, _, _ in PRINTED] + [f"/{peer.removeprefix('stock_')}" for peer in PEERS]
    headings.append("cost")
    widths = [max(8, len(heading)) for heading in headings]
    lines = [f"{'variant':{width}}  " + "  ".join(f"{h:>{w}}" for h, w in zip(headings, widths, strict=True))]
    for row in rows:
        name = row["variant"]
        cells = [shown(row.get(key), digits) for _, key, digits in PRINTED]
        cells += [shown(measured.speedup(name, peer), 3) for peer in PEERS]
        cost = measured.cost(name)
        cells.append("-" if cost is None else f"{cost:+.1%}")
        lines.append(f"{name:{width}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def verdicts(asked: Sequence[Demand]) -> str:
    width = max(len(demand.text) for demand in asked)
    return "\n".join(demand.line(width) for demand in asked)


# The picture

COLORS = {"stock": "#b0b0b0", "torch": "#e08e2b", "lowbit": "#1f5f9f"}


def fullest_runs(csv_path: pathlib.Path) -> dict[int, dict[str, float]]:
    """Seconds per step by size and variant: for each size the run of the most variants that had all of the device's
    memory; of several that with the most stock ones to compare with, then the newest. Without LoRAs and extras: what
    they add is measured in turn, see `beside_base`."""
    runs: dict[tuple[int, str], dict[str, float]] = collections.defaultdict(dict)
    with csv_path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row["free_vram_gb"] and without_loras(without_extra(row["variant"])) == row["variant"]:
                runs[int(row["size"]), row["date"]][row["variant"]] = float(row["step_s"])

    def worth(steps: dict[str, float]) -> tuple[int, int]:
        return len(steps), sum(name.startswith("stock") for name in steps)

    chosen: dict[int, dict[str, float]] = {}
    for (size, _), steps in sorted(runs.items()):
        if worth(steps) >= worth(chosen.get(size, {})):
            chosen[size] = steps
    return chosen


def draw(csv_path: pathlib.Path, picture: pathlib.Path) -> None:
    """Seconds per step as bars, a panel a size. Needs matplotlib. Raises ValueError where nothing can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = fullest_runs(csv_path)
    if not runs:
        raise ValueError(f"{csv_path} holds no run with all of the device's memory free, there is nothing to draw")
    most = max(len(steps) for steps in runs.values())
    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(6.5 * len(runs), 0.34 * most + 1.2), squeeze=False, layout="constrained"
    )
    for axes, (size, steps) in zip(panels[0], runs.items(), strict=True):
        names = list(steps)[::-1]
        colors = [COLORS[name.partition("_")[0]] for name in names]
        bars = axes.barh(names, [steps[name] for name in names], color=colors)
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        axes.margins(x=0.12)
        axes.set_title(f"Ideogram 4, {size}x{size}: seconds per step of both branches", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
