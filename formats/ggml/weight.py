"""A quantized weight of a GGUF file."""

from __future__ import annotations

import dataclasses

import torch

from ..base import QuantizedWeight, described
from .registry import type_from_name
from .rows import dequantize, row_size_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class GgmlWeight(QuantizedWeight):
    """data: uint8 [..., row bytes], the blocks as they lie in the file; shape: [..., K].

    ggml_type: name of the storage type, a key of `TYPES`.
    """

    ggml_type: str

    def __post_init__(self) -> None:
        ggml_type = type_from_name(self.ggml_type)
        if not self.shape:
            raise ValueError(f"a {ggml_type.name} weight has at least one dimension, found shape ()")
        row_bytes = row_size_bytes(ggml_type, self.shape[-1])
        expected = (*self.shape[:-1], row_bytes)
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != expected:
            raise ValueError(
                f"a {ggml_type.name} weight of shape {list(self.shape)} is uint8 {list(expected)} "
                f"({ggml_type.type_size} bytes for {ggml_type.block_size} elements, {row_bytes} bytes a row), "
                f"found {described(self.data)}"
            )

    @property
    def format_name(self) -> str:
        return type_from_name(self.ggml_type).format_name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return dequantize(self.data, self.ggml_type, dtype)
