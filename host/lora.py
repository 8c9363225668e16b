"""LoRA beside a quantized weight: y = W_q x + s * B(A x), the weight's bytes never change.

So the effect is exact and taking the LoRA away leaves nothing behind. The host hands patches over as tuples (strength,
value, strength_model, offset, function). What a product of small matrices gives goes beside the weight: LoRA, LoHa of
small ranks, whose product of two low-rank matrices is one of rank r * r, and LoKr, whose Kronecker product takes a few
percent of the weight's operations. Anything else (DoRA, a full diff) is applied to the unpacked weight where it is
used: packing such a small change again would round it away, because the weights lie on the grid of their format
already.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter

from ..kernels.kept_memory import KeptMemory

logger = logging.getLogger(__name__)

SMALLEST_RANK = 16  # what tensor cores take
# Of a LoHa. Its matrices, and what they cost, grow with the square of the file's rank: those of rank 256 hold 1.4 GB
# for all linear layers of Ideogram 4's blocks, as a LoRA's of that rank.
LARGEST_PRODUCT_RANK = 256

Offset = tuple[int, int, int]  # dim, start and length of the rows or columns that a patch changes


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankTerm:
    """factor * up[N', rank] @ down[rank, K'], added to the rows or columns that `offset` names.

    ups, downs: of a LoRA one matrix each. Of a LoHa, (A1 B1) * (A2 B2) element by element, two: its up holds the
    products of all pairs of columns, its down those of all pairs of rows. They are formed on the device.
    """

    ups: tuple[torch.Tensor, ...]
    downs: tuple[torch.Tensor, ...]
    factor: float
    offset: Offset | None

    @property
    def rank(self) -> int:
        return math.prod(down.shape[0] for down in self.downs)

    @property
    def shape(self) -> tuple[int, int]:
        """N' and K'."""
        return self.ups[0].shape[0], self.downs[0].shape[1]

    def up(self, device: torch.device) -> torch.Tensor:
        """float32 [N', rank], times the factor."""
        first, *others = (up.to(device, torch.float32) for up in self.ups)
        for other in others:
            first = (first[:, :, None] * other[:, None, :]).flatten(start_dim=1)
        return first * self.factor

    def down(self, device: torch.device) -> torch.Tensor:
        """float32 [rank, K']."""
        first, *others = (down.to(device, torch.float32) for down in self.downs)
        for other in others:
            first = (first[:, None, :] * other[None, :, :]).flatten(end_dim=1)
        return first


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerTerm:
    """factor * kron(outer[a, b], inner[c, d]), added to the a * c rows and b * d columns that `offset` names."""

    outer: torch.Tensor
    inner: torch.Tensor
    factor: float
    offset: Offset | None

    @property
    def shape(self) -> tuple[int, int]:
        """a * c and b * d."""
        return self.outer.shape[0] * self.inner.shape[0], self.outer.shape[1] * self.inner.shape[1]


class SidePath:
    """All small changes of one weight [N, K]: the low-rank ones as a single one, which a product adds as it writes its
    result, Kronecker products after it."""

    def __init__(self, terms: list[LowRankTerm | KroneckerTerm], N: int, K: int, kept: KeptMemory):
        self.low_rank = [term for term in terms if isinstance(term, LowRankTerm)]
        self.kronecker = [term for term in terms if isinstance(term, KroneckerTerm)]
        self.N, self.K, self._kept = N, K, kept
        self._matrices: tuple[torch.Tensor, ...] = ()

    def hidden_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """hidden[..., R] and up[N, R] in x's dtype: the low-rank terms for x [..., K] are hidden @ up.T; None without.

        R is the sum of the ranks, and zeros up to a power of two from 16 on, as the INT8 product takes it.
        """
        if not self.low_rank:
            return None
        down, up, *_ = self.move(x.device, x.dtype)
        return torch.nn.functional.linear(x, down).to(x.dtype), up  # autocast may have chosen another

    def add_kronecker(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the Kronecker terms for x [..., K] to y [..., N] in place."""
        matrices = self.move(x.device, x.dtype)[2 if self.low_rank else 0 :] if self.kronecker else ()
        for term, outer, inner in zip(self.kronecker, matrices[::2], matrices[1::2], strict=True):
            rows, columns = _slices(term.offset)
            groups = x[..., columns].reshape(-1, outer.shape[1], inner.shape[1])
            product = torch.nn.functional.linear(torch.matmul(outer, groups), inner)
            y[..., rows].add_(product.reshape(*x.shape[:-1], -1))

    @property
    def device_bytes(self) -> int:
        """Bytes of the matrices that the first use moved to a device."""
        return sum(tensor.nbytes for tensor in self._matrices)

    def release(self) -> int:
        """Let the moved matrices go, until the next use; returns their bytes."""
        freed, self._matrices = self.device_bytes, ()
        return freed

    def move(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """down [R, K] and up [N, R] if there are low-rank terms, then outer and inner of each Kronecker term, factors
        included, on a device: put together at the first use, not at each."""
        if not self._matrices or self._matrices[0].device != device or self._matrices[0].dtype != dtype:
            matrices = list(self._down_and_up(device, dtype)) if self.low_rank else []
            for term in self.kronecker:
                matrices.append((term.outer.to(device, torch.float32) * term.factor).to(dtype))
                matrices.append(term.inner.to(device, dtype))
            self._matrices = tuple(self._kept.keep(matrix) for matrix in matrices)
        return self._matrices

    def _down_and_up(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        ranks = [term.rank for term in self.low_rank]
        padded = max(SMALLEST_RANK, 1 << (sum(ranks) - 1).bit_length())
        down = torch.zeros((padded, self.K), dtype=dtype, device=device)
        up = torch.zeros((self.N, padded), dtype=dtype, device=device)
        start = 0
        for term, rank in zip(self.low_rank, ranks, strict=True):
            features = slice(start, start + rank)
            rows, columns = _slices(term.offset)
            down[features, columns] = term.down(device).to(dtype)
            up[rows, features] = term.up(device).to(dtype)
            start += rank
        return down, up


def _slices(offset: Offset | None) -> tuple[slice, slice]:
    """The rows and the columns of the weight that a term changes."""
    if offset is None:
        return slice(None), slice(None)
    dim, start, length = offset
    part = slice(start, start + length)
    return (part, slice(None)) if dim == 0 else (slice(None), part)


def side_path(key: str, patches: list[tuple], N: int, K: int, kept: KeptMemory) -> SidePath | None:
    """The host's patches of one weight [N, K] as a side path, or None when one of them cannot be part of it.

    key: of the weight. kept: device memory for the matrices. A patch whose shapes do not fit the weight is left out
    with a line in the log, as the host does.
    """
    terms = []
    for patch in patches:
        try:
            terms.append(_term(*patch, N, K))
        except _MisfitError as misfit:
            logger.warning("Lowbit: a LoRA for %s is left out: %s. It was made for another model.", key, misfit)
    return None if any(term is None for term in terms) else SidePath(terms, N, K, kept)


def small_changes(patches: list[tuple]) -> bool:
    """Whether the patches change a weight a little, as against replacing it or merging it with another model's."""
    return all(
        isinstance(value, WeightAdapterBase) or (isinstance(value, tuple) and (len(value) == 1 or value[0] == "diff"))
        for _, value, *_ in patches
    )


class _MisfitError(Exception):
    """What a patch's matrices make, and what the weight is."""


def _term(strength, value, strength_model, offset, function, N: int, K: int) -> LowRankTerm | KroneckerTerm | None:
    if strength_model != 1.0 or function is not None:
        return None
    make = {LoRAAdapter: _lora, LoHaAdapter: _loha, LoKrAdapter: _lokr}.get(type(value))
    term = None if make is None else make(value.weights, strength, offset)
    if term is not None:
        changed = tuple(len(range(size)[part]) for size, part in zip((N, K), _slices(offset), strict=True))
        if term.shape != changed:
            raise _MisfitError(f"it changes a matrix of {term.shape}, here are {changed}")
    return term


def _lora(weights: tuple, strength: float, offset: Offset | None) -> LowRankTerm | None:
    up, down, alpha, mid, dora_scale, reshape = weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
    return LowRankTerm((up,), (down,), _factor(strength, alpha, down.shape[0]), offset)


def _loha(weights: tuple, strength: float, offset: Offset | None) -> LowRankTerm | None:
    up1, down1, alpha, up2, down2, mid1, mid2, dora_scale = weights
    rank = down1.shape[0]
    if mid1 is not None or mid2 is not None or dora_scale is not None or rank * down2.shape[0] > LARGEST_PRODUCT_RANK:
        return None
    return LowRankTerm((up1, up2), (down1, down2), _factor(strength, alpha, rank), offset)


def _lokr(weights: tuple, strength: float, offset: Offset | None) -> KroneckerTerm | None:
    outer, inner, alpha, outer_up, outer_down, inner_up, inner_down, mid, dora_scale = weights
    if mid is not None or dora_scale is not None:
        return None
    rank = None
    if outer is None:
        outer, rank = outer_up.float() @ outer_down.float(), outer_down.shape[0]
    if inner is None:
        inner, rank = inner_up.float() @ inner_down.float(), inner_down.shape[0]
    if outer.dim() != 2 or inner.dim() != 2:
        return None
    return KroneckerTerm(outer, inner, _factor(strength, None if rank is None else alpha, rank), offset)


def _factor(strength: float, alpha: float | None, rank: int | None) -> float:
    return float(strength if alpha is None else strength * alpha / rank)
