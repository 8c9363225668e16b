"""Small tensors that outlive the call that makes them, side by side in a few large blocks of device memory.

Made one by one between the large tensors of a call, each holds on to the piece of the allocator's memory that it
happens to lie in, and the next large tensor needs a new piece. With ComfyUI's default allocator (cudaMallocAsync) the
row scales of two Q4_K models, 15 MB, cost 2 GiB in this way.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch

BLOCK_BYTES = 16 * 2**20
# What to allocate in, when the memory outlives the call: the host may be recording the allocations of a block of a
# model, to give the next block the same memory. Set by whoever knows the host.
outside_recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
_ALIGNMENT = 256  # of tensors in a block, as of the allocator's own


class KeptMemory:
    """Blocks of BLOCK_BYTES, of which one is being filled for each device. A block lives as long as a tensor in it."""

    def __init__(self):
        self._filling: dict[torch.device, tuple[weakref.ref, int]] = {}  # a block, and how much of it is taken
        self._lock = threading.Lock()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that may be kept for long, or the tensor itself where code is traced.

        The copy is an ordinary tensor also in inference mode, so that training may use it later.
        """
        if torch.compiler.is_compiling():
            return tensor
        with torch.inference_mode(False), torch.no_grad(), outside_recording():
            block, start = self._room(tensor.nbytes, tensor.device)
            copy = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        copy.lowbit_block = block  # the only thing that keeps the block alive
        return copy

    def _room(self, size_bytes: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """A block, uint8, and where in it so many bytes are free."""
        if size_bytes > BLOCK_BYTES:
            return torch.empty(size_bytes, dtype=torch.uint8, device=device), 0
        with self._lock:
            reference, taken = self._filling.get(device, (lambda: None, 0))
            block = reference()
            if block is None or taken + size_bytes > BLOCK_BYTES:
                block, taken = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device), 0
            self._filling[device] = weakref.ref(block), taken + -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        return block, taken
