"""What the bytes of a quantized weight mean, as values: no file, no model, no host.

A weight is logically `[N, K]` (output features, input features); `dequantize` gives that matrix back. The three kinds
are the INT8 weight of W8A8 files, the GGML blocks of GGUF files, and the FP8 weight, which is only ever a source to
quantize from.
"""

from __future__ import annotations

import abc
import dataclasses

import torch


class UnknownQuantizationError(ValueError):
    """A quantization type that no format here describes. The text names the type and the known ones."""


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: comparing tensors has no single truth value
class QuantizedWeight(abc.ABC):
    """A quantized tensor: its bytes as they lie in the file and its logical shape.

    data: the stored bytes; dtype and shape belong to the format.
    shape: logical shape, `(N, K)` for the weight of a linear layer.
    """

    data: torch.Tensor
    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def format_name(self) -> str:
        """The name a person reads and a saved file carries: `int8`, `gguf_q4_k`, `fp8_e4m3`."""

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that the weight needs."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that make up the weight, by field name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}

    @abc.abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The logical matrix: computed in float32, rounded once to `dtype`."""


def described(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape for an error text: `int8 [12, 64]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def require_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"weights dequantize to a floating dtype, found {str(dtype).removeprefix('torch.')}")
