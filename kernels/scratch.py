"""Memory for what an op needs only while it runs: one buffer a device, reused by every call.

An unpacked weight is a large, short-lived tensor of another size in every layer. From an allocator, these leave holes:
ComfyUI's default one (cudaMallocAsync) held 3.2 GiB for a model whose layers need 64 MiB at a time.
"""

from __future__ import annotations

import math
import threading

import torch

# Above, memory is allocated for the call: a buffer that is never given back has to be small.
LARGEST_BYTES = 128 * 2**20

# A thread has buffers of its own: its launches may come between those of another one on the same stream.
_buffers = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor, valid until the next call with this thread, device and stream.

    Only for use within one op: the buffer's next user overwrites it. Larger ones than LARGEST_BYTES, those on other
    devices than CUDA and those that a CUDA graph records (whose memory belongs to the graph) are allocated anew.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cuda" or size_bytes > LARGEST_BYTES or torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    buffers = _buffers.__dict__
    if key not in buffers or buffers[key].numel() < size_bytes:
        buffers.pop(key, None)  # given back before the larger one is asked for
        buffers[key] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    return buffers[key][:size_bytes].view(dtype).view(shape)
