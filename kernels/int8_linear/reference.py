"""The definition: the integer product in float64, which holds it exactly, then the epilogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import Int8LinearCall


def supports(call: Int8LinearCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: Int8LinearCall) -> torch.Tensor:
    return call.epilogue(call.xq.double() @ call.wq.double().t())
