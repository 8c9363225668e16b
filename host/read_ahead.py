"""Bring a model's files into the system's file cache while nodes still work.

Each weight is read when its layer first runs, and the GPU waits for it; until then the disk would idle, while the text
encoder works for instance. So a thread reads the files from the start as soon as a loader node runs.

The host overtakes it. Into page-locked memory it reads without leaving anything in the cache (comfy-aimdo drops the
pages behind itself), so that a thread coming after it would read everything once more from a disk that both wait for:
what the host has begun to read is left out.
"""

from __future__ import annotations

import collections
import logging
import os
import threading

import comfy.model_management
import torch

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20  # smaller ones wait more often for other threads' Python
SHARE_OF_FREE_RAM = 0.5  # what does not fit into the cache would push out what was read before it is used
LEFT_OUT = 0.5  # of a piece, by the host: the rest it reads as fast by itself


class ReadAhead:
    """Reads files one after another, each once, in a thread that ends by itself. What cannot be read is left to the
    loader, which says why."""

    def __init__(self, *paths: str):
        self._taken: dict[str, collections.Counter[int]] = {path: collections.Counter() for path in paths}
        self._limit_bytes = int(SHARE_OF_FREE_RAM * comfy.model_management.get_free_memory(torch.device("cpu")))
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self) -> ReadAhead:
        self._thread.start()
        return self

    def join(self) -> None:
        self._thread.join()

    def leave_out(self, path: str, offset: int, size_bytes: int) -> None:
        """The host begins to read these bytes of a file by itself."""
        taken = self._taken.get(path)
        if taken is None or not self._thread.is_alive():
            return
        end = offset + size_bytes
        while offset < end:
            piece, within = divmod(offset, PIECE_BYTES)
            length = min(PIECE_BYTES - within, end - offset)
            taken[piece] += length
            offset += length

    def _read(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for path, taken in self._taken.items():
            try:
                with open(path, "rb", buffering=0) as file:
                    for piece in range(-(-os.fstat(file.fileno()).st_size // PIECE_BYTES)):
                        if self._limit_bytes <= 0:
                            return
                        if taken[piece] < LEFT_OUT * PIECE_BYTES:
                            file.seek(piece * PIECE_BYTES)
                            self._limit_bytes -= file.readinto(buffer)
            except OSError as error:
                logger.debug("Lowbit: %s is not read ahead: %s", os.path.basename(path), error)
