"""A step of a conversion: one weight of the source, the tensors that it becomes, and how they are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ..formats import QuantizedWeight
from .file_layout import OutputTensor
from .smoothing import Factors
from .source import floats_of, part_of, row_slices

# A tensor of the file by name, a place in it in bytes, and what to write there.
Pieces = Iterator[tuple[str, int, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """key: of the source's weight, for error texts. compute: the pieces of `tensors`, in any order."""

    key: str
    tensors: tuple[OutputTensor, ...]
    compute: Callable[[], Pieces]


def kept_dtype(weight: torch.Tensor | QuantizedWeight) -> torch.dtype:
    """How a tensor that is not quantized is stored: F16 and whole numbers as they are, everything else as BF16."""
    is_plain = isinstance(weight, torch.Tensor)
    if is_plain and (weight.dtype == torch.float16 or not weight.dtype.is_floating_point):
        return weight.dtype
    return torch.bfloat16


def plain_pieces(
    name: str,
    weight: torch.Tensor | QuantizedWeight,
    dtype: torch.dtype,
    factors: Factors | None,
    device: torch.device | str,
) -> Pieces:
    """An unquantized tensor, a few rows at a time."""
    row_bytes = dtype.itemsize * (weight.shape[-1] if len(weight.shape) else 1)
    for rows in row_slices(tuple(weight.shape)):
        if dtype.is_floating_point:
            values = floats_of(weight, rows, device)
            if factors is not None:
                values = factors.apply(values, rows)
            part = values.to(dtype)
            if bool((torch.isfinite(values) != torch.isfinite(part)).any()):
                largest = values[torch.isfinite(values)].abs().max().item()
                raise ValueError(f"a value of {largest:.4g} does not fit {str(dtype).removeprefix('torch.')}")
        else:
            part = part_of(weight, rows)
        yield name, rows.start * row_bytes, part
