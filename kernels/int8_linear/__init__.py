"""y[M, N] = (xq[M, K] @ wq[N, K].T) * x_scale[M, 1] * w_scale[N, 1].T + bias[N]: exact int32 sum, one float32
epilogue."""

import dataclasses

import torch

from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "torch_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class Int8LinearCall:
    """One checked call: xq int8 [M, K], x_scale float32 [M, 1], wq int8 [N, K], w_scale float32 [1, 1] or [N, 1], bias
    [N]. tune: whether a kernel may measure its configurations at first use."""

    xq: torch.Tensor
    x_scale: torch.Tensor
    wq: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype
    tune: bool = False

    @property
    def M(self) -> int:
        return self.xq.shape[0]

    @property
    def N(self) -> int:
        return self.wq.shape[0]

    @property
    def K(self) -> int:
        return self.xq.shape[1]

    @property
    def device(self) -> torch.device:
        return self.xq.device

    def epilogue(self, product: torch.Tensor) -> torch.Tensor:
        """Scales and bias in float32 on the product [M, N], rounded once to the out dtype."""
        y = product.float() * self.x_scale * self.w_scale.reshape(1, -1)
        return (y if self.bias is None else y + self.bias.float()).to(self.out_dtype)


def int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tune: bool = True,
) -> torch.Tensor:
    """The linear layer on quantized operands.

    xq: int8 [..., K]. x_scale: float32 [..., 1], per-token. wq: int8 [N, K]. w_scale: float32, per-tensor (one
    element) or per-channel (N elements). bias: [N] or None. tune: whether a kernel may measure its configurations at
    the first call of a shape (`kernels.tuning`). Returns [..., N] in out_dtype. The integer sum is exact for
    K < 131072.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    K, N = xq.shape[-1], wq.shape[0]
    if xq.dtype != torch.int8 or wq.dtype != torch.int8:
        raise ValueError(f"int8_linear needs int8 operands, got xq {xq.dtype} and wq {wq.dtype}")
    if wq.dim() != 2 or wq.shape[1] != K:
        raise ValueError(f"int8_linear: xq {tuple(xq.shape)} and wq {tuple(wq.shape)} do not share K")
    if K >= 131072:
        raise ValueError(f"int8_linear: K={K} could overflow the int32 sum, the limit is 131071")
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise ValueError(f"int8_linear: scales must be float32, got x_scale {x_scale.dtype}, w_scale {w_scale.dtype}")
    if w_scale.numel() not in (1, N):
        raise ValueError(f"int8_linear: w_scale must hold 1 or N={N} values, got shape {tuple(w_scale.shape)}")
    if tuple(x_scale.shape) != (*xq.shape[:-1], 1):
        raise ValueError(f"int8_linear: x_scale must have shape {(*xq.shape[:-1], 1)}, got {tuple(x_scale.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"int8_linear: bias must have shape ({N},), got {tuple(bias.shape)}")
    y = torch.ops.lowbit.int8_linear(
        xq.reshape(-1, K), x_scale.reshape(-1, 1), wq, w_scale.reshape(-1, 1), bias, out_dtype, tune
    )
    return y.reshape(*xq.shape[:-1], N)


@custom_op("int8_linear")
def _int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
) -> torch.Tensor:
    return OP.run(Int8LinearCall(xq, x_scale, wq, w_scale, bias, out_dtype, tune))


@_int8_linear.register_fake
def _(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)
