"""What the searches for scales of least squared error share: super-blocks as columns, and sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable

import torch

SUPER_BLOCK = 256
LARGEST_FLOAT16 = 65504.0
# Super-blocks quantized at a time: a search's temporaries are about 14 times as large as the values.
PIECE = 2**15


def by_pieces(
    quantize_piece: Callable[..., torch.Tensor], values: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Bytes of super-blocks, uint8 [n, type_size], from values and maybe their importance, [n, 256]."""
    arguments = [values.split(PIECE)] if importance is None else [values.split(PIECE), importance.split(PIECE)]
    return torch.cat([quantize_piece(*piece) for piece in zip(*arguments, strict=True)])


def as_columns(values: torch.Tensor, elements: int) -> torch.Tensor:
    """[n, 256] -> [elements, blocks, n] (element, block, super-block): a sum over a block adds whole rows."""
    return values.unflatten(-1, (SUPER_BLOCK // elements, elements)).permute(2, 1, 0).contiguous()


def in_element_order(codes: torch.Tensor) -> torch.Tensor:
    """Whole numbers [elements, blocks, n] below 256 -> uint8 [n, 256]."""
    return codes.to(torch.uint8).permute(2, 1, 0).flatten(1)


def sum_in_order(terms: torch.Tensor) -> torch.Tensor:
    """Over the first dimension, a power of two; overwrites the terms. torch's own sum has no fixed order."""
    while terms.shape[0] > 1:
        half = terms.shape[0] // 2
        terms = terms[:half].add_(terms[half:])
    return terms[0]


def nearest_float16(units: torch.Tensor) -> torch.Tensor:
    """As float32, cut off at the largest."""
    return units.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).to(torch.float16).to(torch.float32)
