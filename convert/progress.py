"""How far a conversion or comparison is, how fast it goes and how long it still takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Progress:
    """stage: what is being done, for people. Bytes done and in all, and seconds since the stage began."""

    stage: str
    done_bytes: int
    total_bytes: int
    elapsed_s: float

    @property
    def rate_bytes_s(self) -> float:
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """None as long as nothing is done."""
        rate = self.rate_bytes_s
        return (self.total_bytes - self.done_bytes) / rate if rate > 0 else None

    def __str__(self) -> str:
        remaining = self.remaining_s
        left = "" if remaining is None else f", {clock(remaining)} left"
        return (
            f"{self.stage}: {size_text(self.done_bytes)} of {size_text(self.total_bytes)}, "
            f"{size_text(self.rate_bytes_s)}/s{left}"
        )


# Called after every part of a file; raising in it cancels the work, which then leaves nothing behind.
Report = Callable[[Progress], None]


class Stage:
    """Counts the bytes of one stage and tells `report`."""

    def __init__(self, name: str, total_bytes: int, report: Report):
        self._name, self._total_bytes, self._report = name, total_bytes, report
        self._done_bytes, self._start = 0, time.monotonic()
        self.advance(0)

    def advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        elapsed_s = time.monotonic() - self._start
        self._report(Progress(self._name, self._done_bytes, self._total_bytes, elapsed_s))


def size_text(size_bytes: float) -> str:
    """`18.6 GB`, `1.07 MB`, `3.40 kB`, `12 bytes`: three digits in the unit that fits, in powers of 1000."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        value = size_bytes / unit
        if value >= 0.9995:  # 1000 of the smaller unit when rounded
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {name}"
    return f"{size_bytes:.0f} bytes"


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
