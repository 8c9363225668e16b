"""Memory for what an op needs only while it runs: a buffer on the device that every call reuses.

An unpacked weight is a large, short-lived tensor of another size in every layer. From an allocator, these leave holes:
ComfyUI's default one (cudaMallocAsync) held 3.2 GiB for a model whose layers need 64 MiB at a time.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch

from . import kept_memory

# Above, memory is allocated for the call: a buffer that is kept has to be small.
LARGEST_BYTES = 128 * 2**20

# A thread has buffers of its own: its launches may come between those of another one. They go when it does.
_buffers: weakref.WeakKeyDictionary[threading.Thread, dict[torch.device, torch.Tensor]] = weakref.WeakKeyDictionary()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor, valid until the next call by this thread for this device.

    Only for use within one op: the buffer's next user overwrites it. It is kept for a device's default stream alone, on
    which ComfyUI computes. On other streams other work may be in flight, and CUDA graphs, which are warmed up and
    captured there, want every piece of their memory to be theirs: memory is allocated anew, as are sizes above
    LARGEST_BYTES and tensors of other devices than CUDA.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cuda" or size_bytes > LARGEST_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return torch.empty(shape, dtype=dtype, device=device)
    buffers = _buffers.setdefault(threading.current_thread(), {})
    buffer = buffers.get(device)
    if buffer is None or buffer.numel() < size_bytes:
        buffers.pop(device, None)
        del buffer  # given back before the larger one is asked for
        with kept_memory.outside_recording():
            buffer = buffers[device] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    return buffer[:size_bytes].view(dtype).view(shape)


def release() -> None:
    """Give all buffers back; the next calls allocate them again."""
    _buffers.clear()
