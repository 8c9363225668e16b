"""The one measuring function. Ratios must come from one run under the same conditions, and a GPU slows down under
load: so every variant runs in turn, in rounds, after a common warm-up."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

MOST_CALLS = 4000  # of one batch
GRAPH_CALLS = 64  # at least so many calls in one graph, so that the gap between two replays vanishes


class Clock(Protocol):
    """Marks in the stream of work, and the time between two of them."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def mark(self) -> Any:
        """A mark after the work so far."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""


class CudaClock:
    """Time on the device, by CUDA events."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do the work.

    calls: the same work on different copies of the operands, done in turn. repeats: how often one call does the work.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Measure:
    """Called with variants, gives each one's median milliseconds over the rounds.

    A batch is as many calls as take about `batch_ms`, between two marks and after waiting for all earlier work, so that
    neither the first launch nor a head start of the CPU counts.
    """

    clock: Clock
    rounds: int = 12
    batch_ms: float = 15.0
    warmup_ms: float = 1000.0

    def __call__(self, variants: Sequence[Variant]) -> dict[str, float]:
        turns = {variant.name: itertools.cycle(variant.calls) for variant in variants}
        counts = {}
        for variant in variants:
            self._batch(turns[variant.name], len(variant.calls))  # compiles and tunes
            once = self._batch(turns[variant.name], len(variant.calls)) / len(variant.calls)
            counts[variant.name] = max(1, min(MOST_CALLS, round(self.batch_ms / once)))

        spent = 0.0
        while spent < self.warmup_ms:
            spent += sum(self._batch(turns[variant.name], counts[variant.name]) for variant in variants)

        times: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for number in range(self.rounds):
            # In another order each round: none always runs in the heat of the same predecessor.
            for variant in random.Random(number).sample(variants, len(variants)):
                batch = self._batch(turns[variant.name], counts[variant.name])
                times[variant.name].append(batch / counts[variant.name] / variant.repeats)
        return {name: statistics.median(rounds) for name, rounds in times.items()}

    def _batch(self, calls: itertools.cycle, count: int) -> float:
        self.clock.synchronize()
        start = self.clock.mark()
        for call in itertools.islice(calls, count):
            call()
        return self.clock.elapsed_ms(start, self.clock.mark())


def cycled(function: Callable[..., object], *operands: Sequence[object]) -> list[Callable[[], object]]:
    """Calls of `function` that go through the copies of each operand in turn, as many as the longest has."""
    return [
        functools.partial(function, *(copies[i % len(copies)] for copies in operands))
        for i in range(max(len(copies) for copies in operands))
    ]


def graphed(variant: Variant, name: str) -> Variant:
    """The variant's calls replayed from a CUDA graph: the device's own time, without launching call by call."""
    calls = list(variant.calls) * -(-GRAPH_CALLS // len(variant.calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in variant.calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    # The replay reads the operands of the calls: it has to keep them alive.
    return Variant(name, [functools.partial(_replay, graph, calls)], repeats=len(calls))


def all_graphed(variants: Sequence[Variant]) -> list[Variant]:
    """`<name>_graph` of every variant that can be captured; a line says which cannot."""
    made = []
    for variant in variants:
        try:
            made.append(graphed(variant, f"{variant.name}_graph"))
        except RuntimeError as error:
            print(f"left out: {variant.name}_graph: it cannot be captured: {error}")
    return made


def _replay(graph: torch.cuda.CUDAGraph, calls: Sequence[Callable[[], object]]) -> None:
    graph.replay()


@dataclasses.dataclass(frozen=True)
class Options:
    """What a benchmark is asked to do. tokens: M of the layers that see the whole image, or None for its own choice."""

    measure: Measure
    device: torch.device
    tokens: tuple[int, ...] | None = None
