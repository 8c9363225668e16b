"""Where a call's time goes on the device, and what both branches move to the device when they alternate."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .e2e_host import GB, Host
from .e2e_measure import Sampler

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
PRODUCTS, ATTENTION, FUSED, COPIES, REST = (
    "products",
    "attention",
    "unpacking, quantizing, fused elementwise",
    "copies",
    "the rest",
)
PARTS = (PRODUCTS, ATTENTION, FUSED, COPIES, REST)
# Names of other projects' kernels, in the order in which they are tried.
NAMES = (
    (COPIES, re.compile(r"^mem(cpy|set)", re.I)),
    (ATTENTION, re.compile(r"flash|fmha|attention|attn|sdpa|dot_product", re.I)),
    (
        PRODUCTS,
        re.compile(r"gemm|nvjet|cutlass|xmma|wgmma|cublas|scaled_mm|splitk|matmul|::mma|mm\b|_mm_", re.I),
    ),
    (FUSED, re.compile(r"quant|convrot|hadamard", re.I)),
)
TIMED_CALLS = 3
MOST_KERNELS = 25


@functools.cache
def our_kernels() -> dict[str, str]:
    """The part that each Triton kernel of this pack belongs to, by its name: products come from the linear ops."""
    return {
        kernel: PRODUCTS if path.parent.name.endswith("linear") else FUSED
        for path in KERNELS.glob("*/triton_impl.py")
        for kernel in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.M)
    }


def part_of(kernel: str) -> str:
    """The part of PARTS that a kernel's time counts for."""
    if kernel in our_kernels():
        return our_kernels()[kernel]
    return next((part for part, names in NAMES if names.search(kernel)), REST)


class TimedCalls:
    """Stands in for a model's call: seconds until Python is done with it, and until the device is.

    The call of number `profiled` runs under the profiler instead.
    """

    def __init__(self, host: Host, profiled: int | None = None):
        self.host, self._profiled = host, profiled
        self.python_s, self.wall_s = [], []
        self.profiler = None

    def __call__(self, model, arguments: dict[str, Any]) -> torch.Tensor:
        if len(self.wall_s) == self._profiled:
            return self._profile(model, arguments)
        self.host.synchronize()
        start = time.perf_counter()
        result = model(arguments["input"], arguments["timestep"], **arguments["c"])
        self.python_s.append(time.perf_counter() - start)
        self.host.synchronize()
        self.wall_s.append(time.perf_counter() - start)
        return result

    def _profile(self, model, arguments: dict[str, Any]) -> torch.Tensor:
        self.host.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.host.cuda else [])]
        with torch.profiler.profile(activities=activities) as self.profiler:
            result = model(arguments["input"], arguments["timestep"], **arguments["c"])
            self.host.synchronize()
        return result


def profile(model, sampler: Sampler) -> dict[str, Any]:
    """One conditional call by parts, in milliseconds of the device (of operators on a CPU), and its wall time.

    python_ms: until Python has launched everything; wall_ms: until the device is done. Medians of calls that are not
    profiled.
    """
    calls = TimedCalls(sampler.host, profiled=1 + TIMED_CALLS)
    sampler.conditional(model, 2 + TIMED_CALLS, wrapper=calls)
    kernels = device_times(calls.profiler, sampler.host.cuda)
    return {
        "wall_ms": 1e3 * statistics.median(calls.wall_s[1:]),
        "python_ms": 1e3 * statistics.median(calls.python_s[1:]),
        **by_part(kernels),
    }


def device_times(profiler: torch.profiler.profile, cuda: bool) -> list[tuple[str, int, float]]:
    """(name, count, milliseconds) of every kernel and copy, or of every operator on a CPU."""
    averages = profiler.key_averages()
    if cuda:
        averages = [event for event in averages if "CUDA" in str(event.device_type)]
        return [(event.key, event.count, event.self_device_time_total / 1e3) for event in averages]
    return [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in averages]


def by_part(kernels: Iterable[tuple[str, int, float]]) -> dict[str, Any]:
    """device_ms: of all kernels; parts_ms: of each of PARTS; largest: the kernels that took longest."""
    kernels = sorted((kernel for kernel in kernels if kernel[2] > 0), key=lambda kernel: -kernel[2])
    parts: dict[str, float] = collections.Counter(dict.fromkeys(PARTS, 0.0))
    for name, _, ms in kernels:
        parts[part_of(name)] += ms
    largest = [
        {"kernel": name, "part": part_of(name), "count": count, "ms": ms} for name, count, ms in kernels[:MOST_KERNELS]
    ]
    return {"device_ms": sum(parts.values()), "parts_ms": dict(parts), "largest": largest}


def markdown(name: str, size: int, profiled: dict[str, Any], environment: dict[str, str]) -> str:
    """A profile for people."""
    total = profiled["device_ms"] or 1.0
    lines = [
        f"# One conditional call: {name}, {size}x{size}",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        f"Wall time {profiled['wall_ms']:.1f} ms, Python done after {profiled['python_ms']:.1f} ms, kernels "
        f"{profiled['device_ms']:.1f} ms.",
        "",
        "| Part | ms | Share |",
        "| --- | --- | --- |",
        *(f"| {part} | {ms:.2f} | {ms / total:.1%} |" for part, ms in profiled["parts_ms"].items()),
        "",
        "| ms | Share | Count | Part | Kernel |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kernel in profiled["largest"]:
        text = kernel["kernel"][:120].replace("|", "\\|")
        lines.append(
            f"| {kernel['ms']:.2f} | {kernel['ms'] / total:.1%} | {kernel['count']} | {kernel['part']} | `{text}` |"
        )
    return "\n".join(lines) + "\n"


def alternate(models: tuple, sampler: Sampler, steps: int) -> dict[str, Any]:
    """Calls of both branches in turn, as the guider makes them, each timed by itself, after a step that warms up.

    to_device_gb: what a step copies from the host to the device, weights that do not stay there; None on a CPU.
    """
    host, profiler = sampler.host, None
    calls = TimedCalls(host)
    if host.cuda:
        profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
    with contextlib.ExitStack() as profiling:

        def after_step(step: int) -> None:
            if profiler is not None and step == 0:
                profiling.enter_context(profiler)

        sampler.pair(models, steps=1 + steps, wrapper=calls, after_step=after_step)
    milliseconds = [1e3 * seconds for seconds in calls.wall_s[2:]]
    return {
        "conditional_ms": milliseconds[0::2],
        "unconditional_ms": milliseconds[1::2],
        "to_device_gb": None if profiler is None else bytes_to_device(profiler) / steps / GB,
    }


def bytes_to_device(profiler: torch.profiler.profile) -> int:
    """The bytes of all copies from host to device: only the exported trace has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return trace_bytes_to_device(json.loads(path.read_text(encoding="utf-8")))


def trace_bytes_to_device(trace: dict[str, Any]) -> int:
    events = (event for event in trace["traceEvents"] if event.get("cat") == "gpu_memcpy")
    return sum(event["args"]["bytes"] for event in events if event["name"].startswith("Memcpy HtoD"))
