"""The error that INT8 (W8A8) gives a linear layer's output, by the definition of the format in float32: per-channel
weights, per-token activations, an exact product."""

from __future__ import annotations

import torch

from ..convert.source import floats_of, row_slices
from ..formats import Int8Weight, QuantizedWeight, int8
from .metrics import energy, sqnr_db


def quantized_tokens(x: torch.Tensor, rotation_group: int = 0) -> torch.Tensor:
    """Activations x[M, K] rotated, quantized per token, and back as float32: INT8 rows as a weight has them."""
    return int8.quantize_weight(int8.rotate(x, rotation_group) if rotation_group else x).dequantize()


def weight_values(weight: Int8Weight) -> torch.Tensor:
    """What the activations meet, float32 [N, K]: the weight as it was quantized, that is rotated."""
    return weight.data.to(torch.float32) * weight.scale


def output_sqnr_db(
    rows: torch.Tensor, weight: torch.Tensor | QuantizedWeight, device: torch.device | str = "cpu"
) -> float:
    """SQNR of a layer's output for some rows [M, K] of its input when the layer alone becomes INT8, in dB.

    weight: [N, K] as it is loaded, against which the error counts; read some rows at a time.
    """
    x = rows.to(device, torch.float32)
    tokens = quantized_tokens(x)
    signal = noise = 0.0
    for part in row_slices(tuple(weight.shape)):
        w = floats_of(weight, part, device)
        expected = x @ w.t()
        error = tokens @ weight_values(int8.quantize_weight(w)).t() - expected
        signal += energy(expected)
        noise += energy(error)
    return sqnr_db(signal, noise)
