"""Of what a linear layer reads, x[M, K]: each channel's largest magnitude and sum of squares so far, and some tokens,
updated in place in one pass."""

import dataclasses

import torch

from ..dispatch import Op

OP = Op(__name__, ("triton_impl", "reference"))

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class RecordChannelsCall:
    """One checked call: `x` bf16, fp16 or fp32 [M, K] with M at least 1, `absmax` and `square_sum` float32 [K],
    `sample` bfloat16 [S, K], `rows` and `slots` int64 [n], n at most S. All but `x` are contiguous."""

    x: torch.Tensor
    absmax: torch.Tensor
    square_sum: torch.Tensor
    sample: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor


def record_channels(
    x: torch.Tensor,
    absmax: torch.Tensor,
    square_sum: torch.Tensor,
    sample: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """absmax = max(absmax, |x|), square_sum += x**2 of each channel, and sample[slots[i]] = x[rows[i]], in place.

    x: bf16, fp16 or fp32 [..., K]. absmax, square_sum: float32 [K]. sample: bfloat16 [S, K]. rows, slots: int64 [n],
    n at most S: which of the M tokens in x go where; slots are distinct. Both must be in range: nobody looks, because
    that would wait for the device. A NaN or an infinity reaches its channel's absmax and square_sum. No tokens change
    nothing.

    It writes to its arguments and is only called outside of compiled code: it is no operator of torch.ops.

    Raises ValueError naming shapes, dtypes and devices that do not fit.
    """
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ValueError(f"record_channels: x must be bf16, fp16 or fp32 [..., K], got {_text(x)}")
    K = x.shape[-1]
    for name, tensor in (("absmax", absmax), ("square_sum", square_sum)):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (K,) or not tensor.is_contiguous():
            raise ValueError(f"record_channels: {name} must be contiguous float32 of shape ({K},), got {_text(tensor)}")
    if sample.dtype != torch.bfloat16 or sample.shape[1:] != (K,) or not sample.is_contiguous():
        raise ValueError(f"record_channels: sample must be contiguous bfloat16 [S, {K}], got {_text(sample)}")
    if rows.dtype != torch.int64 or slots.dtype != torch.int64 or rows.dim() != 1 or rows.shape != slots.shape:
        raise ValueError(
            f"record_channels: rows and slots must be int64 of one shape [n], got {_text(rows)} and {_text(slots)}"
        )
    if rows.shape[0] > sample.shape[0]:
        raise ValueError(f"record_channels: {rows.shape[0]} rows do not fit a sample of {sample.shape[0]}")
    others = (absmax, square_sum, sample, rows, slots)
    if any(tensor.device != x.device for tensor in others):
        devices = {str(tensor.device) for tensor in (x, *others)}
        raise ValueError(f"record_channels: all tensors must be on one device, got {', '.join(sorted(devices))}")
    if x.numel():
        tokens = x.detach().reshape(-1, K)
        OP.run(RecordChannelsCall(tokens, absmax, square_sum, sample, rows.contiguous(), slots.contiguous()))


def _text(tensor: torch.Tensor) -> str:
    strided = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    return f"{tensor.dtype} {tuple(tensor.shape)}{strided}"
