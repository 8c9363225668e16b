"""y[M, N] = (xq[M, K] @ wq[N, K].T) * x_scale[M, 1] * w_scale[N, 1].T + bias[N] + hidden[M, R] @ up[N, R].T: exact
int32 sum, one float32 epilogue, which has room for a low-rank term such as a LoRA's."""

import dataclasses

import torch

from ..dispatch import Op, custom_op

OP = Op(__name__, ("triton_impl", "torch_impl", "reference"))


@dataclasses.dataclass(frozen=True)
class Int8LinearCall:
    """One checked call: xq int8 [M, K], x_scale float32 [M, 1], wq int8 [N, K], w_scale float32 [1, 1] or [N, 1], bias
    [N], hidden [M, R] and up [N, R] of the out dtype, or both None. tune: whether a kernel may measure its
    configurations at first use."""

    xq: torch.Tensor
    x_scale: torch.Tensor
    wq: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor | None
    out_dtype: torch.dtype
    tune: bool = False
    hidden: torch.Tensor | None = None
    up: torch.Tensor | None = None

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
        if self.bias is not None:
            y += self.bias.float()
        if self.hidden is not None:
            y += self.hidden.float() @ self.up.float().t()
        return y.to(self.out_dtype)


def int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tune: bool = True,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The linear layer on quantized operands.

    xq: int8 [..., K]. x_scale: float32 [..., 1], per-token. wq: int8 [N, K]. w_scale: float32, per-tensor (one
    element) or per-channel (N elements). bias: [N] or None. tune: whether a kernel may measure its configurations at
    the first call of a shape (`kernels.tuning`). low_rank: hidden [..., R] and up [N, R] in out_dtype, or None: adds
    hidden @ up.T. Returns [..., N] in out_dtype. The integer sum is exact for K < 131072.

    Raises ValueError naming shapes and dtypes that do not fit.
    """
    K, N = xq.shape[-1], wq.shape[0]
    if xq.dtype != torch.int8 or wq.dtype != torch.int8:
        raise ValueError(f"int8_linear needs int8 operands, got xq {xq.dtype} and wq {wq.dtype}")
    if xq.device != wq.device:
        raise ValueError(f"int8_linear needs its operands on one device, got xq on {xq.device} and wq on {wq.device}")
    if not out_dtype.is_floating_point:
        raise ValueError(f"int8_linear gives a floating dtype, not {out_dtype}")
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
    hidden, up = flat_low_rank("int8_linear", xq, N, out_dtype, low_rank)
    y = torch.ops.lowbit.int8_linear(
        xq.reshape(-1, K), x_scale.reshape(-1, 1), wq, w_scale.reshape(-1, 1), bias, out_dtype, tune, hidden, up
    )
    return y.reshape(*xq.shape[:-1], N)


def flat_low_rank(
    op: str, xq: torch.Tensor, N: int, out_dtype: torch.dtype, low_rank: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """hidden [M, R] and up [N, R] of a low-rank term for tokens xq [..., K]. Raises ValueError for other shapes."""
    if low_rank is None:
        return None, None
    hidden, up = low_rank
    rank = up.shape[-1]
    if tuple(hidden.shape) != (*xq.shape[:-1], rank) or tuple(up.shape) != (N, rank):
        raise ValueError(
            f"{op}: a low-rank term needs hidden {(*xq.shape[:-1], 'R')} and up {(N, 'R')}, got "
            f"{tuple(hidden.shape)} and {tuple(up.shape)}"
        )
    if hidden.dtype != out_dtype or up.dtype != out_dtype:
        raise ValueError(f"{op}: a low-rank term must be {out_dtype}, got {hidden.dtype} and {up.dtype}")
    return hidden.reshape(-1, rank), up


@custom_op("int8_linear")
def _int8_linear(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
    hidden: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    return OP.run(Int8LinearCall(xq, x_scale, wq, w_scale, bias, out_dtype, tune, hidden, up))


@_int8_linear.register_fake
def _(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    wq: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tune: bool,
    hidden: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)
