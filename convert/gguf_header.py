"""The header of a GGUF file, version 3: the container is described in `loaders/gguf.py`."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping

from ..formats.ggml import TYPES, row_size_bytes
from ..loaders.gguf import DEFAULT_ALIGNMENT, ORIGINAL_SHAPE
from .file_layout import FileLayout, OutputTensor, check_names

VERSION = 3
QUANTIZATION_VERSION = 2
MAX_DIMS = 4  # GGML's own limit
# Types that are no block types, and pass through as they are.
INTEGERS = {"I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28}
# `general.file_type`: the number by which llama.cpp names what most tensors of a file are.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "BF16": 32,
}  # fmt: skip

_U32, _I32, _STRING, _ARRAY = 4, 5, 8, 9

Value = str | int | list[int]


def tensor_size_bytes(stored: str, shape: tuple[int, ...], element_bytes: int = 0) -> int:
    """Bytes of a tensor; `element_bytes` counts for the types of INTEGERS."""
    if stored in INTEGERS:
        return math.prod(shape) * element_bytes
    row = shape[-1] if shape else 1
    return math.prod(shape[:-1]) * row_size_bytes(stored, row)


def gguf_layout(tensors: Iterable[OutputTensor], metadata: Mapping[str, Value]) -> FileLayout:
    """Tensors in the given order, each from a multiple of 32 bytes. Integers in metadata are u32, in lists i32."""
    tensors, metadata = list(tensors), dict(metadata)
    check_names(tensors)
    infos, offsets, position = b"", {}, 0
    for tensor in tensors:
        shape = tensor.shape
        if len(shape) > MAX_DIMS:
            metadata[ORIGINAL_SHAPE + tensor.name] = list(shape)
            shape = (math.prod(shape[:-1]), shape[-1])
        # gguf-py reads no file with a tensor of no dimensions. Its own shape has no place among the metadata either:
        # an empty list has no type there, which other loaders refuse; torch loads [1] where a model has [].
        shape = shape or (1,)
        type_id = INTEGERS[tensor.stored] if tensor.stored in INTEGERS else TYPES[tensor.stored].type_id
        infos += _string(tensor.name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), type_id, position)
        offsets[tensor.name] = position
        position = _aligned(position + tensor.size_bytes)
    values = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    header = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + values + infos
    header += bytes(_aligned(len(header)) - len(header))
    return FileLayout(header, {name: len(header) + at for name, at in offsets.items()}, len(header) + position)


def _aligned(position: int) -> int:
    return -(-position // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _I32, len(value), *value)
