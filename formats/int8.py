"""INT8 weights of W8A8: w = scale * q, with optional smoothing and rotation of the input features.

The product that a weight stands for, with x[M, K] the activations of a linear layer:

    xq, x_scale = quantize_per_token(rotate(x * smooth))
    y[M, N] = (xq @ data.T) * x_scale * scale.T

so the logical weight is `rotate(data * scale) * smooth`. `smooth` multiplies the activations (SmoothQuant divides by
its factors: their reciprocals are kept here), and the weight was divided by it before it was rotated and quantized.

Rotation (ComfyUI's "ConvRot") mixes groups of `rotation_group` neighbouring input features with a Hadamard matrix H.
H is regular (its rows all sum to the same number), orthonormal and symmetric, so it is its own inverse: the same
`rotate` serves activations (x @ H), weights (w @ H.T) and the way back, and the host's two conventions are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from .base import QuantizedWeight, described, require_floating
from .chunks import row_chunks
from .division import divided

MAX_CODE = 127
# As in the host: a row of zeros keeps a positive scale, so that nothing divides by zero; its codes are 0 all the same.
SMALLEST_SCALE = 1e-30

_hadamard_cache: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Weight(QuantizedWeight):
    """data: int8 [N, K]; shape: (N, K).

    scale: float32, per-tensor () or [1], or per-channel [N, 1].
    smooth: float32 [K], multiplies the activations before the product; or None.
    rotation_group: 0, or the Hadamard group size by which activations are rotated before the product.
    prefers_exact: whether whoever made it wants its product computed in floats, as the host's markers can say.
    """

    scale: torch.Tensor
    smooth: torch.Tensor | None = None
    rotation_group: int = 0
    prefers_exact: bool = False

    def __post_init__(self) -> None:
        if self.data.dtype != torch.int8 or self.data.dim() != 2 or tuple(self.data.shape) != tuple(self.shape):
            raise ValueError(f"an INT8 weight of shape {list(self.shape)} is int8 [N, K], found {described(self.data)}")
        N, K = self.data.shape
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) not in ((), (1,), (N, 1)):
            raise ValueError(
                f"the scale of an INT8 weight is float32 [], [1] or [{N}, 1] (N={N}), found {described(self.scale)}"
            )
        if self.smooth is not None:
            _check_smooth(self.smooth, K)
        if self.rotation_group:
            _check_rotation(self.rotation_group, K)

    @property
    def per_channel(self) -> bool:
        return self.scale.dim() == 2

    @property
    def format_name(self) -> str:
        return "int8" + ("_smooth" if self.smooth is not None else "") + ("_convrot" if self.rotation_group else "")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        require_floating(dtype)
        weight = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
        for rows in row_chunks(*self.data.shape, self.data.device):
            values = self.data[rows].to(torch.float32)
            values = values.mul_(self.scale[rows] if self.per_channel else self.scale)
            if self.rotation_group:
                values = rotate(values, self.rotation_group)
            if self.smooth is not None:
                values = values.mul_(self.smooth)
            weight[rows].copy_(values)
        return weight


def quantize_weight(
    w: torch.Tensor, per_channel: bool = True, smooth: torch.Tensor | None = None, rotation_group: int = 0
) -> Int8Weight:
    """Symmetric INT8 of a floating w[N, K]: smoothed (divided), rotated, then quantized, all in float32.

    scale = max(absmax / 127, 1e-30), per output channel or of the whole weight; q = w / scale rounded to float32, then
    to an integer with halves to even, within [-127, 127]. A row of zeros gets the scale 1e-30 and codes 0. Values that
    are not finite are refused.
    """
    if w.dim() != 2 or not w.dtype.is_floating_point or w.numel() == 0:
        raise ValueError(f"a weight to quantize is floating point [N, K] and not empty, found {described(w)}")
    N, K = w.shape
    if smooth is not None:
        _check_smooth(smooth, K)
    if rotation_group:
        _check_rotation(rotation_group, K)
    w = w.detach()

    def prepared() -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in row_chunks(N, K, w.device):
            values = w[rows].to(torch.float32)
            if smooth is not None:
                values = values / smooth
            yield rows, rotate(values, rotation_group) if rotation_group else values

    data = torch.empty((N, K), dtype=torch.int8, device=w.device)
    if per_channel:
        scale = torch.empty((N, 1), dtype=torch.float32, device=w.device)
        for rows, values in prepared():
            scale[rows] = symmetric_scale(values.abs().amax(dim=1, keepdim=True))
            data[rows] = _codes(values, scale[rows])
    else:
        scale = symmetric_scale(torch.stack([values.abs().amax() for _, values in prepared()]).amax())
        for rows, values in prepared():
            data[rows] = _codes(values, scale)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("a weight to quantize must be finite (also after division by smooth), found NaN or infinity")
    return Int8Weight(data=data, shape=(N, K), scale=scale, smooth=smooth, rotation_group=rotation_group)


def hadamard(group_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The regular, symmetric, orthonormal Hadamard matrix [group_size, group_size], exact in every floating dtype.

    Cached per device and dtype: not to be written to.
    """
    if not _is_power_of_four(group_size):
        raise ValueError(f"a rotation group has 4, 16, 64, 256, ... features, found {group_size}")
    key = (group_size, torch.device(device), dtype)
    if (cached := _hadamard_cache.get(key)) is not None:
        return cached
    # An inference tensor in the cache could never take part in training, hence the mode is left while it is made.
    with torch.inference_mode(False):
        seed = torch.ones((4, 4), dtype=torch.float32, device=device) - 2 * torch.eye(
            4, dtype=torch.float32, device=device
        ).flip(0)
        matrix = seed
        while matrix.shape[0] < group_size:
            matrix = torch.kron(matrix, seed)
        matrix = (matrix / group_size**0.5).to(dtype)
    if type(matrix) is torch.Tensor:  # a tracer's stand-in must not outlive its trace
        _hadamard_cache[key] = matrix
    return matrix


def rotate(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x[..., K] with every group of `group_size` neighbours multiplied by H, in x's own dtype as the host does.

    Its own inverse. float32 assumes torch's default of no TF32 in matmuls.
    """
    _check_rotation(group_size, x.shape[-1])
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return rotate(x, group_size)
    groups = x.unflatten(-1, (-1, group_size))
    return torch.matmul(groups, hadamard(group_size, x.device, x.dtype)).flatten(-2)


def symmetric_scale(absmax: torch.Tensor) -> torch.Tensor:
    """max(absmax / 127, 1e-30): the scale of symmetric INT8, of weights and activations alike, in absmax's dtype."""
    return divided(absmax, MAX_CODE).clamp(min=SMALLEST_SCALE)


def _codes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)


def _is_power_of_four(size: int) -> bool:
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


def _check_smooth(smooth: torch.Tensor, K: int) -> None:
    if smooth.dtype != torch.float32 or tuple(smooth.shape) != (K,):
        raise ValueError(f"the smooth factors of an INT8 weight are float32 [{K}] (K={K}), found {described(smooth)}")


def _check_rotation(group_size: int, K: int) -> None:
    if not _is_power_of_four(group_size):
        raise ValueError(f"a rotation group has 4, 16, 64, 256, ... features, found {group_size}")
    if K % group_size:
        raise ValueError(f"K={K} is not a multiple of the rotation group of {group_size} features")
