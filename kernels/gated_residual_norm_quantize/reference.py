"""The definitions of `gated_residual` and `rms_norm_scale_quantize`, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..gated_residual import GatedResidualCall
from ..gated_residual import reference as gated_residual
from ..rms_norm_scale_quantize import RmsNormScaleQuantizeCall
from ..rms_norm_scale_quantize import reference as rms_norm_scale_quantize

if TYPE_CHECKING:
    from . import GatedResidualNormQuantizeCall


def supports(call: GatedResidualNormQuantizeCall) -> str | None:
    """None: the definition runs every call, on any device."""
    return None


def run(call: GatedResidualNormQuantizeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = gated_residual.run(GatedResidualCall(call.residual, call.y, call.y_weight, call.gate, call.eps))
    norm_call = RmsNormScaleQuantizeCall(
        x, call.weight, call.scale, call.eps, call.smooth, call.rotation_group, call.keep_values
    )
    return x, *rms_norm_scale_quantize.run(norm_call)
