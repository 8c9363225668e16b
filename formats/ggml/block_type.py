"""What a GGML block type is, and the byte handling that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

FORMAT_PREFIX = "gguf_"

BlockFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """A storage type of GGUF files.

    type_id: its number in GGUF files.
    block_size, type_size: elements and bytes of one storage unit (for a K-quant that unit is the super-block).
    dequantize_blocks: uint8 [n, type_size] -> float32 [n, block_size].
    quantize_blocks: the reverse, or None where the type is only read.
    plain_dtype: the torch dtype of a type that is not quantized at all (F32, F16, BF16), else None.
    """

    name: str
    type_id: int
    block_size: int
    type_size: int
    dequantize_blocks: BlockFunction
    quantize_blocks: BlockFunction | None = None
    plain_dtype: torch.dtype | None = None

    @property
    def can_quantize(self) -> bool:
        return self.quantize_blocks is not None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def format_name(self) -> str:
        return FORMAT_PREFIX + self.name.lower()


def float16_at(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 in bytes `start` and `start + 1` of every block, as float32 [n, 1]."""
    # A clone, not contiguous(): one block is contiguous as it lies, possibly at an odd address.
    pair = blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format)
    return pair.view(torch.float16).to(torch.float32)


def to_float16(scales: torch.Tensor) -> torch.Tensor:
    """Rounded; raises ValueError where one is too large."""
    halves = scales.to(torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise ValueError(f"a scale of {scales.abs().max().item():.4g} does not fit float16 (largest value 65504)")
    return halves


def float16_bytes(values: torch.Tensor) -> torch.Tensor:
    """float32 [n, 1] -> the two bytes of its float16, uint8 [n, 2]."""
    return to_float16(values).contiguous().view(torch.uint8)


def spread_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n] -> [..., 8 // bits, n]: the fields of `bits` bits of every byte, lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16 [..., 2, n] -> [..., n]: the first in the low four bits."""
    return codes[..., 0, :] | (codes[..., 1, :] << 4)


def inverse_or_zero(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where the scale is zero or too small for a finite inverse, so that such a block stores zeros."""
    inverse = 1.0 / scale
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
