"""Safetensors: the length of the header (u64, little-endian), the header (JSON), the data.

The header is one object: tensor name -> {"dtype", "shape", "data_offsets": [start, end]}, offsets counted from the end
of the header, and optionally "__metadata__": {str: str}. It is read piece by piece: hostile JSON as a whole would build
objects many times its size and nest them without end.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from .checkpoint import (
    MAX_TENSORS,
    CheckpointFile,
    MetadataBudget,
    Omitted,
    StoredTensor,
    check_name,
    check_ranges,
    check_tensor_count,
    damaged,
    element_count,
    incomplete,
)
from .errors import CheckpointError, quoted
from .mapped_file import MappedFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_BYTES = 100_000_000
MAX_METADATA_KEYS = 20_000
MAX_NAME_BYTES = 100_000  # far above every known one; text beyond ASCII takes several times its bytes in memory
_FIELDS = {"dtype", "shape", "data_offsets"}
_ENTRY = re.compile(r"\{[^{}]{0,1000}\}")
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_DECODER = json.JSONDecoder()


def read_safetensors(file: MappedFile) -> CheckpointFile:
    """The metadata and tensors of a safetensors file. Raises CheckpointError."""
    text, data_start = _read_header(file)
    header = _Header(file, text, data_start)
    header.parse()
    check_tensor_count(file, len(header.tensors))
    check_ranges(file, data_start, header.tensors)
    return CheckpointFile(file.path, "safetensors", header.metadata, header.tensors)


def _read_header(file: MappedFile) -> tuple[str, int]:
    if file.size_bytes < 8:
        raise damaged(file, f"a file of {file.size_bytes} bytes", "a safetensors file")
    size_bytes = int.from_bytes(file.read(0, 8), "little")
    if size_bytes > MAX_HEADER_BYTES:
        expected = f"a safetensors header (at most {MAX_HEADER_BYTES:,})"
        raise damaged(file, f"a header length of {size_bytes:,} bytes", expected)
    if 8 + size_bytes > file.size_bytes:
        raise incomplete(file, 8 + size_bytes)
    raw = file.read(8, size_bytes)
    # One character for each byte: a single letter beyond Latin-1 would make the whole text two or four times as large.
    return raw.decode("latin-1"), 8 + size_bytes


class _Header:
    """A pass over the header text; `tensors` and `metadata` fill as it goes.

    text: one character for each byte. Strings are read as UTF-8 one by one.
    """

    def __init__(self, file: MappedFile, text: str, data_start: int):
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, Any] = {}
        self._file, self._text, self._data_start = file, text, data_start
        self._budget = MetadataBudget()
        self._position = 0

    def parse(self) -> None:
        seen_metadata = False
        for name in self._keys("header"):
            if name == "__metadata__":
                if seen_metadata:
                    raise damaged(self._file, "two entries '__metadata__'", "one")
                seen_metadata = True
                self._parse_metadata()
            else:
                self._parse_tensor(name)
        if self._position != len(self._text):
            raise self._bad_json("text after the header's end")

    def _keys(self, place: str):
        """The keys of the object at the current position; the caller reads the value after each."""
        self._expect("{", place)
        if self._next_is("}"):
            return
        while True:
            key = self._string()
            self._expect(":", place)
            yield key
            if self._next_is("}"):
                return
            self._expect(",", place)

    def _parse_metadata(self) -> None:
        for key in self._keys("'__metadata__'"):
            if key in self.metadata:
                raise damaged(self._file, f"two metadata entries {quoted(key)}", "one")
            if len(self.metadata) == MAX_METADATA_KEYS:
                raise damaged(self._file, "too many metadata entries", f"at most {MAX_METADATA_KEYS:,}")
            if self._text[self._position : self._position + 1] != '"':
                found = f"a value of {quoted(key)} in '__metadata__' that is not a text"
                raise damaged(self._file, found, "only texts")
            start, end, value = self._span()
            fits = self._budget.take(100 + 4 * (len(key) + len(value)))
            self.metadata[key] = self._utf8(start, end, value) if fits else Omitted("string", len(value))

    def _parse_tensor(self, name: str) -> None:
        check_name(self._file, name)
        if name in self.tensors:
            raise damaged(self._file, f"two tensors named {quoted(name)}", "a name of its own for each tensor")
        if len(self.tensors) == MAX_TENSORS:
            raise damaged(self._file, f"more than {MAX_TENSORS:,} tensors", "a diffusion model")
        entry = self._entry(name)
        dtype, shape = self._dtype(name, entry["dtype"]), self._integers(name, "shape", entry["shape"])
        size_bytes = element_count(self._file, name, shape) * dtype.itemsize
        offsets = self._integers(name, "data_offsets", entry["data_offsets"])
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            found = f"the data_offsets {quoted(list(offsets))} in the tensor {quoted(name)}"
            raise damaged(self._file, found, "a start and an end after it")
        if offsets[1] - offsets[0] != size_bytes:
            raise damaged(
                self._file,
                f"{offsets[1] - offsets[0]:,} bytes of data for the tensor {quoted(name)}",
                f"{size_bytes:,} for the shape {list(shape)} in {entry['dtype']}",
            )
        start = self._data_start + offsets[0]
        self.tensors[name] = StoredTensor(name, shape, dtype, None, size_bytes, start, shape, self._file)

    def _entry(self, name: str) -> dict[str, Any]:
        match = _ENTRY.match(self._text, self._position)
        if match is None:
            raise self._bad_json(f"the entry of {quoted(name)}")
        pairs: list[tuple[str, Any]] = []

        def keep_pairs(found: list[tuple[str, Any]]) -> None:
            pairs.extend(found)

        try:
            json.loads(match.group(), object_pairs_hook=keep_pairs)
        except (ValueError, RecursionError) as error:  # brackets may nest a thousand deep here
            raise self._bad_json(f"the entry of {quoted(name)}") from error
        if len(pairs) != len(_FIELDS) or {key for key, _ in pairs} != _FIELDS:
            raise damaged(
                self._file,
                f"the fields {quoted([key for key, _ in pairs])} in the tensor {quoted(name)}",
                "dtype, shape and data_offsets, each once",
            )
        self._position = match.end()
        self._skip_space()
        return dict(pairs)

    def _dtype(self, name: str, value: Any) -> torch.dtype:
        dtype = DTYPES.get(value) if isinstance(value, str) else None
        if dtype is None:
            raise CheckpointError(
                self._file.path,
                found=f"the data type {quoted(value)} in the tensor {quoted(name)}",
                expected=f"one of {', '.join(DTYPES)}",
                todo="This kind of quantized file cannot be loaded here: look for an INT8, FP8, BF16 or GGUF version.",
            )
        return dtype

    def _integers(self, name: str, field: str, value: Any) -> tuple[int, ...]:
        # `True` is an integer to Python, and a hundred digits are one to JSON.
        is_list = isinstance(value, list)
        if not is_list or not all(type(item) is int and 0 <= item < 2**63 for item in value):
            found = f"the {field} {quoted(value)} in the tensor {quoted(name)}"
            raise damaged(self._file, found, "a list of whole numbers, none negative")
        return tuple(value)

    def _string(self) -> str:
        """A name or a key of metadata."""
        start, end, value = self._span()
        if end - start > MAX_NAME_BYTES:
            found = f"a name of {end - start:,} bytes in the header"
            raise damaged(self._file, found, f"names of at most {MAX_NAME_BYTES:,}")
        return self._utf8(start, end, value)

    def _span(self) -> tuple[int, int, str]:
        """Where the string at the current position starts and ends, and its value, with one character for each byte
        beyond ASCII."""
        if self._text[self._position : self._position + 1] != '"':
            raise self._bad_json("a name")
        start = self._position
        try:
            value, end = _DECODER.raw_decode(self._text, start)
        except ValueError as error:
            raise self._bad_json("a name") from error
        if _SURROGATE.search(value):  # half of a pair, which no log can print
            raise self._bad_json("a name")
        self._position = end
        self._skip_space()
        return start, end, value

    def _utf8(self, start: int, end: int, value: str) -> str:
        """What a string of `_span` says."""
        written = self._text[start:end]
        if written.isascii():
            return value
        try:
            return json.loads(written.encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError as error:
            found = f"a header that is not UTF-8 text (byte {start + error.start:,})"
            raise damaged(self._file, found, "a safetensors header") from error

    def _expect(self, character: str, place: str) -> None:
        if not self._next_is(character):
            raise self._bad_json(place)

    def _next_is(self, character: str) -> bool:
        if not self._text.startswith(character, self._position):
            return False
        self._position += 1
        self._skip_space()
        return True

    def _skip_space(self) -> None:
        self._position = _SPACE.match(self._text, self._position).end()

    def _bad_json(self, place: str) -> CheckpointError:
        around = self._text[self._position : self._position + 24].encode("latin-1").decode("utf-8", "replace")
        return damaged(
            self._file,
            f"{quoted(around)} at character {self._position:,} of the header ({place})",
            "the JSON header of a safetensors file",
        )
