"""Whole tensors to and from GGML bytes: row sizes, chunks, shapes and dtypes handled once for every type.

A row of K elements is K / block_size storage units; rows never share a unit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..base import UnknownQuantizationError, described, require_floating
from ..chunks import row_chunks
from .block_type import GgmlType
from .registry import TYPES, type_from_name

# Types whose quantizer takes the elements' importance into account. The C library's Q8_0 ignores it too.
USES_IMPORTANCE = ("Q4_K", "Q5_K", "Q6_K")
# Of the mean: a channel that a few pictures never used may be used by the next one.
SMALLEST_IMPORTANCE = 1e-3


def _resolve(ggml_type: GgmlType | str) -> GgmlType:
    return type_from_name(ggml_type) if isinstance(ggml_type, str) else ggml_type


def row_size_bytes(ggml_type: GgmlType | str, K: int) -> int:
    """Bytes of one row of K elements."""
    ggml_type = _resolve(ggml_type)
    if K % ggml_type.block_size:
        raise ValueError(f"a {ggml_type.name} row has a multiple of {ggml_type.block_size} elements, found K={K}")
    return K // ggml_type.block_size * ggml_type.type_size


def logical_K(ggml_type: GgmlType | str, row_bytes: int) -> int:
    """K, the logical elements of a row of `row_bytes` bytes."""
    ggml_type = _resolve(ggml_type)
    if row_bytes % ggml_type.type_size:
        raise ValueError(
            f"a {ggml_type.name} row has a multiple of {ggml_type.type_size} bytes "
            f"({ggml_type.block_size} elements each), found {row_bytes} bytes"
        )
    return row_bytes // ggml_type.type_size * ggml_type.block_size


def dequantize(blocks: torch.Tensor, ggml_type: GgmlType | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [..., row bytes] -> `dtype` [..., K], contiguous, on the same device.

    Computed in float32, equal to the C library bit for bit, then rounded once to `dtype`. The bytes may be strided,
    read-only or at any address. More than two dimensions that do not collapse into rows cost one copy of the bytes.
    """
    ggml_type = _resolve(ggml_type)
    if blocks.dtype != torch.uint8 or blocks.dim() == 0:
        raise ValueError(f"GGML bytes are uint8 [..., row bytes], found {described(blocks)}")
    require_floating(dtype)
    K = logical_K(ggml_type, blocks.shape[-1])
    values = torch.empty((*blocks.shape[:-1], K), dtype=dtype, device=blocks.device)
    if values.numel() == 0:
        return values
    rows_in, rows_out = blocks.reshape(-1, blocks.shape[-1]), values.view(-1, K)
    for rows, units in _chunks(rows_out, ggml_type, K):
        unit_bytes = rows_in[rows, _scaled(units, ggml_type.type_size)].reshape(-1, ggml_type.type_size)
        target = rows_out[rows, _scaled(units, ggml_type.block_size)]
        target.copy_(ggml_type.dequantize_blocks(unit_bytes).view(target.shape))
    return values


def quantize(values: torch.Tensor, ggml_type: GgmlType | str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Floating [..., K] -> uint8 [..., row bytes], contiguous, on the same device.

    Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 give the bytes of ggml's reference code; Q4_K, Q5_K and Q6_K their own (see
    `q4_k.py`). Values that are not finite are refused, as are those whose scale overflows float16.
    """
    ggml_type = _resolve(ggml_type)
    if ggml_type.quantize_blocks is None:
        can_quantize = ", ".join(known.name for known in TYPES.values() if known.can_quantize)
        raise UnknownQuantizationError(
            f"{ggml_type.name} can be read but not written: it has no quantizer here; those that have: {can_quantize}"
        )
    if not values.dtype.is_floating_point or values.dim() == 0:
        raise ValueError(f"values to quantize are floating point [..., K], found {described(values)}")
    K = values.shape[-1]
    row_bytes = row_size_bytes(ggml_type, K)
    weights = None if importance is None else _checked_importance(importance, K, values.device)
    if ggml_type.name not in USES_IMPORTANCE:
        weights = None
    blocks = torch.empty((*values.shape[:-1], row_bytes), dtype=torch.uint8, device=values.device)
    if blocks.numel() == 0:
        return blocks
    rows_in, rows_out = values.detach().reshape(-1, K), blocks.view(-1, row_bytes)
    for rows, units in _chunks(rows_in, ggml_type, K):
        source = rows_in[rows, _scaled(units, ggml_type.block_size)].to(torch.float32)
        if not bool(torch.isfinite(source).all()):
            raise ValueError(f"values to quantize to {ggml_type.name} must be finite, found NaN or infinity")
        target = rows_out[rows, _scaled(units, ggml_type.type_size)]
        arguments = [source]
        if weights is not None:
            arguments.append(weights[_scaled(units, ggml_type.block_size)].expand_as(source))
        units_of = [argument.reshape(-1, ggml_type.block_size) for argument in arguments]
        target.copy_(ggml_type.quantize_blocks(*units_of).view(target.shape))
    return blocks


def _checked_importance(importance: torch.Tensor, K: int, device: torch.device) -> torch.Tensor:
    """The importance as float32 [K] with a mean of about 1 and nothing near zero; all alike where all are zero."""
    if not importance.dtype.is_floating_point or tuple(importance.shape) != (K,):
        raise ValueError(
            f"the importance of input channels is floating point [{K}] (K={K}), found {described(importance)}"
        )
    weights = importance.detach().cpu().to(torch.float64)  # not every device has float64
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("the importance of input channels must be finite and not negative")
    mean = weights.mean()
    weights = weights / mean if bool(mean > 0) else torch.ones_like(weights)
    return weights.clamp_(min=SMALLEST_IMPORTANCE).to(device, torch.float32)


def _chunks(rows: torch.Tensor, ggml_type: GgmlType, K: int) -> Iterator[tuple[slice, slice]]:
    """Row slices and, within them, slices of storage units: even one endless row is cut."""
    for row_slice in row_chunks(rows.shape[0], K, rows.device):
        for unit_slice in row_chunks(K // ggml_type.block_size, ggml_type.block_size, rows.device):
            yield row_slice, unit_slice


def _scaled(units: slice, size: int) -> slice:
    return slice(units.start * size, units.stop * size)
