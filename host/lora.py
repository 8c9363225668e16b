"""LoRA as a low-rank side path next to a quantized weight: y = W_q x + s * B(A x).

The weight's bytes never change, so the effect is exact and taking the LoRA away leaves nothing behind. The host hands
patches over as tuples (strength, value, strength_model, offset, function). What is no low-rank sum (LoHa, LoKr, DoRA, a
full diff) is applied to the unpacked weight where it is used: packing such a small change again would round it away,
because the weights lie on the grid of their format already.
"""

from __future__ import annotations

import dataclasses

import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.lora import LoRAAdapter

SMALLEST_RANK = 16  # what tensor cores take


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankTerm:
    """factor * up[N', rank] @ down[rank, K'], added to the rows or columns that `offset` (dim, start, length) names."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    offset: tuple[int, int, int] | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class LowRankSum:
    """All low-rank terms of one weight [N, K] as a single one, which a product adds as it writes its result."""

    def __init__(self, terms: list[LowRankTerm], N: int, K: int):
        self.terms, self.N, self.K = terms, N, K
        self._cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden[..., R] and up[N, R] in x's dtype: the sum of the terms for x [..., K] is hidden @ up.T."""
        down, up = self._matrices(x.device, x.dtype)
        return torch.nn.functional.linear(x, down), up

    @property
    def device_bytes(self) -> int:
        """Bytes of the matrices that the first use moved to a device."""
        return 0 if self._cast is None else sum(tensor.nbytes for tensor in self._cast)

    def release(self) -> int:
        """Let the moved matrices go, until the next use; returns their bytes."""
        freed, self._cast = self.device_bytes, None
        return freed

    def _matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """down [R, K] and up [N, R], factors in it, on a device: put together at the first use, not at each.

        R is the sum of the ranks, and zeros up to a power of two from 16 on, as the INT8 product takes it.
        """
        if self._cast is None or self._cast[0].device != device or self._cast[0].dtype != dtype:
            ranks = [term.rank for term in self.terms]
            padded = max(SMALLEST_RANK, 1 << (sum(ranks) - 1).bit_length())
            down = torch.zeros((padded, self.K), dtype=dtype, device=device)
            up = torch.zeros((self.N, padded), dtype=dtype, device=device)
            start = 0
            for term, rank in zip(self.terms, ranks, strict=True):
                features = slice(start, start + rank)
                rows, columns = _slices(term.offset)
                down[features, columns] = term.down.to(device, dtype)
                up[rows, features] = (term.up.to(device, torch.float32) * term.factor).to(dtype)
                start += rank
            self._cast = down, up
        return self._cast


def _slices(offset: tuple[int, int, int] | None) -> tuple[slice, slice]:
    """The rows and the columns of the weight that a term changes."""
    if offset is None:
        return slice(None), slice(None)
    dim, start, length = offset
    part = slice(start, start + length)
    return (part, slice(None)) if dim == 0 else (slice(None), part)


def low_rank_sum(patches: list[tuple], N: int, K: int) -> LowRankSum | None:
    """The host's patches of one weight [N, K] as a low-rank sum, or None when one of them is none."""
    terms = [_low_rank_term(*patch) for patch in patches]
    return None if any(term is None for term in terms) else LowRankSum(terms, N, K)


def small_changes(patches: list[tuple]) -> bool:
    """Whether the patches change a weight a little, as against replacing it or merging it with another model's."""
    return all(
        isinstance(value, WeightAdapterBase) or (isinstance(value, tuple) and (len(value) == 1 or value[0] == "diff"))
        for _, value, *_ in patches
    )


def _low_rank_term(strength, value, strength_model, offset, function) -> LowRankTerm | None:
    if not isinstance(value, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, mid, dora_scale, reshape = value.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    factor = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return LowRankTerm(up.flatten(start_dim=1), down.flatten(start_dim=1), float(factor), offset)
