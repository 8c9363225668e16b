"""Bring a model's files into the system's file cache while nodes still work.

Each weight is read when its layer first runs, and the GPU waits for it; until then the disk would idle, while the text
encoder works for instance. So a thread reads the files from the start as soon as a loader node runs.
"""

from __future__ import annotations

import logging
import os
import threading

import comfy.model_management
import torch

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20  # smaller ones wait more often for other threads' Python
SHARE_OF_FREE_RAM = 0.5  # what does not fit into the cache would push out what was read before it is used


def read_ahead(*paths: str) -> threading.Thread:
    """Read the files one after another, each once, in a thread that ends by itself. What cannot be read is left to the
    loader, which says why."""
    limit_bytes = int(SHARE_OF_FREE_RAM * comfy.model_management.get_free_memory(torch.device("cpu")))
    thread = threading.Thread(target=_read, args=(tuple(dict.fromkeys(paths)), limit_bytes), daemon=True)
    thread.start()
    return thread


def _read(paths: tuple[str, ...], limit_bytes: int) -> None:
    piece = memoryview(bytearray(PIECE_BYTES))
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                while limit_bytes > 0 and (count := file.readinto(piece)):
                    limit_bytes -= count
        except OSError as error:
            logger.debug("Lowbit: %s is not read ahead: %s", os.path.basename(path), error)
