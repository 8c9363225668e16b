"""What the bytes of quantized weights mean, both directions: plain torch, any device, no file, no model, no host."""

from .base import QuantizedWeight, UnknownQuantizationError
from .fp8 import Fp8Weight
from .ggml import GgmlType, GgmlWeight
from .int8 import Int8Weight

__all__ = ["Fp8Weight", "GgmlType", "GgmlWeight", "Int8Weight", "QuantizedWeight", "UnknownQuantizationError"]
