"""The weight unpacked into scratch memory by the fastest `unpack` there is, then the library's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..unpack import OP as UNPACK
from ..unpack import UnpackCall

if TYPE_CHECKING:
    from . import GgmlLinearCall


def supports(call: GgmlLinearCall) -> str | None:
    """None: some implementation of `unpack` takes every weight."""
    return None


def run(call: GgmlLinearCall) -> torch.Tensor:
    w = UNPACK.run(UnpackCall(call.blocks, call.ggml_type, call.x.dtype, in_scratch=True))
    return torch.nn.functional.linear(call.x, w, None if call.bias is None else call.bias.to(call.x.dtype))
