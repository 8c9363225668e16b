"""Row chunks, so that the float32 temporaries of a conversion stay small whatever the weight's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def chunk_elements(device: torch.device) -> int:
    """Elements a chunk of float32 has on a device.

    On the CPU 4 MiB: the handful of temporaries of the longest format stays under 64 MiB and near the cache. A GPU pays
    for each of the small kernels instead: 64 MiB there, a quarter of Ideogram 4's largest weight.
    """
    return 1 << (20 if device.type == "cpu" else 24)


def row_chunks(rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most `chunk_elements` elements, or of one row."""
    step = max(1, chunk_elements(device) // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
