"""GGUF, versions 2 and 3, little-endian: counts, metadata, tensor infos, then the data from the next aligned byte.

    header        "GGUF", version u32, tensor count u64, metadata count u64
    metadata      key string, value kind u32, value
    tensor info   name string, dimension count u32, dimensions u64 each (innermost first), type u32, offset u64
    string        length u64, UTF-8 bytes;     array   element kind u32, count u64, elements

Every count and length is compared with the bytes that are left in the file before anything is done with it.
"""

from __future__ import annotations

import struct
from typing import Any

import torch

from ..formats import ggml
from ..formats.base import UnknownQuantizationError
from .checkpoint import (
    MAX_DIMS,
    MAX_NAME_BYTES,
    CheckpointFile,
    MetadataBudget,
    Omitted,
    StoredTensor,
    check_name,
    check_ranges,
    check_tensor_count,
    damaged,
    element_count,
)
from .errors import CheckpointError, counted, quoted
from .mapped_file import MappedFile

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_METADATA_KEYS = 20_000
MAX_KEY_BYTES = 1024
MAX_KEPT_ELEMENTS = 64
MAX_ARRAY_DEPTH = 4
# Strings and arrays in arrays are walked one by one; large tokenizers have 0.3 million strings and as many merges.
MAX_WALKED_ELEMENTS = 2**20
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

PLAIN_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
_SCALARS = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]
_STRING, _ARRAY = 8, 9
_SMALLEST_ENTRY_BYTES = 14  # a key of one byte with a one-byte value
_SMALLEST_INFO_BYTES = 25  # a name of one byte and no dimensions
_WINDOW_BYTES = 2**18


def read_gguf(file: MappedFile) -> CheckpointFile:
    """The metadata and tensors of a GGUF file. Raises CheckpointError."""
    cursor = _Cursor(file)
    tensor_count, metadata_count = _read_counts(cursor)
    metadata = _MetadataReader(cursor).read(metadata_count)
    _refuse_split(file, metadata)
    alignment = _alignment(file, metadata)
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, dims, type_id, offset in infos:
        if name in tensors:
            raise damaged(file, f"two tensors named {quoted(name)}", "a name of its own for each tensor")
        if offset % alignment:
            raise damaged(
                file, f"the tensor {quoted(name)} at offset {offset:,}", f"a multiple of the alignment {alignment}"
            )
        original_shape = metadata.get(ORIGINAL_SHAPE + name)
        tensors[name] = _stored_tensor(file, name, dims, type_id, data_start + offset, original_shape)
    check_ranges(file, data_start, tensors)
    return CheckpointFile(file.path, "gguf", metadata, tensors)


class _Cursor:
    """Reads a file forwards through a small window, and never past its end."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.position = 0
        self._window, self._window_start = b"", 0

    def take(self, size_bytes: int, what: str) -> bytes:
        start = self.position - self._window_start
        if start + size_bytes > len(self._window):
            self.require(size_bytes, what)
            window_bytes = min(max(size_bytes, _WINDOW_BYTES), self.file.size_bytes - self.position)
            self._window, self._window_start, start = self.file.read(self.position, window_bytes), self.position, 0
        self.position += size_bytes
        return self._window[start : start + size_bytes]

    def skip(self, size_bytes: int, what: str) -> None:
        self.require(size_bytes, what)
        self.position += size_bytes

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def text(self, limit: int, what: str) -> str:
        """A name or key: not longer than the limit, and UTF-8."""
        size_bytes = self.u64(what)
        if size_bytes > limit:
            raise damaged(self.file, f"a length of {size_bytes:,} bytes for {what}", f"at most {limit}")
        raw = self.take(size_bytes, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.file, f"{quoted(raw)} as {what}", "UTF-8 text") from error

    def require(self, size_bytes: int, what: str) -> None:
        left_bytes = self.file.size_bytes - self.position
        if size_bytes > left_bytes:
            raise CheckpointError(
                self.file.path,
                found=f"only {counted(left_bytes, 'byte')} after position {self.position:,}",
                expected=f"{counted(size_bytes, 'byte')} for {what}",
                todo="The file is damaged or its download is incomplete: download it again.",
            )


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    file = cursor.file
    magic = cursor.take(4, "the word GGUF")
    if magic != b"GGUF":
        raise CheckpointError(
            file.path,
            found=f"something else than a model, which starts with {quoted(magic.decode('latin-1'))}",
            expected="a GGUF file",
            todo="Pick another file, or download this one again with the download button of its page.",
        )
    version = cursor.u32("the version")
    if version not in (2, 3):
        is_big_endian = version > 0xFFFF and version & 0xFFFF == 0
        raise CheckpointError(
            file.path,
            found="a big-endian GGUF file" if is_big_endian else f"GGUF version {version}",
            expected="a little-endian GGUF file of version 2 or 3",
            todo="Convert the model again with a current program, or look for a newer file.",
        )
    tensor_count, metadata_count = cursor.u64("the number of tensors"), cursor.u64("the number of metadata entries")
    cursor.require(metadata_count * _SMALLEST_ENTRY_BYTES, f"metadata of {counted(metadata_count, 'value')}")
    cursor.require(tensor_count * _SMALLEST_INFO_BYTES, f"the description of {counted(tensor_count, 'tensor')}")
    check_tensor_count(file, tensor_count)
    if metadata_count > MAX_METADATA_KEYS:
        raise damaged(file, f"{metadata_count:,} metadata entries", f"at most {MAX_METADATA_KEYS:,}")
    return tensor_count, metadata_count


class _MetadataReader:
    """Reads the metadata; arrays that are long or nested, and values beyond the memory budget, stay in the file."""

    def __init__(self, cursor: _Cursor):
        self._cursor = cursor
        self._budget = MetadataBudget()
        self._walked = 0

    def read(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._cursor.text(MAX_KEY_BYTES, "a metadata key")
            if not key or key in metadata:
                found = f"two metadata entries {quoted(key)}" if key else "a metadata entry without a key"
                raise damaged(self._cursor.file, found, "a key of its own for each entry")
            kind = self._cursor.u32(f"the kind of {quoted(key)}")
            metadata[key] = self._value(kind, f"the metadata {quoted(key)}")
        return metadata

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(what)
        return self._scalars(kind, 1, what)[0]

    def _scalars(self, kind: int, count: int, what: str) -> list:
        layout = self._layout(kind, what)
        return [value for (value,) in layout.iter_unpack(self._cursor.take(count * layout.size, what))]

    def _string(self, what: str) -> str | Omitted:
        size_bytes = self._cursor.u64(what)
        self._cursor.require(size_bytes, what)
        if not self._budget.take(100 + 4 * size_bytes):
            self._cursor.skip(size_bytes, what)
            return Omitted("string", size_bytes)
        return self._cursor.take(size_bytes, what).decode("utf-8", "replace")

    def _array(self, what: str) -> list | Omitted:
        kind, count = self._array_head(what)
        if kind == _ARRAY or count > MAX_KEPT_ELEMENTS or not self._budget.take(100 + 40 * count):
            self._skip_elements(kind, count, what, 1)
            return Omitted(f"array of {self._kind_name(kind)}", count)
        return [self._string(what) for _ in range(count)] if kind == _STRING else self._scalars(kind, count, what)

    def _array_head(self, what: str) -> tuple[int, int]:
        kind, count = self._cursor.u32(what), self._cursor.u64(what)
        smallest = 12 if kind == _ARRAY else 8 if kind == _STRING else self._layout(kind, what).size
        self._cursor.require(count * smallest, what)
        return kind, count

    def _skip_elements(self, kind: int, count: int, what: str, depth: int) -> None:
        if kind not in (_STRING, _ARRAY):
            self._cursor.skip(count * self._layout(kind, what).size, what)
            return
        self._walked += count
        if self._walked > MAX_WALKED_ELEMENTS or depth > MAX_ARRAY_DEPTH:
            raise damaged(self._cursor.file, f"long or deeply nested arrays in {what}", "metadata of a diffusion model")
        for _ in range(count):
            if kind == _STRING:
                self._cursor.skip(self._cursor.u64(what), what)
            else:
                self._skip_elements(*self._array_head(what), what, depth + 1)

    def _layout(self, kind: int, what: str) -> struct.Struct:
        if kind not in _SCALARS:
            raise damaged(self._cursor.file, f"the value kind {kind} in {what}", "a kind from 0 to 12")
        return _SCALARS[kind][1]

    def _kind_name(self, kind: int) -> str:
        return {_STRING: "string", _ARRAY: "array"}.get(kind) or _SCALARS[kind][0]


def _refuse_split(file: MappedFile, metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count > 1:
        raise CheckpointError(
            file.path,
            found=f"one part of a model split into {quoted(count)} files",
            expected="a whole model in one file",
            todo="Merge the parts with `llama-gguf-split --merge`, or download the file that is not split.",
        )


def _alignment(file: MappedFile, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise damaged(file, f"the alignment {quoted(value)}", f"a power of two up to {MAX_ALIGNMENT:,}")
    return value


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text(MAX_NAME_BYTES, "a tensor name")
    check_name(cursor.file, name)
    what = f"the tensor {quoted(name)}"
    dim_count = cursor.u32(what)
    if dim_count > MAX_DIMS:  # GGML itself knows four; converters of video models write five
        raise damaged(cursor.file, f"{counted(dim_count, 'dimension')} in {what}", f"at most {MAX_DIMS}")
    dims = struct.unpack(f"<{dim_count}Q", cursor.take(8 * dim_count, what))
    return name, dims, cursor.u32(what), cursor.u64(what)


def _stored_tensor(
    file: MappedFile, name: str, dims: tuple[int, ...], type_id: int, offset: int, original_shape: Any
) -> StoredTensor:
    stored_shape = dims[::-1]
    count = element_count(file, name, stored_shape)
    shape = stored_shape if original_shape is None else _original_shape(file, name, stored_shape, original_shape)
    if dtype := PLAIN_DTYPES.get(type_id):
        return StoredTensor(name, shape, dtype, None, count * dtype.itemsize, offset, shape, file)
    block_type = _block_type(file, name, type_id)
    row_elements = dims[0] if dims else 1
    if count == 0 or row_elements % block_type.block_size:
        raise damaged(
            file,
            f"rows of {counted(row_elements, 'element')} in the {block_type.name} tensor {quoted(name)} of shape "
            f"{list(stored_shape)}",
            f"rows of one or more whole blocks of {block_type.block_size}",
        )
    size_bytes = count // block_type.block_size * block_type.type_size
    # Logical rows of whole blocks are the same bytes, cut in other places.
    if shape and shape[-1] % block_type.block_size == 0:
        stored_shape = shape
    return StoredTensor(name, shape, None, block_type.name, size_bytes, offset, stored_shape, file)


def _original_shape(file: MappedFile, name: str, stored_shape: tuple[int, ...], value: Any) -> tuple[int, ...]:
    """The shape before a converter folded a tensor of more dimensions, or of short rows, into what GGML can store."""
    is_shape = isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
    if not is_shape or element_count(file, name, tuple(value)) != element_count(file, name, stored_shape):
        raise damaged(
            file,
            f"the original shape {quoted(value)} of the tensor {quoted(name)}",
            f"as many elements as in its stored shape {list(stored_shape)}",
        )
    return tuple(value)


def _block_type(file: MappedFile, name: str, type_id: int) -> ggml.GgmlType:
    try:
        return ggml.type_from_id(type_id)
    except UnknownQuantizationError as error:
        raise CheckpointError(
            file.path,
            found=f"the quantization type {type_id} in the tensor {quoted(name)}",
            expected="a known type",
            todo=f"{error}. Pick another quantization of the model.",
        ) from error
