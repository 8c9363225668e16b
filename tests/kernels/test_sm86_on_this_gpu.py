"""The machine code of an RTX 3090 (sm_86), as far as another GPU can check it: the PTX of each kernel, compiled for
sm_86, is given to this GPU's driver, and the ops launch that in place of what Triton compiles for this GPU.

The PTX has sm_86's instructions, layouts and pipelines; only its last translation, into instructions and registers, is
for this GPU.
"""

import ctypes
import pathlib
import sys

import numpy
import pytest
import torch

pytest.importorskip("triton")
from lowbit.formats import int8
from lowbit.kernels.gated_residual import gated_residual
from lowbit.kernels.gated_residual_norm_quantize import gated_residual_norm_quantize
from lowbit.kernels.ggml_linear import ggml_linear
from lowbit.kernels.int8_linear import configs, int8_linear
from lowbit.kernels.quantize_per_token import quantize_per_token
from lowbit.kernels.record_channels import record_channels
from lowbit.kernels.rms_norm_scale_quantize import rms_norm_scale_quantize
from lowbit.kernels.swiglu_quantize import swiglu_quantize
from lowbit.kernels.unpack import unpack
from lowbit.kernels.unpack_int8 import unpack_int8
from lowbit.kernels.unpack_to_int8 import unpack_to_int8
from lowbit.kernels.weight_only_int8_linear import weight_only_int8_linear
from lowbit.tests.kernels import machine_code
from lowbit.tests.kernels.comparing import (
    assert_nearly_the_same_codes,
    assert_same_codes,
    assert_within_eps,
    by,
)

pytestmark = pytest.mark.gpu

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of cuFuncSetAttribute
ARGUMENT_TYPES = {"pointer": ctypes.c_uint64, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "fp32": ctypes.c_float}


class Driver:
    """The few functions of the CUDA driver that load PTX and launch it in PyTorch's context and stream."""

    def __init__(self):
        self.library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self.kernels = {}
        self.launched = []

    def call(self, function, *arguments):
        error = getattr(self.library, function)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"{function}: {text.value.decode() if text.value else f'error {error}'}")

    def load(self, kernel):
        """The function of a compiled kernel's PTX, ready for its shared memory."""
        ptx = kernel.asm["ptx"]
        if ptx not in self.kernels:
            assert ".target sm_86\n" in ptx
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
            name, _ = machine_code.entry(ptx)
            self.call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
            size = ctypes.c_int(kernel.metadata.shared)
            self.call("cuFuncSetAttribute", function, ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES), size)
            self.kernels[ptx] = function
        return self.kernels[ptx]

    def launch(self, launch):
        """In the place of Triton's launcher: the launch's kernel as it is compiled for sm_86."""
        kernel = machine_code.compiled(launch, 86)
        assert kernel.metadata.target.arch == 86
        values = [
            ARGUMENT_TYPES[kind](value.data_ptr() if isinstance(value, torch.Tensor) else value)
            for kind, value in machine_code.passed_to_entry(launch, kernel.asm["ptx"])
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (*launch.grid, 1, 1)[:3]
        block = 32 * kernel.metadata.num_warps, 1, 1
        sizes = [ctypes.c_uint(size) for size in (*grid, *block, kernel.metadata.shared)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", self.load(kernel), *sizes, stream, addresses, None)
        self.launched.append(launch.kernel.fn.__name__)


@pytest.fixture(scope="module")
def driver(device):
    torch.zeros(1, device=device)  # makes PyTorch's context current
    return Driver()


@pytest.fixture
def as_sm86(driver, poison_empty):
    """as_sm86(function, *arguments): computed by the Triton implementations with sm_86's kernels; the names of the
    kernels that ran are in `driver.launched`."""
    driver.launched.clear()

    def compute(function, *arguments, **options):
        with machine_code.launches(driver.launch):
            result = by("triton_impl", function, *arguments, **options)
        torch.cuda.synchronize()
        return result

    return compute


def tokens(M, K, dtype, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator) * 10.0 ** torch.linspace(-3, 3, M).unsqueeze(1)
    x[:, K // 3] *= 20
    return x.clamp(-60000, 60000).to(device, dtype)


def factors(K, device):
    return (torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5).to(device)


def configurations():
    return list({tuple(one.items()): one for _, several in configs.TABLE[8, 6] for one in several}.values())


@pytest.mark.parametrize(
    "M, N, K, parts",
    [(300, 520, 1040, 1), (300, 520, 1040, 3), (33, 331, 2051, 3)],
    ids=["whole", "parts", "odd_parts"],
)
@pytest.mark.parametrize("configuration", configurations(), ids=lambda one: "x".join(map(str, one.values())))
def test_int8_linear(configuration, M, N, K, parts, device, driver, as_sm86, monkeypatch):
    monkeypatch.setattr(configs, "candidates", lambda device, bucket: (configuration,))
    monkeypatch.setattr(configs, "parts_along_k", lambda *arguments: parts)
    generator = torch.Generator(device).manual_seed(0)
    xq, wq = (
        torch.randint(-128, 128, (rows, K), generator=generator, device=device, dtype=torch.int8) for rows in (M, N)
    )
    ones = [torch.ones(rows, 1, device=device) for rows in (M, N)]
    operands = (xq, ones[0], wq, ones[1], None, torch.float32)
    sums = as_sm86(int8_linear, *operands)
    assert torch.equal(sums, by("reference", int8_linear, *operands))
    assert driver.launched == ["_int8_linear_kernel"] + ["_add_parts_kernel"] * (parts > 1)

    scales = [torch.rand(rows, 1, generator=generator, device=device) * 0.1 for rows in (M, N)]
    for w_scale, bias, dtype in (
        (scales[1], torch.randn(N, generator=generator, device=device).to(torch.bfloat16), torch.bfloat16),
        (scales[1][:1], None, torch.float16),
    ):
        operands = (xq, scales[0] * 0.01, wq, w_scale, bias, dtype)
        y = as_sm86(int8_linear, *operands)
        assert_within_eps(y, by("reference", int8_linear, *operands), 2)


def test_int8_linear_at_the_models_shape(device, as_sm86, monkeypatch):
    """With the configuration that the op itself takes on an RTX 3090."""
    M, N, K = 4352, 4608, 12288
    monkeypatch.setattr(
        configs,
        "candidates",
        lambda device, bucket: next(several for largest, several in configs.TABLE[8, 6] if bucket <= largest),
    )
    xq, wq = (torch.randint(-127, 128, (rows, K), device=device, dtype=torch.int8) for rows in (M, N))
    ones = [torch.ones(rows, 1, device=device) for rows in (M, N)]
    sums = as_sm86(int8_linear, xq, ones[0], wq, ones[1], None, torch.float32, tune=False)
    assert torch.equal(sums, torch._int_mm(xq, wq.t()).float())


@pytest.mark.parametrize("K", [64, 528, 4608, 12288, 17411, 53248])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_quantize_per_token(smoothed, dtype, K, device, driver, as_sm86):
    x, smooth = tokens(50, K, dtype, device), factors(K, device) if smoothed else None
    actual = as_sm86(quantize_per_token, x, smooth)
    assert_same_codes(actual, by("reference", quantize_per_token, x, smooth))
    long = ["_quantize_long_token_kernel"] * 2
    assert driver.launched == (long if K > 16384 else ["_quantize_per_token_kernel"])


@pytest.mark.parametrize("K", [256, 4608, 12288, 17408, 53248])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_quantize_per_token_rotated(smoothed, dtype, K, device, driver, as_sm86):
    x, smooth = tokens(50, K, dtype, device), factors(K, device) if smoothed else None
    actual = as_sm86(quantize_per_token, x, smooth, 256)
    expected = by("reference", quantize_per_token, x, smooth, 256)
    assert_nearly_the_same_codes(actual, expected, rotated=torch.float32)
    assert driver.launched


@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestProducers:
    def test_rms_norm_scale_quantize(self, dtype, smoothed, rotation_group, device, driver, as_sm86):
        K = 4608
        x, smooth = tokens(50, K, dtype, device).reshape(2, 25, K), factors(K, device) if smoothed else None
        weight, rows = factors(K, device).to(dtype), factors(2 * K, device).to(dtype).reshape(2, 1, K)
        for scale in (rows, None):
            arguments = (x, weight, scale, 1e-5, smooth, rotation_group)
            actual = as_sm86(rms_norm_scale_quantize, *arguments)
            *expected, expected_values = by("reference", rms_norm_scale_quantize, *arguments, keep_values=True)
            assert_nearly_the_same_codes(actual, expected, rotated=dtype if rotation_group else None)
            *codes, values = as_sm86(rms_norm_scale_quantize, *arguments, keep_values=True)
            assert_same_codes(codes, actual)
            assert_within_eps(values, expected_values, 2)
        assert driver.launched == ["_rms_norm_scale_quantize_kernel"] * 4

    def test_swiglu_quantize(self, dtype, smoothed, rotation_group, device, driver, as_sm86):
        K = 12288
        smooth = factors(K, device) if smoothed else None
        gate, up = tokens(50, 2 * K, dtype, device).clamp(-100, 100).chunk(2, dim=-1)
        actual = as_sm86(swiglu_quantize, gate, up, smooth, rotation_group)
        *expected, expected_values = by(
            "reference", swiglu_quantize, gate, up, smooth, rotation_group, keep_values=True
        )
        assert_nearly_the_same_codes(actual, expected, rotated=dtype if rotation_group else None)
        *codes, values = as_sm86(swiglu_quantize, gate, up, smooth, rotation_group, keep_values=True)
        assert_same_codes(codes, actual)
        assert_within_eps(values, expected_values, 2)
        assert driver.launched == ["_swiglu_quantize_kernel"] * 2

    def test_gated_residual_norm_quantize(self, dtype, smoothed, rotation_group, device, driver, as_sm86):
        K = 4608
        smooth = factors(K, device) if smoothed else None
        residual, y = (tokens(50, K, dtype, device).reshape(2, 25, K) for _ in range(2))
        weight, row = factors(K, device).to(dtype), factors(2 * K, device).to(dtype).reshape(2, 1, K)
        arguments = (residual, y.flip(1), weight, row)
        options = (weight, row, 1e-5, smooth, rotation_group)
        x, *codes = as_sm86(gated_residual_norm_quantize, *arguments, *options)
        assert_within_eps(x, by("reference", gated_residual, *arguments, 1e-5), 2)
        *expected, expected_values = by("reference", rms_norm_scale_quantize, x, *options, keep_values=True)
        assert_nearly_the_same_codes(codes, expected, rotated=dtype if rotation_group else None)
        same_x, *same_codes, values = as_sm86(gated_residual_norm_quantize, *arguments, *options, keep_values=True)
        assert torch.equal(same_x, x)
        assert_same_codes(same_codes, codes)
        assert_within_eps(values, expected_values, 2)
        alone = as_sm86(gated_residual, *arguments, 1e-5)
        assert_within_eps(alone, x, 2)  # a sum may be contracted into its product in one and not in the other
        assert driver.launched == ["_gated_residual_norm_quantize_kernel"] * 2 + ["_gated_residual_kernel"]


@pytest.mark.parametrize("K", [255, 4608, 12288])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_record_channels(dtype, K, device, driver, as_sm86):
    """A square is rounded, and added up in at most 3 + 8 steps within a call and 3 of calls: half a float32 eps each,
    and one more for the expected value."""
    x = torch.randn(600, K, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rows, slots = (torch.tensor(values, device=device) for values in ([599, 0, 300], [2, 63, 0]))
    absmax, square_sum = torch.zeros(2, K, device=device)
    sample = torch.full((64, K), 77.0, dtype=torch.bfloat16, device=device)
    kept = sample.clone()
    for part, n in ((x[:257], 0), (x, 3), (x[:1], 0)):
        as_sm86(record_channels, part, absmax, square_sum, sample, rows[:n], slots[:n])
    kept[slots] = x[rows].to(torch.bfloat16)
    assert torch.equal(absmax, x.float().abs().amax(dim=0)) and torch.equal(sample, kept)
    expected = torch.cat((x[:257], x, x[:1])).double().square().sum(dim=0).float()
    torch.testing.assert_close(square_sum, expected, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    assert driver.launched == ["_record_channels_kernel"] * 3


# The ops that unpack weights, and the product of few tokens

GOLDEN = numpy.load(pathlib.Path(__file__).parents[1] / "golden" / "ggml_blocks.npz")
GGML_TYPES = sorted(name.removesuffix("_bytes") for name in GOLDEN if name.endswith("_bytes"))


def golden_blocks(ggml_type, device):
    return torch.from_numpy(GOLDEN[f"{ggml_type}_bytes"]).to(device)


@pytest.mark.parametrize("ggml_type", GGML_TYPES)
def test_unpack(ggml_type, device, driver, as_sm86):
    blocks = golden_blocks(ggml_type, device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(as_sm86(unpack, blocks, ggml_type, dtype), by("reference", unpack, blocks, ggml_type, dtype))
    assert driver.launched == ["_unpack_kernel"] * 3


@pytest.mark.parametrize("M", [1, 5, 16])
@pytest.mark.parametrize("ggml_type", GGML_TYPES)
def test_ggml_linear(ggml_type, M, device, driver, as_sm86):
    """One token takes weights that are not rounded: a few hundredths of the dtype's eps of what is summed up."""
    blocks = golden_blocks(ggml_type, device)[:33]
    x = torch.randn(M, 768, generator=torch.Generator(device).manual_seed(M), device=device, dtype=torch.bfloat16)
    y = as_sm86(ggml_linear, x, blocks, ggml_type)
    values = by("reference", unpack, blocks, ggml_type, torch.float32).double()
    expected = x.double() @ values.t()
    eps = torch.finfo(torch.bfloat16).eps
    noise = eps / 2 * (x.double().square() @ values.square().t()).sqrt()
    assert bool(((y.double() - expected).abs() <= eps * expected.abs() + 5 * noise).all())
    assert driver.launched == ["_ggml_linear_kernel"]


@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("ggml_type", GGML_TYPES)
def test_unpack_to_int8(ggml_type, rotation_group, device, driver, as_sm86):
    blocks = golden_blocks(ggml_type, device)
    actual = as_sm86(unpack_to_int8, blocks, ggml_type, None, rotation_group)
    expected = by("reference", unpack_to_int8, blocks, ggml_type, None, rotation_group)
    assert_nearly_the_same_codes(actual, expected, rotated=torch.float32 if rotation_group else None)
    assert driver.launched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["plain", "per_tensor", "smooth", "rotated"])
def test_unpack_int8(options, dtype, device, driver, as_sm86):
    w = torch.randn(333, 768, generator=torch.Generator().manual_seed(0)).to(device)
    smooth = factors(768, device) if options == "smooth" else None
    weight = int8.quantize_weight(w, options != "per_tensor", smooth, 256 if options == "rotated" else 0)
    assert_within_eps(as_sm86(unpack_int8, weight, dtype), by("reference", unpack_int8, weight, dtype), 2)
    assert driver.launched == ["_unpack_int8_kernel"]


@pytest.mark.parametrize("M", [1, 2, 3, 16])
@pytest.mark.parametrize("K", [512, 1111])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_only_int8_linear(dtype, K, M, device, driver, as_sm86):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(M, K, generator=generator, device=device).to(dtype)
    wq = torch.randint(-127, 128, (500, K), generator=generator, device=device, dtype=torch.int8)
    scale, bias = torch.rand(500, 1, generator=generator, device=device) * 0.01, torch.ones(500, device=device)
    for w_scale, bias_or_none in ((scale, bias.to(dtype)), (scale[:1], None)):
        operands = (x, wq, w_scale, bias_or_none)
        y, expected = as_sm86(weight_only_int8_linear, *operands), by("reference", weight_only_int8_linear, *operands)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=2 * eps, atol=2 * eps)
    assert driver.launched == ["_weight_only_int8_linear_kernel"] * 2
