"""y[M, N] = x[M, K] @ w[N, K].T + bias[N] with w the values of GGML blocks [N, row bytes] in x's dtype."""

import dataclasses

import torch

from ...formats import ggml
from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "torch_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class GgmlLinearCall:
    """One checked call: x float [M, K], blocks uint8 [N, row bytes], the GGML type's name, bias [N] or None."""

    x: torch.Tensor
    blocks: torch.Tensor
    ggml_type: str
    bias: torch.Tensor | None


def ggml_linear(
    x: torch.Tensor, blocks: torch.Tensor, ggml_type: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear layer as a GGUF file means it. No gradients.

    x: float [..., K]. blocks: uint8 [N, row bytes] of the GGML type (`Q4_K`, `Q8_0`, ...). bias: [N] or None. Returns
    [..., N] in x's dtype: of weights rounded to x's dtype or not at all; summed in float32 by Triton for few tokens,
    else by the library's product as torch is set.
    Raises ValueError naming shapes and dtypes that do not fit, UnknownQuantizationError for the type.
    """
    K = x.shape[-1]
    if not x.dtype.is_floating_point or blocks.dtype != torch.uint8 or blocks.dim() != 2:
        raise ValueError(
            f"ggml_linear needs float x and uint8 blocks [N, row bytes], got {x.dtype} and {blocks.dtype} "
            f"{tuple(blocks.shape)}"
        )
    if x.device != blocks.device:
        raise ValueError(
            f"ggml_linear needs its operands on one device, got x on {x.device} and blocks on {blocks.device}"
        )
    if ggml.logical_K(ggml_type, blocks.shape[1]) != K:
        raise ValueError(
            f"ggml_linear: x {tuple(x.shape)} and {ggml_type} blocks {tuple(blocks.shape)} do not share K: the rows "
            f"hold {ggml.logical_K(ggml_type, blocks.shape[1])} values"
        )
    if bias is not None and tuple(bias.shape) != (blocks.shape[0],):
        raise ValueError(f"ggml_linear: bias must have shape ({blocks.shape[0]},), got {tuple(bias.shape)}")
    y = torch.ops.lowbit.ggml_linear(x.reshape(-1, K), blocks, ggml_type, bias)
    return y.reshape(*x.shape[:-1], blocks.shape[0])


@custom_op("ggml_linear")
def _ggml_linear(x: torch.Tensor, blocks: torch.Tensor, ggml_type: str, bias: torch.Tensor | None) -> torch.Tensor:
    return OP.run(GgmlLinearCall(x, blocks, ggml_type, bias))


@_ggml_linear.register_fake
def _(x: torch.Tensor, blocks: torch.Tensor, ggml_type: str, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], blocks.shape[0]))
