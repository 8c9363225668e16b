"""The header of a safetensors file: the container is described in `loaders/safetensors_file.py`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping

from ..loaders.safetensors_file import DTYPES
from .file_layout import FileLayout, OutputTensor, check_names

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_layout(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> FileLayout:
    """Tensors of wide elements first, as safetensors' own writer has it: each starts at a multiple of its elements."""
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor.stored].itemsize, tensor.name))
    check_names(ordered)
    entries, position = {"__metadata__": dict(metadata)}, 0
    for tensor in ordered:
        end = position + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": tensor.stored,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {tensor.name: len(header) + entries[tensor.name]["data_offsets"][0] for tensor in ordered}
    return FileLayout(header, offsets, len(header) + position)
