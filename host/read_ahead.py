"""Bring a model's files into the system's file cache while nodes still work.

Each weight is read when its layer first runs, and the GPU waits for it; until then, while the text encoder works, the
disk would idle. So a thread reads the files from the start as soon as they are picked.
"""

from __future__ import annotations

import logging
import os
import threading

import comfy.model_management
import torch

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 * 2**20
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
                while limit_bytes > 0:
                    limit_bytes -= PIECE_BYTES
                    if _is_cached(file.fileno(), file.tell()):
                        file.seek(PIECE_BYTES, os.SEEK_CUR)
                    elif not file.readinto(piece):
                        break
        except OSError as error:
            logger.debug("Lowbit: %s is not read ahead: %s", os.path.basename(path), error)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether the system has the byte at an offset in its cache; False where it does not tell, and at a file's end."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it is not, or the file system cannot say
        return False
