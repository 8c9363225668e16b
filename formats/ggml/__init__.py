"""The block types of GGUF files: what their bytes mean, in plain torch, equal to the C library bit for bit."""

from .block_type import GgmlType
from .registry import (
    TYPES,
    TYPES_BY_ID,
    UNSUPPORTED_NAMES,
    format_name,
    ggml_type_of_format,
    type_from_id,
    type_from_name,
)
from .rows import dequantize, logical_K, quantize, row_size_bytes
from .weight import GgmlWeight

__all__ = [
    "TYPES",
    "TYPES_BY_ID",
    "UNSUPPORTED_NAMES",
    "GgmlType",
    "GgmlWeight",
    "dequantize",
    "format_name",
    "ggml_type_of_format",
    "logical_K",
    "quantize",
    "row_size_bytes",
    "type_from_id",
    "type_from_name",
]
