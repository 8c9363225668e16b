"""Unpacking in plain torch, as `formats.ggml` defines it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats import ggml

if TYPE_CHECKING:
    from . import UnpackCall


def supports(call: UnpackCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: UnpackCall) -> torch.Tensor:
    return ggml.dequantize(call.blocks, call.ggml_type, call.dtype)
