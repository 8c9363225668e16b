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


@dataclasses.dataclass(eq=False)
class LowRankTerm:
    """factor * up[N', rank] @ down[rank, K'], added to the rows or columns that `offset` (dim, start, length) names."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    offset: tuple[int, int, int] | None
    _cast: tuple[torch.Tensor, torch.Tensor] | None = dataclasses.field(default=None, init=False, repr=False)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y[..., N] += factor * (x[..., K] @ down.T) @ up.T, in place."""
        if self.offset is not None:
            dim, start, length = self.offset
            x, y = (x, y.narrow(-1, start, length)) if dim == 0 else (x.narrow(-1, start, length), y)
        up, down = self._matrices(x.device, x.dtype)
        hidden = torch.nn.functional.linear(x, down) * self.factor
        y += torch.nn.functional.linear(hidden, up)

    @property
    def device_bytes(self) -> int:
        """Bytes of the matrices that the first use moved to a device."""
        return 0 if self._cast is None else sum(tensor.nbytes for tensor in self._cast)

    def release(self) -> int:
        """Let the moved matrices go, until the next use; returns their bytes."""
        freed, self._cast = self.device_bytes, None
        return freed

    def _matrices(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices on a device, in a dtype: moved at the first use, not at each."""
        if self._cast is None or self._cast[0].device != device or self._cast[0].dtype != dtype:
            self._cast = self.up.to(device, dtype), self.down.to(device, dtype)
        return self._cast


def low_rank_terms(patches: list[tuple]) -> list[LowRankTerm] | None:
    """The host's patches of one weight as low-rank terms, or None when one of them is no low-rank sum."""
    terms = [_low_rank_term(*patch) for patch in patches]
    return None if any(term is None for term in terms) else terms


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
