"""ggml's own reader of GGUF files, through ctypes: the library that `python dev.py c-library` builds."""

import ctypes
import dataclasses
import os
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / ".dev" / "c-library" / "lib"
FILES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
MISSING = "run `python dev.py c-library` first: it builds ggml's C library, with cmake and a C++ compiler"

MAX_DIMS = 4
U32, STRING, ARRAY, I32 = 4, 8, 9, 5  # kinds of metadata values that our writer uses
INTEGERS = {"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}


class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


class TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    ]


_SIZE, _LONG, _TEXT, _POINTER = ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
# By function: the type of its result, and of its arguments.
FUNCTIONS = {
    "gguf_init_from_file": (_POINTER, _TEXT, InitParams),
    "gguf_free": (None, _POINTER),
    "gguf_get_version": (ctypes.c_uint32, _POINTER),
    "gguf_get_alignment": (_SIZE, _POINTER),
    "gguf_get_data_offset": (_SIZE, _POINTER),
    "gguf_get_n_kv": (_LONG, _POINTER),
    "gguf_get_key": (_TEXT, _POINTER, _LONG),
    "gguf_get_kv_type": (ctypes.c_int, _POINTER, _LONG),
    "gguf_get_arr_type": (ctypes.c_int, _POINTER, _LONG),
    "gguf_get_arr_n": (_SIZE, _POINTER, _LONG),
    "gguf_get_arr_data": (_POINTER, _POINTER, _LONG),
    "gguf_get_val_u32": (ctypes.c_uint32, _POINTER, _LONG),
    "gguf_get_val_str": (_TEXT, _POINTER, _LONG),
    "gguf_get_n_tensors": (_LONG, _POINTER),
    "gguf_get_tensor_name": (_TEXT, _POINTER, _LONG),
    "gguf_get_tensor_ne": (ctypes.POINTER(_LONG), _POINTER, _LONG),
    "gguf_get_tensor_type": (ctypes.c_int, _POINTER, _LONG),
    "gguf_get_tensor_offset": (_SIZE, _POINTER, _LONG),
    "gguf_get_tensor_size": (_SIZE, _POINTER, _LONG),
    "ggml_free": (None, _POINTER),
    "ggml_get_tensor": (_POINTER, _POINTER, _TEXT),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), ctypes.c_int),
}


@dataclasses.dataclass(frozen=True)
class CTensor:
    """type: as C calls it, `q4_K`. dims: innermost first, always four. offset: within the tensors' part of the file.

    values: float32 of floats and blocks, the type's own of integers, flat.
    """

    type: str
    dims: tuple[int, ...]
    offset: int
    size_bytes: int
    values: torch.Tensor


@dataclasses.dataclass(frozen=True)
class CFile:
    version: int
    alignment: int
    data_offset: int
    metadata: dict[str, object]
    tensors: dict[str, CTensor]


def find() -> pathlib.Path | None:
    return next((FOLDER / name for name in FILES if (FOLDER / name).is_file()), None)


def load(path: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def read(library: ctypes.CDLL, path: str | os.PathLike) -> CFile | None:
    """What the library reads from a file: header, tensors and their values; None for a file that it refuses."""
    tensors = ctypes.c_void_p()
    file = library.gguf_init_from_file(os.fsencode(path), InitParams(False, ctypes.pointer(tensors)))
    if not file:
        return None
    try:
        return CFile(
            library.gguf_get_version(file),
            library.gguf_get_alignment(file),
            library.gguf_get_data_offset(file),
            dict(_entry(library, file, index) for index in range(library.gguf_get_n_kv(file))),
            dict(_tensor(library, file, tensors, index) for index in range(library.gguf_get_n_tensors(file))),
        )
    finally:
        library.gguf_free(file)
        library.ggml_free(tensors)


def _entry(library, file, index: int) -> tuple[str, object]:
    kind = library.gguf_get_kv_type(file, index)
    if kind == ARRAY and library.gguf_get_arr_type(file, index) == I32:
        numbers = ctypes.cast(library.gguf_get_arr_data(file, index), ctypes.POINTER(ctypes.c_int32))
        value = numbers[: library.gguf_get_arr_n(file, index)]
    else:
        value = {U32: library.gguf_get_val_u32, STRING: library.gguf_get_val_str}[kind](file, index)
    return library.gguf_get_key(file, index).decode(), value.decode() if isinstance(value, bytes) else value


def _tensor(library, file, tensors, index: int) -> tuple[str, CTensor]:
    name = library.gguf_get_tensor_name(file, index)
    dims = tuple(library.gguf_get_tensor_ne(file, index)[:MAX_DIMS])
    traits = library.ggml_get_type_traits(library.gguf_get_tensor_type(file, index)).contents
    size_bytes, count = library.gguf_get_tensor_size(file, index), int(np.prod(dims))
    data, kind = library.ggml_get_data(library.ggml_get_tensor(tensors, name)), traits.type_name.decode()
    if kind == "f32" or kind in INTEGERS:
        dtype = INTEGERS.get(kind, torch.float32)
        values = torch.empty(0, dtype=dtype)  # torch takes no buffer of no bytes
        if size_bytes:
            values = torch.frombuffer(bytearray(ctypes.string_at(data, size_bytes)), dtype=dtype)
    else:
        values = torch.full((count,), float("nan"))
        traits.to_float(data, values.data_ptr(), count)
    offset = library.gguf_get_tensor_offset(file, index)
    return name.decode(), CTensor(kind, dims, offset, size_bytes, values)
