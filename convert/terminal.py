"""Progress in a terminal or a log file."""

from __future__ import annotations

import sys
import time

from .progress import Progress


class TerminalLine:
    """A `progress.Report`: one line that is written over; in a log file, a line each ten seconds."""

    def __init__(self, stream=sys.stderr):
        self._stream, self._stage, self._next_s = stream, None, 0.0
        self._interval_s = 0.2 if stream.isatty() else 10.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.done_bytes >= progress.total_bytes
        if progress.stage != self._stage:
            self.end()
        elif now < self._next_s and not is_last:
            return
        self._stage, self._next_s = progress.stage, now + self._interval_s
        if self._stream.isatty():
            self._stream.write(f"\r{progress!s:<78}")
        else:
            self._stream.write(f"{progress}\n")
        self._stream.flush()

    def end(self) -> None:
        if self._stage is not None and self._stream.isatty():
            self._stream.write("\n")
        self._stage = None
