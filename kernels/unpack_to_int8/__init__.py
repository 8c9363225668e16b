"""GGML blocks [N, row bytes] -> int8 rows [N, K] with one scale a row: wq = round(w * (1 / row_scale))."""

import dataclasses

import torch

from ...formats import ggml
from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class UnpackToInt8Call:
    """One checked call: `blocks` uint8 [N, row bytes], the GGML type's name, `row_scale` float32 [N, 1], or None
    where it is what is asked for, `rotation_group` 0 or a divisor of K. in_scratch: as in `unpack`."""

    blocks: torch.Tensor
    ggml_type: str
    row_scale: torch.Tensor | None
    rotation_group: int = 0
    in_scratch: bool = False

    @property
    def K(self) -> int:
        return ggml.logical_K(self.ggml_type, self.blocks.shape[1])


def unpack_to_int8(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor | None = None, rotation_group: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack a quantized weight for the INT8 product.

    blocks: uint8 [N, row bytes]. row_scale: float32 [N, 1], the absmax of a row / 127 on the float32 values, kept by
    the caller from an earlier call with these blocks; None finds it. A smaller scale than that is not noticed: codes
    beyond int8 wrap around. rotation_group: 0, or the size of the Hadamard groups that the float32 values are rotated
    by along K first; the activations of the product are to be rotated likewise. Returns wq int8 [N, K], within
    [-127, 127], and row_scale. A row that holds a NaN or an infinity gets that as its scale, and codes without a
    meaning.
    Raises ValueError for blocks or scales whose shape or dtype does not fit, and for a group that does not fit K.
    """
    _check("unpack_to_int8", blocks, ggml_type, rotation_group)
    if row_scale is not None and (tuple(row_scale.shape) != (blocks.shape[0], 1) or row_scale.dtype != torch.float32):
        raise ValueError(
            f"unpack_to_int8: row_scale must be float32 [{blocks.shape[0]}, 1], "
            f"got {row_scale.dtype} {tuple(row_scale.shape)}"
        )
    if row_scale is None:
        row_scale = torch.ops.lowbit.find_row_scale(blocks, ggml_type, rotation_group)
    return torch.ops.lowbit.unpack_to_int8(blocks, ggml_type, row_scale, rotation_group), row_scale


def find_row_scale(blocks: torch.Tensor, ggml_type: str, rotation_group: int = 0) -> torch.Tensor:
    """The row_scale, float32 [N, 1], that `unpack_to_int8` finds, without its codes. Arguments and errors as there."""
    _check("find_row_scale", blocks, ggml_type, rotation_group)
    return torch.ops.lowbit.find_row_scale(blocks, ggml_type, rotation_group)


def _check(op: str, blocks: torch.Tensor, ggml_type: str, rotation_group: int) -> None:
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] == 0:
        raise ValueError(f"{op} needs uint8 blocks [N, row bytes], got {blocks.dtype} {tuple(blocks.shape)}")
    K = ggml.logical_K(ggml_type, blocks.shape[-1])
    if rotation_group and K % rotation_group:
        raise ValueError(f"{op}: rotation group {rotation_group} does not divide K={K}")


@custom_op("unpack_to_int8")
def _unpack_to_int8(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, rotation_group: int = 0
) -> torch.Tensor:
    return OP.run(UnpackToInt8Call(blocks, ggml_type, row_scale, rotation_group))


@_unpack_to_int8.register_fake
def _(blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, rotation_group: int = 0) -> torch.Tensor:
    return blocks.new_empty((blocks.shape[0], ggml.logical_K(ggml_type, blocks.shape[1])), dtype=torch.int8)


@custom_op("find_row_scale")
def _find_row_scale(blocks: torch.Tensor, ggml_type: str, rotation_group: int = 0) -> torch.Tensor:
    call = UnpackToInt8Call(blocks, ggml_type, None, rotation_group)
    return OP.pick(call).find_row_scale(call)


@_find_row_scale.register_fake
def _(blocks: torch.Tensor, ggml_type: str, rotation_group: int = 0) -> torch.Tensor:
    return blocks.new_empty((blocks.shape[0], 1), dtype=torch.float32)
