"""`int8_linear` on the int8 rows that `unpack_to_int8` makes of GGML blocks, which live in scratch memory.

Composed of those two ops, whose implementations it uses; one op, because scratch memory must not outlive it.
"""

import torch

from ...formats import ggml
from ..dispatch import custom_op
from ..int8_linear import OP as INT8_LINEAR
from ..int8_linear import Int8LinearCall, flat_low_rank
from ..unpack_to_int8 import OP as UNPACK_TO_INT8
from ..unpack_to_int8 import UnpackToInt8Call


def ggml_int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    blocks: torch.Tensor,
    ggml_type: str,
    row_scale: torch.Tensor,
    rotation_group: int = 0,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tune: bool = True,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The linear layer on quantized activations and a GGML weight.

    xq: int8 [..., K], rotated as the rows are to be. x_scale: float32 [..., 1], per-token. blocks: uint8 [N, row bytes]
    of the GGML type. row_scale: float32 [N, 1] that `find_row_scale` gave for these blocks and this rotation_group.
    bias: [N] or None. tune, low_rank: as in `int8_linear`. Returns [..., N] in out_dtype.
    Raises ValueError naming shapes and dtypes that do not fit, UnknownQuantizationError for the type.
    """
    N, K = blocks.shape[0], xq.shape[-1]
    if xq.dtype != torch.int8 or blocks.dtype != torch.uint8 or blocks.dim() != 2:
        raise ValueError(
            f"ggml_int8_linear needs int8 xq and uint8 blocks [N, row bytes], got {xq.dtype} and {blocks.dtype} "
            f"{tuple(blocks.shape)}"
        )
    if xq.device != blocks.device:
        raise ValueError(
            f"ggml_int8_linear needs its operands on one device, got xq on {xq.device} and blocks on {blocks.device}"
        )
    if ggml.logical_K(ggml_type, blocks.shape[1]) != K or K >= 131072:
        raise ValueError(
            f"ggml_int8_linear: xq {tuple(xq.shape)} and {ggml_type} blocks {tuple(blocks.shape)} do not share a K "
            f"below 131072: the rows hold {ggml.logical_K(ggml_type, blocks.shape[1])} values"
        )
    if x_scale.dtype != torch.float32 or tuple(x_scale.shape) != (*xq.shape[:-1], 1):
        raise ValueError(
            f"ggml_int8_linear: x_scale must be float32 {(*xq.shape[:-1], 1)}, "
            f"got {x_scale.dtype} {tuple(x_scale.shape)}"
        )
    if row_scale.dtype != torch.float32 or tuple(row_scale.shape) != (N, 1):
        raise ValueError(
            f"ggml_int8_linear: row_scale must be float32 {(N, 1)}, got {row_scale.dtype} {tuple(row_scale.shape)}"
        )
    if rotation_group and K % rotation_group:
        raise ValueError(f"ggml_int8_linear: rotation group {rotation_group} does not divide K={K}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"ggml_int8_linear: bias must have shape ({N},), got {tuple(bias.shape)}")
    hidden, up = flat_low_rank("ggml_int8_linear", xq, N, out_dtype, low_rank)
    y = torch.ops.lowbit.ggml_int8_linear(
        xq.reshape(-1, K),
        x_scale.reshape(-1, 1),
        blocks,
        ggml_type,
        row_scale,
        rotation_group,
        bias,
        out_dtype,
        tune,
        hidden,
        up,
    )
    return y.reshape(*xq.shape[:-1], N)


@custom_op("ggml_int8_linear")
def _ggml_int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    blocks: torch.Tensor,
    ggml_type: str,
    row_scale: torch.Tensor,
    rotation_group: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
    hidden: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    wq = UNPACK_TO_INT8.run(UnpackToInt8Call(blocks, ggml_type, row_scale, rotation_group, in_scratch=True))
    return INT8_LINEAR.run(Int8LinearCall(xq, x_scale, wq, row_scale, bias, out_dtype, tune, hidden, up))


@_ggml_int8_linear.register_fake
def _(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    blocks: torch.Tensor,
    ggml_type: str,
    row_scale: torch.Tensor,
    rotation_group: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
    hidden: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], blocks.shape[0]), dtype=out_dtype)
