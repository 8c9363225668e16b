"""Row chunks, so that the float32 temporaries of a conversion stay small whatever the weight's size."""

from __future__ import annotations

from collections.abc import Iterator

# 4 MiB of float32: the handful of temporaries of the longest format stays under 64 MiB, and near a CPU's cache.
CHUNK_ELEMENTS = 1 << 20


def row_chunks(rows: int, row_elements: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most `CHUNK_ELEMENTS` elements, or of one row."""
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
