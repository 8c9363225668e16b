"""What the Triton implementations need of a device, in one place: none of this imports Triton."""

from __future__ import annotations

import functools
import logging
import os

import torch

from ..formats import Int8Weight
from .dispatch import named_implementation

logger = logging.getLogger(__name__)

# Below this, Triton 3.6 cannot compile an int8 product at all (tried for compute capability 7.5).
OLDEST_CAPABILITY = (8, 0)

LONGEST_REASON = 160  # characters

_launch_failures: dict[torch.device, str | None] = {}
# What a launch may fail of at one time and not at another.
_PASSING = ("out of memory", "captur")


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
        return _launch_failure(device)
    if device.type == "cpu" and interpreted() and named_implementation() == "triton_impl":
        return None
    return f"needs a CUDA device, found {device.type}"


def _launch_failure(device: torch.device) -> str | None:
    """Why no kernel can be built and launched on this device, or None: only then it shows that there is no C compiler
    or that Triton is older than the GPU."""
    if torch.compiler.is_compiling():  # a launch would become a part of the graph; an op asks again as it runs
        return None
    if device not in _launch_failures:
        try:
            _launch(device)
            _launch_failures[device] = None
        except Exception as error:  # of a compiler, an assembler or a driver, each with its own
            reason = str(error).strip().partition("\n")[0]
            if isinstance(error, RuntimeError) and any(text in reason for text in _PASSING):
                return None  # the op's own launch says it
            if len(reason) > LONGEST_REASON:  # a compiler's command with all its folders
                reason = f"{reason[: LONGEST_REASON // 2]} ... {reason[-LONGEST_REASON // 2 :]}"
            _launch_failures[device] = f"cannot build a kernel here: {type(error).__name__}: {reason}"
            logger.warning("Lowbit: no Triton kernel runs on %s, everything gets slower: %s", device, reason)
    return _launch_failures[device]


def _launch(device: torch.device) -> None:
    """Build and launch the smallest of the kernels; raises whatever fails."""
    from .unpack_int8 import UnpackInt8Call, triton_impl

    wq = torch.zeros(1, 16, dtype=torch.int8, device=device)
    weight = Int8Weight(wq, (1, 16), torch.ones(1, 1, device=device))
    triton_impl.run(UnpackInt8Call(weight, torch.float32))


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
