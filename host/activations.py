"""What a fused kernel hands a linear layer in place of a tensor, and when a layer has to be given the tensor."""

from __future__ import annotations

from typing import NamedTuple

import comfy.model_management
import torch


class Quantizer(NamedTuple):
    """How a layer's activations are quantized: smooth float32 [K] or None on their device, Hadamard group or 0."""

    smooth: torch.Tensor | None
    rotation_group: int

    def same_as(self, other: Quantizer | None) -> bool:
        return other is not None and self.smooth is other.smooth and self.rotation_group == other.rotation_group


class QuantizedActivations:
    """Activations [..., K] that a fused kernel has quantized already: what `LowbitLinear` takes in place of a tensor.

    parts: for each quantizer that a reader wants, the quantizer, codes int8 [..., K] and scales float32 [..., 1].
    dtype: of the activations, and of the layers' results. values: the activations themselves, if a reader wants them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        parts: list[tuple[Quantizer, torch.Tensor, torch.Tensor]],
        values: torch.Tensor | None = None,
    ):
        self.dtype, self.parts, self.values = dtype, parts, values

    @property
    def shape(self) -> torch.Size:
        return self.parts[0][1].shape

    @property
    def device(self) -> torch.device:
        return self.parts[0][1].device

    def codes_for(self, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The codes and scales by this quantizer, or None."""
        for other, xq, x_scale in self.parts:
            if quantizer.same_as(other):
                return xq, x_scale
        return None


def changed(module: torch.nn.Module) -> str | None:
    """What somebody else has put on a module so that it is to see what it would see in the host's own code, or None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a module has a forward hook"
    forward = module.__dict__.get("forward")
    # A pack that takes its patch back may leave the class's own function behind, bound to the module.
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "another pack has patched a module"
    return None


def differentiated(x: torch.Tensor) -> bool:
    """Whether gradients may be asked for through x, which quantized activations have none of."""
    return x.requires_grad or comfy.model_management.in_training
