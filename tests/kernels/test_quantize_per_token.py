import pytest
import torch
from lowbit.formats import chunks
from lowbit.formats.int8 import rotate
from lowbit.kernels.quantize_per_token import quantize_per_token


def definition(x, smooth=None, rotation_group=0):
    """x / scale and scale in float64, apart from the rotation, which is the format's own."""
    x = x.double() if smooth is None else x.double() * smooth.double()
    x = rotate(x, rotation_group) if rotation_group else x
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return x / scale, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (17, 528), (2, 3, 256)], ids=["one_token", "ragged", "batched"])
@pytest.mark.parametrize("options", ["plain", "smooth", "rotated"])
def test_codes_and_scales_are_the_definitions(dtype, shape, options, device, poison_empty):
    if options == "rotated" and shape[-1] % 16:
        pytest.skip("no group size divides this K")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    smooth = torch.rand(shape[-1], device=device) + 0.5 if options == "smooth" else None
    rotation_group = 16 if options == "rotated" else 0
    xq, x_scale = quantize_per_token(x, smooth, rotation_group)
    scaled, scale = definition(x, smooth, rotation_group)
    assert (xq.dtype, xq.shape) == (torch.int8, x.shape)
    assert (x_scale.dtype, x_scale.shape) == (torch.float32, (*shape[:-1], 1))
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(x_scale.double(), scale, rtol=4 * eps, atol=0)
    assert (
        xq.double() - scaled
    ).abs().max() <= 0.5 + 127 * 4 * eps  # the nearest integer, up to float32's own rounding
    assert xq.abs().max() == 127


def test_strided_tokens_are_quantized_like_contiguous_ones(device):
    x = torch.randn(64, 34, device=device).t()[::2]
    for strided, plain in zip(quantize_per_token(x), quantize_per_token(x.contiguous()), strict=True):
        assert torch.equal(strided, plain)


def test_a_token_of_zeros_gives_zeros_and_a_positive_scale(device):
    xq, x_scale = quantize_per_token(torch.zeros(2, 32, device=device))
    assert torch.equal(xq, torch.zeros_like(xq)) and torch.equal(x_scale, torch.full_like(x_scale, 1e-30))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_spoils_only_itself(value, device):
    x = torch.randn(3, 32, device=device)
    alone = quantize_per_token(x)
    x[1, 5] = value
    xq, x_scale = quantize_per_token(x)
    assert not x_scale[1].isfinite() and torch.equal(xq[1], torch.zeros_like(xq[1]))
    for row in (0, 2):
        assert torch.equal(xq[row], alone[0][row]) and torch.equal(x_scale[row], alone[1][row])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs floating-point activations, got torch\.int32"):
        quantize_per_token(torch.zeros(2, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"smooth must have shape \(32,\), got \(31,\)"):
        quantize_per_token(torch.zeros(2, 32), torch.ones(31))
    with pytest.raises(ValueError, match="rotation group 64 does not divide K=96"):
        quantize_per_token(torch.zeros(2, 96), rotation_group=64)


def test_chunks_of_tokens_give_the_same(device, monkeypatch):
    x = torch.randn(50, 64, device=device)
    whole = quantize_per_token(x)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 64 * 7)
    for chunked, expected in zip(quantize_per_token(x), whole, strict=True):
        assert torch.equal(chunked, expected)
