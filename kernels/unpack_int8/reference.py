"""Unpacking in plain torch, as `formats.int8` defines it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import UnpackInt8Call


def supports(call: UnpackInt8Call) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: UnpackInt8Call) -> torch.Tensor:
    return call.weight.dequantize(call.dtype)
