"""What a file to write will look like before any of its tensors is computed: header, places, size."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class OutputTensor:
    """A tensor of a file to write.

    stored: its type there, `I8` or `BF16` in safetensors, `Q4_K` or `BF16` in GGUF. shape: in elements.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """header: the first bytes of the file. offsets: where each tensor starts, counted from the start of the file."""

    header: bytes
    offsets: dict[str, int]
    size_bytes: int


def check_names(tensors: Iterable[OutputTensor]) -> None:
    """Raises ValueError for a name that occurs twice: one of the tensors would be lost in any reader."""
    counts = collections.Counter(tensor.name for tensor in tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"{twice[0]}: found two tensors to write under this name, expected one. The source holds a tensor of its "
            "own under a name that the result needs: remove it from the source."
        )
