"""Tensors that exporters store with other dimensions than the host's model has them.

stable-diffusion.cpp drops leading dimensions of one, as GGML does of every tensor, and keeps SDXL's projections as
convolutions of one pixel.
"""

from __future__ import annotations

import dataclasses

import torch

from ..formats import QuantizedWeight

# How many dimensions the host's models have, by the last part of a tensor's name.
DIMENSIONS = {
    "x_pad_token": 2,  # Z-Image
    "cap_pad_token": 2,
    "siglip_pad_token": 2,  # Lumina
    "modulation": 3,  # Wan
    "emb_pos": 3,
    "pos_embed": 3,  # SD3
    "register_tokens": 3,  # AuraFlow
    "positional_encoding": 3,
}
# By this width of the text's features the host knows SD 1's U-Net, whose projections are convolutions.
SD1_CONTEXT = 768


def restore_dimensions(weights: dict[str, torch.Tensor | QuantizedWeight]) -> None:
    """Give the tensors of DIMENSIONS their first ones back, and take the last ones from the projections of U-Nets that
    have linear layers there, on the same bytes."""
    for key, weight in weights.items():
        missing = DIMENSIONS.get(key.rpartition(".")[2], 0) - len(weight.shape)
        if missing > 0:
            ones = (1,) * missing
            if isinstance(weight, torch.Tensor):
                weights[key] = weight.reshape(*ones, *weight.shape)
            else:
                data = weight.data.reshape(*ones, *weight.data.shape)
                weights[key] = dataclasses.replace(weight, data=data, shape=(*ones, *weight.shape))
        elif key.endswith((".proj_in.weight", ".proj_out.weight")) and _is_linear_stored_as_convolution(weights, key):
            weights[key] = weight.flatten(start_dim=1)


def _is_linear_stored_as_convolution(weights: dict[str, torch.Tensor | QuantizedWeight], key: str) -> bool:
    weight = weights[key]
    to_k = weights.get(f"{key.rsplit('.', 2)[0]}.transformer_blocks.0.attn2.to_k.weight")
    return (
        to_k is not None
        and to_k.shape[-1] != SD1_CONTEXT
        and isinstance(weight, torch.Tensor)
        and tuple(weight.shape[2:]) == (1, 1)
    )
