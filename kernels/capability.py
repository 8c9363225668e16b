"""What the Triton implementations need of a device, in one place: none of this imports Triton."""

from __future__ import annotations

import functools
import os

import torch

from .dispatch import named_implementation

# Below this, Triton 3.6 cannot compile an int8 product at all (tried for compute capability 7.5).
OLDEST_CAPABILITY = (8, 0)


def triton_refusal(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on this device, or None.

    On the CPU they run under Triton's interpreter alone (`TRITON_INTERPRET=1`), and only when asked for by name: it is
    for tests, and a thousand times slower than plain PyTorch.
    """
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "is not tested on ROCm"
        capability = device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"needs compute capability {_version(OLDEST_CAPABILITY)}, found {_version(capability)}"
        return None
    if device.type == "cpu" and interpreted() and named_implementation() == "triton_impl":
        return None
    return f"needs a CUDA device, found {device.type}"


def interpreted() -> bool:
    """Whether Triton kernels are run by its interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors run programs at the same time; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
