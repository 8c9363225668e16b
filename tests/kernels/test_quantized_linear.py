"""A layer composed of the ops, as others than the host may call it: fp16, autocast, gradients, modes and devices."""

import pytest
import torch
from lowbit.formats import GgmlWeight, ggml, int8
from lowbit.kernels.quantized_linear import ggml_weight_linear, int8_weight_linear

N, K = 96, 256


@pytest.fixture
def w(device):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device)


def activations(M, device, dtype=torch.float32):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def ggml_weight(w):
    return GgmlWeight(ggml.quantize(w.cpu(), "Q8_0").to(w.device), (N, K), "Q8_0")


def relative(value, reference):
    return float((value.double() - reference).norm() / reference.norm())


LAYERS = {
    "int8": lambda x, w, bias, mode: int8_weight_linear(x, int8.quantize_weight(w), bias, mode),
    "convrot": lambda x, w, bias, mode: int8_weight_linear(x, int8.quantize_weight(w, rotation_group=256), bias, mode),
    "q8_0": lambda x, w, bias, mode: ggml_weight_linear(x, ggml_weight(w), bias, mode),
}


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("M", [1, 16, 17])
def test_fp16_holds_no_smoothed_or_rotated_activations(w, M, mode, device):
    """The smoothed activations are beyond 65504, the result is not."""
    smooth = torch.full((K,), 1e4, device=device)
    weight = int8.quantize_weight(w, smooth=smooth, rotation_group=256)
    x = activations(M, device, torch.float16) * 10
    y = int8_weight_linear(x, weight, None, mode)
    assert relative(y, x.double() @ w.double().t()) < 0.02


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("M", [4, 32])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_bias_of_another_dtype(layer, w, M, mode, device):
    x, bias = activations(M, device, torch.bfloat16), torch.randn(N, device=device)
    y = layer(x, w, bias, mode)
    assert y.dtype == torch.bfloat16
    assert relative(y, x.double() @ w.double().t() + bias.double()) < 0.02


@pytest.mark.parametrize("M", [4, 32])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_an_int8_layer_under_autocast_is_the_same(layer, w, M, device):
    """What is int8 in it is no product that autocast knows."""
    x = activations(M, device)
    expected = layer(x, w, None, "int8")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(layer(x, w, None, "int8"), expected)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_an_exact_layer_under_autocast_keeps_the_dtype(layer, w, device):
    x = activations(32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x, w, None, "exact")
    assert y.dtype == torch.float32 and relative(y, x.double() @ w.double().t()) < 0.02


def test_parameters_are_quantized_where_no_gradients_are_asked_for(w, device):
    weight, x = int8.quantize_weight(w), torch.nn.Parameter(activations(32, device))
    with torch.no_grad():
        y = int8_weight_linear(x, weight, None, "int8")
    assert torch.equal(y, int8_weight_linear(x.detach(), weight, None, "int8"))


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("M", [4, 32])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_activations_that_need_gradients_get_those_of_the_exact_layer(layer, w, M, mode, device):
    with torch.inference_mode(False), torch.enable_grad():  # the host may have turned them off
        x = activations(M, device).requires_grad_()
        y = layer(x, w.clone(), None, mode)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert relative(y.detach(), layer(x.detach(), w, None, "exact").double()) < 1e-5
    assert relative(gradient, w.double().sum(dim=0).expand(M, K)) < 0.02


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_mode_that_is_none(layer, w, device):
    with pytest.raises(ValueError, match="compute mode 'auto': expected exact or int8; see `fastest_mode`"):
        layer(activations(4, device), w, None, "auto")


@pytest.mark.parametrize(
    "layer, mode, M, operands",
    [
        ("int8", "int8", 32, "xq on meta and wq on"),
        ("int8", "exact", 4, "x on meta and wq on"),
        ("q8_0", "int8", 32, "xq on meta and blocks on"),
        ("q8_0", "exact", 4, "x on meta and blocks on"),
    ],
)
def test_operands_on_two_devices(layer, mode, M, operands, w):
    with pytest.raises(ValueError, match=f"on one device, got {operands}"):
        LAYERS[layer](torch.empty(M, K, device="meta"), w, None, mode)
