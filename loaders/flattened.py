"""Tensors that exporters store with fewer dimensions than the host's model has them."""

from __future__ import annotations

import dataclasses

import torch

from ..formats import QuantizedWeight

# stable-diffusion.cpp keeps the padding tokens of Z-Image as [D], the model as [1, D].
LEADING_ONE = ("x_pad_token", "cap_pad_token")


def restore_dimensions(weights: dict[str, torch.Tensor | QuantizedWeight]) -> None:
    """Give the tensors of LEADING_ONE their first dimension back, on the same bytes."""
    for key in LEADING_ONE:
        weight = weights.get(key)
        if weight is None or len(weight.shape) != 1:
            continue
        if isinstance(weight, torch.Tensor):
            weights[key] = weight.unsqueeze(0)
        else:
            weights[key] = dataclasses.replace(weight, data=weight.data.unsqueeze(0), shape=(1, *weight.shape))
