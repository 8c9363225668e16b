"""GGML blocks [N, row bytes] -> float weight [N, K]: the C library's arithmetic in float32, rounded once."""

import dataclasses

import torch

from ...formats import ggml
from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class UnpackCall:
    """One checked call: `blocks` uint8 [N, row bytes], the GGML type's name, the dtype wanted. in_scratch: whether the
    result may lie in memory that the next call overwrites (`kernels.scratch`)."""

    blocks: torch.Tensor
    ggml_type: str
    dtype: torch.dtype
    in_scratch: bool = False


def unpack(blocks: torch.Tensor, ggml_type: str, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a quantized weight for a product in floating point.

    blocks: uint8 [..., row bytes] as they lie in a GGUF file. ggml_type: `Q4_K`, `Q8_0`, .... Returns [..., K] in
    dtype.
    Raises ValueError for bytes that are not uint8 or no whole number of blocks, UnknownQuantizationError for the type.
    """
    K = ggml.logical_K(ggml_type, blocks.shape[-1])
    if blocks.dtype != torch.uint8:
        raise ValueError(f"unpack needs uint8 blocks, got {blocks.dtype}")
    weight = torch.ops.lowbit.unpack(blocks.reshape(-1, blocks.shape[-1]), ggml_type, dtype)
    return weight.reshape(*blocks.shape[:-1], K)


@custom_op("unpack")
def _unpack(blocks: torch.Tensor, ggml_type: str, dtype: torch.dtype) -> torch.Tensor:
    return OP.run(UnpackCall(blocks, ggml_type, dtype))


@_unpack.register_fake
def _(blocks: torch.Tensor, ggml_type: str, dtype: torch.dtype) -> torch.Tensor:
    return blocks.new_empty((blocks.shape[0], ggml.logical_K(ggml_type, blocks.shape[1])), dtype=dtype)
