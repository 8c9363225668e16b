"""Small checkpoint files byte by byte, correct or not: also what the libraries refuse to write."""

import json
import pathlib
import struct

# Kinds of GGUF metadata values.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
# type id -> (block_size, type_size)
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 20: (32, 18), 30: (1, 2)}


def safetensors_bytes(header, data=b"", length=None, pad=False):
    """header: a dict, or the raw bytes of the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    if pad:
        raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class GgufBytes:
    """Builds a GGUF file; `fields` holds (position, struct code) of every number of its header."""

    def __init__(self, version=3, tensors=0, metadata=0):
        self.raw = bytearray(b"GGUF")
        self.fields = []
        self.number("I", version).number("Q", tensors).number("Q", metadata)

    def number(self, code, value):
        self.fields.append((len(self.raw), code))
        self.raw += struct.pack("<" + code, value)
        return self

    def string(self, value):
        raw = value if isinstance(value, bytes) else value.encode()
        self.number("Q", len(raw))
        self.raw += raw
        return self

    def value(self, key, kind, *value):
        """One metadata entry; an array takes its element kind and a list."""
        self.string(key).number("I", kind)
        return self._value(kind, *value)

    def _value(self, kind, *value):
        if kind == STRING:
            return self.string(*value)
        if kind != ARRAY:
            return self.number(_CODES[kind], *value)
        element_kind, elements = value
        self.number("I", element_kind).number("Q", len(elements))
        for element in elements:
            self._value(element_kind, *(element if element_kind == ARRAY else (element,)))
        return self

    def info(self, name, dims, type_id, offset):
        """One tensor info; dims innermost first."""
        self.string(name).number("I", len(dims))
        for size in dims:
            self.number("Q", size)
        return self.number("I", type_id).number("Q", offset)

    def data(self, data=b"", alignment=32):
        self.raw += bytes(-len(self.raw) % alignment) + data
        return bytes(self.raw)


def gguf_bytes(infos, data, metadata=(), version=3, alignment=32):
    """A whole file: infos are (name, dims, type_id, offset), metadata (key, kind, value...)."""
    builder = GgufBytes(version, len(infos), len(metadata))
    for item in metadata:
        builder.value(*item)
    for info in infos:
        builder.info(*info)
    return builder.data(data, alignment)


def write(folder: pathlib.Path, name: str, content: bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content)
    return path
