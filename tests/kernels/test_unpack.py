"""Both unpacking ops on blocks made by the C library, and the linear composed of them."""

import pathlib

import numpy
import pytest
import torch
from lowbit.formats import GgmlWeight, Int8Weight, chunks, ggml, int8
from lowbit.kernels.quantized_linear import SMALL_M, ggml_weight_linear, int8_weight_linear
from lowbit.kernels.unpack import unpack
from lowbit.kernels.unpack_int8 import unpack_int8
from lowbit.kernels.unpack_to_int8 import unpack_to_int8

GOLDEN = numpy.load(pathlib.Path(__file__).parents[1] / "golden" / "ggml_blocks.npz")
TYPES = sorted(key.removesuffix("_bytes") for key in GOLDEN if key.endswith("_bytes"))


def golden(ggml_type, device):
    return (torch.from_numpy(GOLDEN[f"{ggml_type}_{kind}"]).to(device) for kind in ("bytes", "values"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ggml_type", TYPES)
def test_unpack_is_the_c_librarys_floats_rounded_once(ggml_type, dtype, device, poison_empty):
    blocks, values = golden(ggml_type, device)
    unpacked = unpack(blocks, ggml_type, dtype)
    assert unpacked.dtype == dtype and torch.equal(unpacked, values.to(dtype))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_int8_rows_are_the_rounded_values(ggml_type, device, poison_empty):
    blocks, values = golden(ggml_type, device)
    wq, row_scale = unpack_to_int8(blocks, ggml_type)
    scale = (values.abs().amax(1, keepdim=True).cpu() / 127).clamp(min=1e-30).to(device)
    assert torch.equal(row_scale, scale) and wq.dtype == torch.int8
    assert torch.equal(wq, (values / scale).round().clamp(-127, 127).to(torch.int8))
    again, kept = unpack_to_int8(blocks, ggml_type, row_scale)
    assert torch.equal(again, wq) and kept is row_scale


def test_unpack_to_int8_in_chunks_is_the_same(device, monkeypatch):
    blocks, _ = golden("Q4_K", device)
    whole = unpack_to_int8(blocks, "Q4_K")
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 768 * 7)
    for chunked, expected in zip(unpack_to_int8(blocks, "Q4_K"), whole, strict=True):
        assert torch.equal(chunked, expected)


def test_what_does_not_fit_is_refused():
    blocks = torch.zeros(4, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"unpack needs uint8 blocks, got torch\.int8"):
        unpack(blocks.view(torch.int8), "Q4_K", torch.float32)
    with pytest.raises(ValueError, match="a Q4_K row has a multiple of 144 bytes"):
        unpack(blocks[:, :143], "Q4_K", torch.float32)
    with pytest.raises(ValueError, match="unpack_to_int8 needs uint8 blocks"):
        unpack_to_int8(blocks[0], "Q4_K")
    with pytest.raises(ValueError, match=r"row_scale must be \[4, 1\], got \(4,\)"):
        unpack_to_int8(blocks, "Q4_K", torch.ones(4))


# The composed linear


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("M", [1, SMALL_M, SMALL_M + 1, 64])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0"])
def test_ggml_weight_linear(ggml_type, with_bias, M, mode, device):
    blocks, values = golden(ggml_type, device)
    blocks, values = blocks[:32], values[:32]
    x = torch.randn(M, 768, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.randn(32, device=device) if with_bias else None
    weight = GgmlWeight(blocks, (32, 768), ggml_type)
    y = ggml_weight_linear(x, weight, bias, mode)
    exact = torch.nn.functional.linear(x, values, bias)
    if mode == "exact" or M <= SMALL_M:
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-4)
    else:
        error = float((y - exact).norm() / exact.norm())
        assert 1e-4 < error < 0.02  # int8 rows and int8 activations, each within about half a percent
        kept = unpack_to_int8(blocks, ggml_type)[1]
        assert torch.equal(ggml_weight_linear(x, weight, bias, mode, kept), y)


@pytest.mark.parametrize("options", ["plain", "smooth", "rotated"])
def test_int8_weight_linear_modes_mean_the_same_weight(options, device):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=generator).to(device)
    smooth = (torch.rand(256, generator=generator) + 0.5).to(device) if options == "smooth" else None
    weight = int8.quantize_weight(w, smooth=smooth, rotation_group=256 if options == "rotated" else 0)
    assert isinstance(weight, Int8Weight)
    x = torch.randn(2, 40, 256, generator=generator).to(device)
    original = torch.nn.functional.linear(x, w)
    exact, quantized = (int8_weight_linear(x, weight, None, mode) for mode in ("exact", "int8"))
    assert float((exact - original).norm() / original.norm()) < 0.012
    assert 1e-3 < float((quantized - exact).norm() / exact.norm()) < 0.012


def test_quantized_ops_are_opaque_to_the_compiler(device):
    """Every op has a fake that agrees with it in shape, dtype and device."""
    blocks, _ = golden("Q4_K", device)
    _, row_scale = unpack_to_int8(blocks, "Q4_K")
    x = torch.randn(20, 768, device=device)
    xq, x_scale = torch.ops.lowbit.quantize_per_token(x, None, 0)
    wq = torch.ops.lowbit.unpack_to_int8(blocks, "Q4_K", row_scale)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lowbit.unpack, (blocks, "Q4_K", torch.bfloat16), test_utils=checks)
    torch.library.opcheck(torch.ops.lowbit.unpack_to_int8, (blocks, "Q4_K", row_scale), test_utils=checks)
    torch.library.opcheck(torch.ops.lowbit.unpack_to_int8_finding_scale, (blocks, "Q4_K"), test_utils=checks)
    torch.library.opcheck(torch.ops.lowbit.quantize_per_token, (x, None, 256), test_utils=checks)
    linear = (xq, x_scale, wq, row_scale, None, torch.bfloat16)
    torch.library.opcheck(torch.ops.lowbit.int8_linear, linear, test_utils=checks)


def test_the_golden_file_holds_every_quantized_type():
    assert TYPES == sorted(name for name, ggml_type in ggml.TYPES.items() if ggml_type.plain_dtype is None)


@pytest.mark.parametrize("options", ["plain", "per_tensor", "smooth", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_int8_is_the_formats_definition(options, dtype, device, poison_empty):
    w = torch.randn(33, 256, generator=torch.Generator().manual_seed(0)).to(device)
    smooth = torch.rand(256, device=device) + 0.5 if options == "smooth" else None
    group = 64 if options == "rotated" else 0
    weight = int8.quantize_weight(w, options != "per_tensor", smooth, group)
    unpacked = unpack_int8(weight, dtype)
    assert unpacked.dtype == dtype and torch.equal(unpacked, weight.dequantize(dtype))
    arguments = (weight.data, weight.scale, weight.smooth, weight.rotation_group, dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lowbit.unpack_int8, arguments, test_utils=checks)
