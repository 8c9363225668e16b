"""A step of a conversion: one weight of the source, the tensors that it becomes, and how they are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ..formats import QuantizedWeight
from .file_layout import OutputTensor
from .pieces import in_pieces
from .smoothing import Factors
from .source import floats_of, part_of

# A tensor of the file by name, a place in it in bytes, and what to write there.
Pieces = Iterator[tuple[str, int, torch.Tensor]]


class NotFiniteError(ValueError):
    """The source itself has NaN or infinity."""


class SmoothedRangeError(ValueError):
    """The source's values fit; multiplied by the factors of smoothing they do not."""


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """key: of the source's weight, for error texts. compute: the pieces of `tensors`, in any order; raises
    NotFiniteError, and ValueError for finite values that the type of `tensors[0]` cannot hold. quantized_as: the type
    that was asked for, None for a plain one; that of `tensors[0]` is another where the rows are no whole blocks."""

    key: str
    tensors: tuple[OutputTensor, ...]
    compute: Callable[[], Pieces]
    quantized_as: str | None = None


def is_float(weight: torch.Tensor | QuantizedWeight) -> bool:
    return not isinstance(weight, torch.Tensor) or weight.dtype.is_floating_point


def kept_dtype(weight: torch.Tensor | QuantizedWeight) -> torch.dtype:
    """How a tensor that is not quantized is stored: F16 and whole numbers as they are, everything else as BF16."""
    if isinstance(weight, torch.Tensor) and (weight.dtype == torch.float16 or not is_float(weight)):
        return weight.dtype
    return torch.bfloat16


def finite_floats_of(
    weight: torch.Tensor | QuantizedWeight, rows: slice, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Some rows as float32 [rows, K], a new tensor. Raises NotFiniteError."""
    values = floats_of(weight, rows, device)
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError("found NaN or infinity")
    return values


def plain_pieces(
    name: str,
    weight: torch.Tensor | QuantizedWeight,
    dtype: torch.dtype,
    factors: Factors | None,
    device: torch.device | str,
) -> Pieces:
    """An unquantized tensor, a few rows at a time. Raises as `TensorPlan.compute` does."""
    row_bytes = dtype.itemsize * (weight.shape[-1] if len(weight.shape) else 1)

    def compute(rows: slice) -> torch.Tensor:
        if not dtype.is_floating_point:
            return part_of(weight, rows)
        values = finite_floats_of(weight, rows, device)
        if factors is not None:
            values = factors.apply(values, rows)
        part = values.to(dtype)
        if not bool(torch.isfinite(part).all()):
            largest = values.abs().max().item()
            error = ValueError if factors is None else SmoothedRangeError
            raise error(f"a value of {largest:.4g} does not fit {str(dtype).removeprefix('torch.')}")
        return part

    for rows, part in in_pieces(compute, tuple(weight.shape), device):
        yield name, rows.start * row_bytes, part
