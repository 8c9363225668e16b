"""The base checkpoint of a file of quantized linear layers alone: it gives the rest and tells how smoothing reads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from ..formats import Int8Weight, QuantizedWeight
from .errors import CheckpointError, counted
from .safetensors_int8 import Weights

# One-dimensional tensors of linear layers; every other one is a norm.
_LINEAR_VECTORS = ("ws", "smooth", "bias", "comfy_quant", "weight_scale", "scale_weight", "weight_smooth")

# An INT8 row is within about 2 % of the weight it was made from, an FP8 row within about 3 %.
LARGEST_ERROR = 0.10
# The two readings of the smoothing factors are told apart when the worse one is off by this many times the better one.
SMALLEST_RATIO = 2.0
SAMPLED_LAYERS, SAMPLED_ROWS = 8, 8


def needs_base(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a branch is the linears-only layout: `wq` tensors, and no norm, which every diffusion transformer has."""
    leaves = {key: key.rpartition(".")[2] for key in tensors}
    has_norms = any(len(tensor.shape) == 1 and leaves[key] not in _LINEAR_VECTORS for key, tensor in tensors.items())
    return "wq" in leaves.values() and not has_norms


def merge_base(path: str, weights: Weights, base_path: str, base: Weights) -> tuple[Weights, str]:
    """The INT8 linears over the base checkpoint's other tensors, and one line about what was found.

    The file does not say whether activations are divided or multiplied by `smooth`: rows of several layers are
    compared with the base's weights in both readings, and the returned weights multiply. Raises CheckpointError when
    the base is another model's or another branch's, or when the readings cannot be told apart.
    """
    modules = {key.rpartition(".")[0] for key in weights}
    supplied = {key: tensor for key, tensor in base.items() if key.rpartition(".")[0] not in modules}
    linears = [key for key, weight in weights.items() if isinstance(weight, Int8Weight)]
    missing = [key for key in linears if key not in base]
    if missing:
        raise CheckpointError(
            base_path,
            found=f"no tensor {missing[0]} ({counted(len(missing), 'tensor')} lacking in all)",
            expected=f"the base checkpoint of {_name(path)}: the release that it was quantized from, same branch",
            todo="Pick the base checkpoint that belongs to the quantized file.",
        )
    divides, error = _reading(path, weights, base_path, base, linears)
    if divides:
        for key in linears:
            if weights[key].smooth is not None:
                weights[key] = dataclasses.replace(weights[key], smooth=1.0 / weights[key].smooth)
    how = "divided" if divides else "multiplied"
    smoothed = any(weights[key].smooth is not None for key in linears)
    note = (
        f"{counted(len(supplied), 'tensor')} from the base checkpoint, sampled rows within {error:.1%} of its weights"
    )
    return supplied | weights, note + (f", activations are {how} by the smoothing factors" if smoothed else "")


def _reading(path: str, weights: Weights, base_path: str, base: Weights, linears: list[str]) -> tuple[bool, float]:
    """Whether activations are divided by `smooth`, and the relative error of that reading on the sampled rows."""
    errors = {True: [], False: []}
    step = max(1, len(linears) // SAMPLED_LAYERS)
    smoothed = any(weights[key].smooth is not None for key in linears)
    for key in linears[::step]:
        quantized, original = weights[key], base[key]
        if tuple(quantized.shape) != tuple(original.shape):
            raise CheckpointError(
                base_path,
                found=f"{key} of shape {tuple(original.shape)}",
                expected=f"{tuple(quantized.shape)} as in {_name(path)}",
                todo="This is the base checkpoint of another model; pick the one that the quantized file was made "
                "from.",
            )
        rows = torch.linspace(0, quantized.shape[0] - 1, SAMPLED_ROWS).long().unique()
        expected = _rows(original, rows)
        for divides, readings in errors.items():
            sample = _rows(quantized, rows)
            if quantized.smooth is not None and divides:
                sample = sample / quantized.smooth.square()
            readings.append(float((sample - expected).norm() / expected.norm().clamp(min=1e-30)))
    divided, multiplied = (sum(readings) / len(readings) for readings in (errors[True], errors[False]))
    better = min(divided, multiplied)
    if not better <= LARGEST_ERROR:
        raise CheckpointError(
            base_path,
            found=f"weights that differ from those of {_name(path)} by {better:.0%}",
            expected=f"at most {LARGEST_ERROR:.0%}, which quantization explains",
            todo="This is the base checkpoint of another model or of the other branch; pick the one that belongs to "
            "the file.",
        )
    if smoothed and max(divided, multiplied) < SMALLEST_RATIO * better:
        raise CheckpointError(
            path,
            found=f"smoothing factors that fit the base checkpoint equally well both ways ({divided:.2%} and "
            f"{multiplied:.2%})",
            expected="one reading that clearly fits",
            todo="Pick the unquantized release as the base checkpoint, or another quantized file.",
        )
    return divided < multiplied, better


def _name(path: str) -> str:
    return os.path.basename(path)


def _rows(weight: torch.Tensor | QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a weight [N, K] in float32, without unpacking the others."""
    if isinstance(weight, torch.Tensor):
        return weight[rows].float()
    part = {"data": weight.data.view(torch.uint8)[rows].view(weight.data.dtype), "shape": (len(rows), weight.shape[1])}
    scale = getattr(weight, "scale", None)
    if scale is not None and scale.numel() > 1:
        part["scale"] = scale[rows]
    return dataclasses.replace(weight, **part).dequantize()
