"""The error of each compute mode on a GGML weight: what the file format costs, and what INT8 costs beyond that.

The activations are Gaussian, or Gaussian with a few channels many times louder, as they stand in front of an FFN's
down-projection. The bounds are those the README states.
"""

import pytest
import torch
from lowbit.formats import GgmlWeight, ggml
from lowbit.kernels.quantized_linear import ggml_weight_linear, row_rotation_group

M, N = 64, 96
LOUD_CHANNELS, LOUDNESS = 8, 30.0


def activations(K, loud):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    if loud:
        x[:, torch.randperm(K, generator=torch.Generator().manual_seed(2))[:LOUD_CHANNELS]] *= LOUDNESS
    return x


def relative(value, reference):
    return float((value.double() - reference).norm() / reference.norm())


def errors(ggml_type, K, loud, device):
    """(exact against the unquantized weight, int8 against exact)."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    weight = GgmlWeight(ggml.quantize(w, ggml_type).to(device), (N, K), ggml_type)
    x = activations(K, loud)
    original = x.double() @ w.double().t()
    exact, quantized = (ggml_weight_linear(x.to(device), weight, None, mode).cpu() for mode in ("exact", "int8"))
    return relative(exact, original), relative(quantized, exact.double())


@pytest.mark.parametrize("loud", [False, True], ids=["gaussian", "loud_channels"])
@pytest.mark.parametrize("K", [4608, 12288])
@pytest.mark.parametrize("ggml_type, of_format", [("Q4_K", 0.075), ("Q8_0", 0.0065)])
def test_int8_costs_little_beside_the_format(ggml_type, of_format, K, loud, device):
    exact, int8 = errors(ggml_type, K, loud, device)
    assert 0.7 * of_format < exact < of_format
    assert 5e-3 < int8 < 1.5e-2


def test_it_is_the_rotation_that_spreads_loud_channels(device, monkeypatch):
    _, rotated = errors("Q4_K", 4608, True, device)
    monkeypatch.setattr("lowbit.kernels.quantized_linear.row_rotation_group", lambda weight: 0)
    _, plain = errors("Q4_K", 4608, True, device)
    assert plain > 3 * rotated


def test_rows_that_hold_no_whole_groups_are_not_rotated():
    blocks = torch.zeros(4, ggml.row_size_bytes("Q8_0", 288), dtype=torch.uint8)
    assert row_rotation_group(GgmlWeight(blocks, (4, 288), "Q8_0")) == 0
