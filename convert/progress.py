"""How far a conversion is, how fast it goes and how long it still takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

GB = 1e9


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
            f"{self.stage}: {self.done_bytes / GB:.2f} of {self.total_bytes / GB:.2f} GB, "
            f"{self.rate_bytes_s / 1e6:.0f} MB/s{left}"
        )


# Called after every part of a file; raising in it cancels the conversion, which then leaves nothing behind.
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


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
