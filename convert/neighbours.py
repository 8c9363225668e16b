"""What lies beside the weights of layers that become INT8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from ..loaders.safetensors_int8 import QUANTIZATION_LEAVES


def leftovers(weights: Mapping[str, object], modules: Set[str]) -> list[str]:
    """The keys of scales and markers beside the weights of these layers: of a quantization that a weight of floats does
    not have. The INT8 weight gets its own under these names."""
    return [key for key, _, leaf in _beside(weights, modules) if leaf in QUANTIZATION_LEAVES]


def unknown(weights: Mapping[str, object], modules: Set[str]) -> dict[str, str]:
    """Those of these layers that cannot become INT8, because the loaders refuse what they do not know beside a
    quantized weight, and a key of that."""
    return {module: key for key, module, leaf in _beside(weights, modules) if leaf not in QUANTIZATION_LEAVES}


def _beside(weights: Mapping[str, object], modules: Set[str]) -> Iterator[tuple[str, str, str]]:
    for key in weights:
        module, _, leaf = key.rpartition(".")
        if module in modules and leaf not in ("weight", "bias"):
            yield key, module, leaf
