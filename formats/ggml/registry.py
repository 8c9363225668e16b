"""Which GGML types are supported, by name, by GGUF number and by format name; and the names of those that are not."""

from __future__ import annotations

from ..base import UnknownQuantizationError
from .block_type import FORMAT_PREFIX, GgmlType
from .iq4 import IQ4_NL, IQ4_XS
from .k_quants import Q2_K, Q3_K
from .legacy import Q4_0, Q4_1, Q5_0, Q5_1
from .plain import BF16, F16, F32
from .q4_k import Q4_K
from .q5_k import Q5_K
from .q6_k import Q6_K
from .q8_0 import Q8_0

_SUPPORTED = (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)

TYPES: dict[str, GgmlType] = {ggml_type.name: ggml_type for ggml_type in _SUPPORTED}
TYPES_BY_ID: dict[int, GgmlType] = {ggml_type.type_id: ggml_type for ggml_type in _SUPPORTED}

# For error texts. 4, 5, 31..33 and 36..38 were withdrawn from GGUF but live on in old files.
UNSUPPORTED_NAMES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def type_from_id(type_id: int) -> GgmlType:
    """The type of a GGUF type number; `UnknownQuantizationError` for every other number."""
    if (ggml_type := TYPES_BY_ID.get(type_id)) is not None:
        return ggml_type
    if (name := UNSUPPORTED_NAMES.get(type_id)) is not None:
        raise UnknownQuantizationError(f"GGML type {name} (number {type_id}) is not supported; {_supported_text()}")
    raise UnknownQuantizationError(f"GGML type number {type_id} is not a known type; {_supported_text()}")


def type_from_name(name: str) -> GgmlType:
    """The type of a name such as `Q4_K`; `UnknownQuantizationError` for every other name."""
    if (ggml_type := TYPES.get(name)) is not None:
        return ggml_type
    for type_id, unsupported in UNSUPPORTED_NAMES.items():
        if name == unsupported:
            return type_from_id(type_id)
    raise UnknownQuantizationError(f"{name!r} is not a known GGML type; {_supported_text()}")


def format_name(name: str) -> str:
    """The format name of a GGML type name: `Q4_K` -> `gguf_q4_k`."""
    return type_from_name(name).format_name


def ggml_type_of_format(name: str) -> str:
    """The GGML type name in a format name: `gguf_q4_k` -> `Q4_K`."""
    if not name.startswith(FORMAT_PREFIX):
        raise UnknownQuantizationError(
            f"{name!r} is not a GGUF format: those are named {FORMAT_PREFIX} and a type, such as gguf_q4_k"
        )
    return type_from_name(name.removeprefix(FORMAT_PREFIX).upper()).name


def _supported_text() -> str:
    return f"supported: {', '.join(TYPES)}"
