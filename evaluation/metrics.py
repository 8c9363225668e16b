"""Errors as signal to quantization noise in dB: 20 is a relative error of 10 %, 40 of 1 %."""

from __future__ import annotations

import math

import torch

# What a comparison without any error counts as, so that files and tables hold numbers only.
EXACT_DB = 200.0


def sqnr_db(signal_energy: float, noise_energy: float) -> float:
    """10 log10(signal / noise) of sums of squares: EXACT_DB without noise, -EXACT_DB for noise alone."""
    if noise_energy == 0:
        return EXACT_DB
    if signal_energy == 0:
        return -EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal_energy / noise_energy)))


def energy(x: torch.Tensor) -> float:
    """The sum of squares, in float64: squares of float32 may be larger than the largest of it, or zero."""
    if x.device.type not in ("cpu", "cuda"):
        x = x.cpu()  # Apple's GPUs and some of Intel's have no float64
    return float(x.double().square().sum())


def sqnr_of(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The SQNR of float32 tensors of one shape."""
    return sqnr_db(energy(expected), energy(actual - expected))
