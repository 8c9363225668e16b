"""y[M, N] = (x[M, K] @ wq[N, K].T) * w_scale[N, 1].T + bias[N] for few tokens: the weight is read as int8, the
activations stay floats."""

import dataclasses

import torch

from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "reference"))

LARGEST_M = 16  # beyond, the product itself costs more than reading the weight, and INT8 tensor cores win


@dataclasses.dataclass(frozen=True)
class WeightOnlyInt8LinearCall:
    """One checked call: x float [M, K], wq int8 [N, K], w_scale float32 [1, 1] or [N, 1], bias [N] or None."""

    x: torch.Tensor
    wq: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor | None


def weight_only_int8_linear(
    x: torch.Tensor, wq: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear layer on an INT8 weight and float activations, for calls that are bound by reading the weight.

    x: float [..., K], of at most 16 tokens. wq: int8 [N, K]. w_scale: float32, per-tensor (one element) or per-channel
    (N elements). bias: [N] or None. Returns [..., N] in x's dtype: the sum in float32, rounded once.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    K, N = x.shape[-1], wq.shape[0]
    if not x.dtype.is_floating_point or wq.dtype != torch.int8:
        raise ValueError(f"weight_only_int8_linear needs float x and int8 wq, got {x.dtype} and {wq.dtype}")
    if x.device != wq.device:
        raise ValueError(
            f"weight_only_int8_linear needs its operands on one device, got x on {x.device} and wq on {wq.device}"
        )
    if wq.dim() != 2 or wq.shape[1] != K:
        raise ValueError(f"weight_only_int8_linear: x {tuple(x.shape)} and wq {tuple(wq.shape)} do not share K")
    if x.numel() > LARGEST_M * K:
        raise ValueError(f"weight_only_int8_linear is for at most {LARGEST_M} tokens, got x {tuple(x.shape)}")
    if w_scale.numel() not in (1, N) or w_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_only_int8_linear: w_scale must hold 1 or N={N} float32 values, got {w_scale.dtype} "
            f"{tuple(w_scale.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"weight_only_int8_linear: bias must have shape ({N},), got {tuple(bias.shape)}")
    y = torch.ops.lowbit.weight_only_int8_linear(x.reshape(-1, K), wq, w_scale.reshape(-1, 1), bias)
    return y.reshape(*x.shape[:-1], N)


@custom_op("weight_only_int8_linear")
def _weight_only_int8_linear(
    x: torch.Tensor, wq: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return OP.run(WeightOnlyInt8LinearCall(x, wq, w_scale, bias))


@_weight_only_int8_linear.register_fake
def _(x: torch.Tensor, wq: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], wq.shape[0]))
