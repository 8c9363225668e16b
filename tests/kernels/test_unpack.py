"""Unpacking blocks made by the C library and random ones, and the linear composed of the unpacking ops."""

import pathlib

import numpy
import pytest
import torch
from lowbit.formats import GgmlWeight, Int8Weight, ggml, int8
from lowbit.kernels import unpack as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.quantized_linear import SMALL_M, ggml_weight_linear, int8_weight_linear, row_rotation_group
from lowbit.kernels.unpack import unpack
from lowbit.kernels.unpack_int8 import unpack_int8
from lowbit.kernels.unpack_to_int8 import unpack_to_int8
from lowbit.tests.kernels.comparing import INTERPRETER_WARNING, assert_grids_fit, by

# NaN and infinite scales are meant.
pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING, "ignore:invalid value encountered:RuntimeWarning")

GOLDEN = numpy.load(pathlib.Path(__file__).parents[1] / "golden" / "ggml_blocks.npz")
TYPES = sorted(key.removesuffix("_bytes") for key in GOLDEN if key.endswith("_bytes"))
# Some of every kind: heavy tails, outlier columns, zeros, constants, ramps, tiny and large values.
ROWS = slice(30, 59)


def golden(ggml_type, device):
    return (torch.from_numpy(GOLDEN[f"{ggml_type}_{kind}"]).to(device) for kind in ("bytes", "values"))


def random_blocks(ggml_type, device, rows=29, blocks=3):
    """Random bytes, hence every code and block scale, and float16 scales that are NaN or infinite among them."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, blocks * ggml.TYPES[ggml_type].type_size)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)


def assert_same_floats(actual, expected):
    """Equal with NaNs in the same places."""
    assert actual.dtype == expected.dtype and torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_unpack_is_the_c_librarys_floats_rounded_once(implementation, ggml_type, dtype, device, poison_empty):
    blocks, values = golden(ggml_type, device)
    unpacked = by(implementation, unpack, blocks[ROWS], ggml_type, dtype)
    assert unpacked.dtype == dtype and torch.equal(unpacked, values[ROWS].to(dtype))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_random_bytes_are_unpacked_alike(ggml_type, device, poison_empty):
    """Rows that end within a tile, NaN and infinite scales, every value of the packed scales."""
    blocks = random_blocks(ggml_type, device)
    expected = by("reference", unpack, blocks, ggml_type, torch.float32)
    assert 0 < int((~expected.isfinite()).sum()) < expected.numel()
    assert_same_floats(by("triton_impl", unpack, blocks, ggml_type, torch.float32), expected)


@pytest.mark.parametrize("rows, blocks", [(1, 1), (3, 1), (1, 67), (65, 2), (0, 2)])
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K", "Q6_K"])
def test_any_number_of_blocks(ggml_type, rows, blocks, device, poison_empty):
    blocks = random_blocks(ggml_type, device, rows, blocks)
    expected = by("reference", unpack, blocks, ggml_type, torch.bfloat16)
    assert_same_floats(by("triton_impl", unpack, blocks, ggml_type, torch.bfloat16), expected)


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_blocks_may_lie_anyhow(implementation, ggml_type, device, poison_empty):
    blocks, values = (tensor[:9] for tensor in golden(ggml_type, device))
    at_odd_address = torch.cat((blocks.new_zeros(1), blocks.flatten()))[1:].view(blocks.shape)
    every_other_row = torch.stack((blocks, blocks), dim=1)[:, 0]
    transposed = blocks.t().contiguous().t()
    batched = blocks.view(3, 3, -1)
    assert at_odd_address.data_ptr() % 2 and not every_other_row.is_contiguous() and not transposed.is_contiguous()
    for lying in (at_odd_address, every_other_row, transposed, batched):
        unpacked = by(implementation, unpack, lying, ggml_type, torch.float32)
        assert unpacked.shape == (*lying.shape[:-1], values.shape[1]) and torch.equal(unpacked.view_as(values), values)


@pytest.mark.triton
def test_what_triton_does_not_unpack_the_reference_does(device):
    blocks = torch.randn(4, 8, device=device, dtype=torch.float16).view(torch.uint8)
    with use_implementation("triton_impl"):
        refusals = [
            op.OP.refusals(op.UnpackCall(blocks, ggml_type, dtype))["triton_impl"]
            for ggml_type, dtype in (("F16", torch.float32), ("Q8_0", torch.float64))
        ]
    assert refusals[0].startswith("has no decoder for F16, only for Q4_0, ")
    assert refusals[1] == "writes bf16, fp16 and fp32, not torch.float64"
    assert torch.equal(unpack(blocks, "F16", torch.float32), blocks.view(torch.float16).float())


@pytest.mark.triton
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K"])
def test_the_largest_linears_grids_fit(ggml_type, monkeypatch):
    stored = ggml.TYPES[ggml_type]
    blocks = torch.empty(4608, 53248 // stored.block_size * stored.type_size, dtype=torch.uint8, device="meta")
    assert_grids_fit(monkeypatch, op, op.UnpackCall(blocks, ggml_type, torch.bfloat16))


def test_what_does_not_fit_is_refused():
    blocks = torch.zeros(4, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"unpack needs uint8 blocks, got torch\.int8"):
        unpack(blocks.view(torch.int8), "Q4_K", torch.float32)
    with pytest.raises(ValueError, match="a Q4_K row has a multiple of 144 bytes"):
        unpack(blocks[:, :143], "Q4_K", torch.float32)


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
        kept = unpack_to_int8(blocks, ggml_type, None, row_rotation_group(weight))[1]
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
    for rotation in ((), (256,)):
        arguments = (blocks, "Q4_K", row_scale, *rotation)
        torch.library.opcheck(torch.ops.lowbit.unpack_to_int8, arguments, test_utils=checks)
        torch.library.opcheck(torch.ops.lowbit.find_row_scale, (blocks, "Q4_K", *rotation), test_utils=checks)
    torch.library.opcheck(torch.ops.lowbit.quantize_per_token, (x, None, 256), test_utils=checks)
    linear = (xq, x_scale, wq, row_scale, None, torch.bfloat16, False)
    torch.library.opcheck(torch.ops.lowbit.int8_linear, linear, test_utils=checks)
    hidden, up = (torch.randn(rows, 16, device=device, dtype=torch.bfloat16) for rows in (20, wq.shape[0]))
    torch.library.opcheck(torch.ops.lowbit.int8_linear, (*linear, hidden, up), test_utils=checks)


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
