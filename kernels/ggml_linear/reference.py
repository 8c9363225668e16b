"""Unpacking in plain torch, as `formats.ggml` defines it, and the library's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...formats import ggml

if TYPE_CHECKING:
    from . import GgmlLinearCall


def supports(call: GgmlLinearCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: GgmlLinearCall) -> torch.Tensor:
    w = ggml.dequantize(call.blocks, call.ggml_type, call.x.dtype)
    return torch.nn.functional.linear(call.x, w, None if call.bias is None else call.bias.to(call.x.dtype))
