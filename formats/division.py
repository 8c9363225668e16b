"""Division that gives the same bits on every device."""

import torch


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """values / number, by a tensor: CUDA turns a division by a number into a product with its reciprocal, an ulp off
    the CPU's and C's."""
    return values / torch.full_like(values, number)
