"""A tensor a few rows at a time; on the CPU several pieces side by side.

A worker a core, each with a piece of its own and without torch's own threads. Those would share every one of the many
short operations of a quantizer and wait for each other after each: with a core that another program uses, converting
took ten times as long.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .source import row_slices

T = TypeVar("T")

# What a piece of a worker has in elements, and how many there are at most: with the temporaries of the longest
# quantizer 60 MB each.
WORKER_ELEMENTS = 2**20
MAX_WORKERS = 16


def in_pieces(
    compute: Callable[[slice], T], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, T]]:
    """`compute` of slices that cover the rows of a tensor, in their order, each with its slice. device: what computes.

    What `compute` raises is raised here.
    """
    is_cpu = torch.device(device).type == "cpu"
    slices = list(row_slices(shape, WORKER_ELEMENTS if is_cpu else None))
    workers = min(torch.get_num_threads(), MAX_WORKERS, len(slices)) if is_cpu else 1
    if workers < 2:
        yield from ((rows, compute(rows)) for rows in slices)
        return
    compute, begun = torch.inference_mode()(compute), collections.deque()  # a mode counts for its thread alone
    with _workers(workers) as pool:
        for rows in slices:
            begun.append((rows, pool.submit(compute, rows)))
            if len(begun) > workers:  # one more than work at a time, so that none waits for what is done with a piece
                first, result = begun.popleft()
                yield first, result.result()
        for rows, result in begun:
            yield rows, result.result()


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch starts none. Left early, they end after the piece that they are at."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "lowbit_convert", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a thread sets counts for those that start after it
