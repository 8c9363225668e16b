"""What a file to write will look like before any of its tensors is computed: header, places, size."""

from __future__ import annotations

import dataclasses


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
