"""The types that are stored as they are: F32, F16, BF16, little-endian, one element a storage unit."""

from __future__ import annotations

import functools

import torch

from .block_type import GgmlType


def _dequantize_plain(dtype: torch.dtype, blocks: torch.Tensor) -> torch.Tensor:
    # Filled bytewise: the source may lie at any address, a view to a wider dtype may not.
    values = torch.empty((blocks.shape[0], 1), dtype=dtype, device=blocks.device)
    values.view(torch.uint8).copy_(blocks)
    return values.to(torch.float32)


def _quantize_plain(dtype: torch.dtype, values: torch.Tensor) -> torch.Tensor:
    stored = values.to(dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        largest = values.abs().max().item()
        raise ValueError(f"a value of {largest:.4g} does not fit {str(dtype).removeprefix('torch.')}")
    return stored.view(torch.uint8)


def _plain_type(name: str, type_id: int, dtype: torch.dtype) -> GgmlType:
    return GgmlType(
        name=name,
        type_id=type_id,
        block_size=1,
        type_size=dtype.itemsize,
        dequantize_blocks=functools.partial(_dequantize_plain, dtype),
        quantize_blocks=functools.partial(_quantize_plain, dtype),
        plain_dtype=dtype,
    )


F32 = _plain_type("F32", 0, torch.float32)
F16 = _plain_type("F16", 1, torch.float16)
BF16 = _plain_type("BF16", 30, torch.bfloat16)
