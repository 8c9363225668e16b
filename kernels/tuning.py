"""Which launch configuration a Triton kernel uses here: candidates are measured at first use, winners kept on disk.

A key (an op, its kernel's source, a device, a bucket of M with N, K and dtypes) is looked up in memory, then in a file
in the user's cache folder, one per device and Triton version. A key found in neither is measured, within `BUDGET_S`
seconds for the whole process: the first image waits that long at most, later ones for nothing. The first candidate is
the table's best guess and would be compiled anyway, so its first run does not count. A further candidate is tried only
while the budget holds what it is expected to take; what did not fit then is not tried later, the best of those measured
is stored. A key for which the budget did not reach to compare anything gets the first candidate and is not stored: a
later process, with a budget of its own, can still measure it.

Two environment variables: LOWBIT_TUNING=0 turns all of this off, every kernel then runs with its first candidate and no
file is read or written. LOWBIT_CACHE_DIR names the folder of the files; by default it is `lowbit` in XDG_CACHE_HOME or
~/.cache, on Windows in LOCALAPPDATA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import re
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import kept_memory

logger = logging.getLogger(__name__)

BUDGET_S = 3.0
# A candidate's time is the median of so many runs, fewer where they would take longer than this together.
TIMED_RUNS = 5
TIMED_RUNS_MS = 30.0
SMALLEST_BUCKET, LARGEST_BUCKET = 16, 16384
FORMAT = 1
# Names under which Triton is installed: the usual one, the one for Windows, the one of PyTorch's nightly builds.
TRITON_PACKAGES = ("triton", "triton-windows", "pytorch-triton")

Config = dict[str, int]


@dataclasses.dataclass
class _Process:
    """What this process has found and spent. `repeat_s` is what measuring a candidate took without compiling it."""

    winners: dict[tuple[str, str, torch.device, str], Config] = dataclasses.field(default_factory=dict)
    spent_s: float = 0.0
    slowest_s: float = 0.0
    repeat_s: dict[tuple[Any, ...], float] = dataclasses.field(default_factory=dict)
    warned: set[tuple[str, pathlib.Path]] = dataclasses.field(default_factory=set)


_process = _Process()
_lock = threading.Lock()


def choose(
    op: str,
    source: str,
    device: torch.device,
    key: str,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    tune: bool,
) -> Config:
    """The candidate to launch with, one of `candidates` itself; do not change it.

    source: `source_hash` of the kernel's file. key: whatever else the winner depends on, such as
    "M4096 N13824 K4608 bfloat16"; the same key comes with the same candidates. candidates: best guess first. run:
    launches the kernel once with a configuration; it is called many times and must not mind. tune: False returns the
    first candidate and reads and writes nothing. What the first candidate raises is raised; another that raises is
    dropped. Nothing is measured on the CPU or while a CUDA graph is being captured.
    """
    if not tune or len(candidates) == 1:
        return candidates[0]
    slot = op, source, device, key
    winner = _process.winners.get(slot)
    if winner is None:
        with _lock:
            winner = _process.winners.get(slot)  # another thread may have found it meanwhile
            if winner is None:
                winner = _find(slot, candidates, run)
    return winner


def bucket(M: int) -> int:
    """The power of two at or above M, from 16 to 16384: a new prompt length seldom means a new key."""
    return min(max(SMALLEST_BUCKET, 1 << (M - 1).bit_length()), LARGEST_BUCKET)


def source_hash(*files: str) -> str:
    """A hash of the files that a kernel and its table are written in: winners of other contents do not count."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(pathlib.Path(file).read_bytes())
    return digest.hexdigest()[:16]


def forget() -> None:
    """Back to a fresh process: no winners in memory, a whole budget. For tests."""
    global _process
    with _lock:
        _process = _Process()


def _find(slot: tuple[str, str, torch.device, str], candidates: Sequence[Config], run: Callable) -> Config:
    op, source, device, key = slot
    winner = candidates[0]
    if device.type == "cuda" and os.environ.get("LOWBIT_TUNING") != "0":
        path = _file(device)
        entry = _read(path).get(op)
        stored = entry["keys"].get(key) if entry and entry["source"] == source else None
        if stored in candidates:
            winner = candidates[candidates.index(stored)]
        elif _is_capturing(device):
            return winner  # for this time only
        else:
            with kept_memory.outside_recording():  # it waits for the device
                measured = _measure(slot, candidates, run)
            if measured is not None:
                winner = measured
                _store(path, op, source, key, winner)
    _process.winners[slot] = winner
    return winner


def _measure(slot: tuple[str, str, torch.device, str], candidates: Sequence[Config], run: Callable) -> Config | None:
    """The fastest candidate of those that the budget reaches for, or None if it does not reach for a second one."""
    op, source, device, key = slot
    process = _process
    if process.spent_s >= BUDGET_S:
        return None
    first, *others = candidates
    _synchronize(device)  # what was queued before is no part of tuning
    start = _now()
    run(first)
    _synchronize(device)
    slowest_s = _now() - start  # of this key, compiling included: a slow first run means that the others compile too
    process.slowest_s = max(process.slowest_s, slowest_s)

    def name(config: Config) -> tuple[Any, ...]:
        return op, source, device, *sorted(config.items())

    def fits(config: Config) -> bool:
        expected_s = max(slowest_s, process.repeat_s.get(name(config), process.slowest_s))
        return process.spent_s + expected_s <= BUDGET_S

    def measure(config: Config) -> tuple[float, Config]:
        start = _now()
        time_ms = _measure_ms(run, config, device)
        process.repeat_s[name(config)] = _now() - start
        return time_ms, config

    if not any(fits(config) for config in others):
        return None
    times = [measure(first)]
    process.spent_s += process.repeat_s[name(first)]
    slowest_s += process.repeat_s[name(first)]
    process.slowest_s = max(process.slowest_s, slowest_s)
    tried = 1
    for config in others:
        if not fits(config):
            continue
        start = _now()
        try:
            run(config)
            _synchronize(device)
            times.append(measure(config))
        except Exception as error:  # Triton's own errors, such as too little shared memory, share no base class
            logger.debug("Lowbit: %s, %s: %s is out: %s: %s", op, key, config, type(error).__name__, error)
        took_s = _now() - start
        process.spent_s += took_s
        slowest_s = max(slowest_s, took_s)
        process.slowest_s = max(process.slowest_s, took_s)
        tried += 1
    if tried == 1:
        return None
    time_ms, winner = min(times, key=lambda timed: timed[0])
    logger.info(
        "Lowbit: %s, %s: the fastest of %d configurations is %s, %.3f ms. Tuning took %.2f s so far, of %g s at most.",
        *(op, key, tried, winner, time_ms, process.spent_s, BUDGET_S),
    )
    return winner


def _measure_ms(run: Callable[[Config], None], config: Config, device: torch.device) -> float:
    """Milliseconds of one run by the device's clock; the kernel is compiled already."""
    with torch.cuda.device(device):
        once_ms = _times_ms(run, config, 1)[0]
        runs = min(TIMED_RUNS, int(TIMED_RUNS_MS / max(once_ms, 1e-3)) - 1)
        return statistics.median(_times_ms(run, config, runs)) if runs > 1 else once_ms


def _times_ms(run: Callable[[Config], None], config: Config, runs: int) -> list[float]:
    """Milliseconds of each of some runs queued in a row: only the first can contain waiting for its launch."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run(config)
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _now() -> float:
    return time.perf_counter()


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor}"


def _triton_version() -> str:
    for package in TRITON_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _file(device: torch.device) -> pathlib.Path:
    name = f"tuning {_device_name(device)} triton{_triton_version()}".lower()
    return _cache_folder() / f"{re.sub(r'[^a-z0-9.+]+', '-', name)}.json"


def _cache_folder() -> pathlib.Path:
    if named := os.environ.get("LOWBIT_CACHE_DIR"):
        return pathlib.Path(named)
    windows = sys.platform == "win32"
    if base := os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME"):
        return pathlib.Path(base) / "lowbit"
    try:
        home = pathlib.Path.home()
    except RuntimeError:  # a user without a home folder, as in some containers
        return pathlib.Path(tempfile.gettempdir()) / "lowbit"
    return home.joinpath(*(("AppData", "Local") if windows else (".cache",)), "lowbit")


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The file's winners, {op: {"source": hash, "keys": {key: configuration}}}; none, with a warning, if it is
    damaged."""
    try:
        return _checked(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once("is not a file of tuning results and is ignored, new results will replace it", path, error)
        return {}


def _checked(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'no object with "format": {FORMAT}')
    winners = content.get("winners")
    if not isinstance(winners, dict):
        raise ValueError('"winners" is no object')
    for op, entry in winners.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(f'{op!r} has no "source"')
        keys = entry.get("keys")
        if not isinstance(keys, dict) or not all(map(_is_config, keys.values())):
            raise ValueError(f'the "keys" of {op!r} are no configurations')
    return winners


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int) for number in value.values())


def _store(path: pathlib.Path, op: str, source: str, key: str, winner: Config) -> None:
    """Adds a winner to what the file holds by now, other processes' winners included, and replaces it in one step."""
    winners = _read(path)
    if op not in winners or winners[op]["source"] != source:
        winners[op] = {"source": source, "keys": {}}
    winners[op]["keys"][key] = winner
    text = json.dumps({"format": FORMAT, "winners": winners}, indent=2, sort_keys=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)  # fails on Windows while another process reads the file
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        _warn_once("cannot be written, tuning results hold until this process ends", path, error)


def _warn_once(problem: str, path: pathlib.Path, error: Exception) -> None:
    if (problem, path) not in _process.warned:
        _process.warned.add((problem, path))
        logger.warning("Lowbit: %s %s (%s: %s).", path, problem, type(error).__name__, error)
