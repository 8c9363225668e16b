"""GGML blocks [N, row bytes] -> int8 rows [N, K] with one scale a row: wq = round(w / row_scale)."""

import dataclasses

import torch

from ...formats import ggml
from ..dispatch import Op, custom_op

OP = Op(__name__, ("reference",))


@dataclasses.dataclass(frozen=True)
class UnpackToInt8Call:
    """One checked call: `blocks` uint8 [N, row bytes], the GGML type's name, `row_scale` float32 [N, 1] or None to
    find it."""

    blocks: torch.Tensor
    ggml_type: str
    row_scale: torch.Tensor | None


def unpack_to_int8(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack a quantized weight for the INT8 product.

    blocks: uint8 [N, row bytes]. row_scale: float32 [N, 1], the absmax of a row / 127 on the float32 values, kept by
    the caller from an earlier call; None finds it. Returns wq int8 [N, K] and row_scale.
    Raises ValueError for blocks or scales whose shape or dtype does not fit.
    """
    if blocks.dtype != torch.uint8 or blocks.dim() != 2:
        raise ValueError(f"unpack_to_int8 needs uint8 blocks [N, row bytes], got {blocks.dtype} {tuple(blocks.shape)}")
    if row_scale is not None and tuple(row_scale.shape) != (blocks.shape[0], 1):
        raise ValueError(f"unpack_to_int8: row_scale must be [{blocks.shape[0]}, 1], got {tuple(row_scale.shape)}")
    ggml.logical_K(ggml_type, blocks.shape[-1])
    if row_scale is None:
        return torch.ops.lowbit.unpack_to_int8_finding_scale(blocks, ggml_type)
    return torch.ops.lowbit.unpack_to_int8(blocks, ggml_type, row_scale), row_scale


@custom_op("unpack_to_int8")
def _unpack_to_int8(blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor) -> torch.Tensor:
    return OP.run(UnpackToInt8Call(blocks, ggml_type, row_scale))[0]


@_unpack_to_int8.register_fake
def _(blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor) -> torch.Tensor:
    return blocks.new_empty((blocks.shape[0], ggml.logical_K(ggml_type, blocks.shape[1])), dtype=torch.int8)


@custom_op("unpack_to_int8_finding_scale")
def _unpack_to_int8_finding_scale(blocks: torch.Tensor, ggml_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    return OP.run(UnpackToInt8Call(blocks, ggml_type, None))


@_unpack_to_int8_finding_scale.register_fake
def _(blocks: torch.Tensor, ggml_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    wq = blocks.new_empty((blocks.shape[0], ggml.logical_K(ggml_type, blocks.shape[1])), dtype=torch.int8)
    return wq, blocks.new_empty((blocks.shape[0], 1), dtype=torch.float32)
