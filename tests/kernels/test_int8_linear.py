import os
import pathlib
import platform
import subprocess
import sys
import types

import pytest
import torch
from lowbit.kernels import int8_linear as op
from lowbit.kernels import tuning
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.int8_linear import configs, int8_linear, torch_impl
from lowbit.tests.kernels.comparing import INTERPRETER_WARNING, assert_grids_fit, assert_within_eps, by

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = [
    *((1, 64, 256), (17, 331, 528), (33, 40, 24), (128, 256, 512), (20, 16, 4608)),
    *((1, 1, 1), (5, 7, 33), (130, 259, 129), (40, 24, 2051)),
]
IDS = ["one_token", "ragged", "small", "aligned", "deep", "one_value", "odd", "odd_tiles", "odd_deep"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, K of Ideogram 4's linears, and its numbers of tokens: prompts, a small image, 1024 x 1024 without and with a
# prompt, 2048 x 2048.
MODEL_LINEARS = {
    "qkv": (13824, 4608),
    "o": (4608, 4608),
    "w1": (12288, 4608),
    "w2": (4608, 12288),
    "llm_cond_proj": (4608, 53248),
}
MODEL_TOKENS = [1, 17, 256, 4096, 4352, 16640]


def operands(M, N, K, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xq = torch.randint(-127, 128, (M, K), generator=generator).to(torch.int8)
    wq = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
    x_scale = torch.rand((M, 1), generator=generator) * 0.1 + 1e-3
    w_scale = torch.rand((N, 1), generator=generator) * 0.1 + 1e-3
    bias = torch.randn(N, generator=generator)
    return [tensor.to(device) for tensor in (xq, x_scale, wq, w_scale, bias)]


def integer_sums(implementation, xq, wq, **options):
    """The int32 product as float32, which shows it exactly below 2**24: unit scales, no bias."""
    ones = torch.ones(xq.shape[0], 1, device=xq.device), torch.ones(wq.shape[0], 1, device=xq.device)
    return by(implementation, int8_linear, xq, ones[0], wq, ones[1], None, torch.float32, **options)


def configuration_id(configuration):
    return "x".join(str(configuration[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


@pytest.fixture
def launch_with(monkeypatch):
    """launch_with(configuration, parts) makes Triton's implementation use these, whatever the shape."""

    def use(configuration=None, parts=None):
        if configuration is not None:
            monkeypatch.setattr(configs, "candidates", lambda device, bucket: (configuration,))
        if parts is not None:
            monkeypatch.setattr(configs, "parts_along_k", lambda *arguments: parts)

    return use


@pytest.mark.parametrize("M, N, K", SHAPES, ids=IDS)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_integer_product_is_exact(implementation, M, N, K, device, poison_empty):
    xq, _, wq, _, _ = operands(M, N, K, device)
    y = integer_sums(implementation, xq, wq)
    assert torch.equal(y.cpu().long(), xq.cpu().long() @ wq.cpu().long().t())


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_largest_sum_does_not_overflow(implementation, device):
    """131064 products of -128 and -128 are 131071 below 2**31. (cuBLAS takes K in multiples of 8.)"""
    xq, wq = (torch.full((rows, 131064), -128, dtype=torch.int8, device=device) for rows in (17, 8))
    expected = torch.full((17, 8), 131064.0 * 128 * 128, device=device)
    assert torch.equal(integer_sums(implementation, xq, wq), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("M", MODEL_TOKENS)
@pytest.mark.parametrize("linear", MODEL_LINEARS)
def test_the_integer_product_is_cublas_at_the_models_shapes(linear, M, device, poison_empty):
    N, K = MODEL_LINEARS[linear]
    generator = torch.Generator(device).manual_seed(0)
    xq = torch.randint(-127, 128, (max(M, 32), K), generator=generator, device=device, dtype=torch.int8)
    wq = torch.randint(-127, 128, (N, K), generator=generator, device=device, dtype=torch.int8)
    expected = torch._int_mm(xq, wq.t())[:M]  # which takes more than 16 tokens
    assert int(expected.abs().max()) < 2**24
    assert torch.equal(integer_sums("triton_impl", xq[:M], wq, tune=False), expected.float())


@pytest.mark.gpu
def test_the_integer_product_is_exact_beyond_2_to_31_outputs(device):
    M, N, K = 160_000, 13824, 64
    assert M * N > 2**31
    xq = torch.randint(-127, 128, (M, K), device=device, dtype=torch.int8)
    wq = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8)
    y = integer_sums("triton_impl", xq, wq, tune=False)
    for rows in (slice(0, 64), slice(M // 2, M // 2 + 64), slice(M - 64, M)):
        assert torch.equal(y[rows], torch._int_mm(xq[rows], wq.t()).float())


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_epilogue_matches_float64(implementation, with_bias, per_channel, out_dtype, device, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(40, 72, 96, device)
    w_scale = w_scale if per_channel else w_scale[:1].reshape(())
    bias = bias.to(out_dtype) if with_bias else None
    y = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias, out_dtype)
    expected = (xq.double() @ wq.double().t()) * x_scale.double() * w_scale.double().reshape(1, -1)
    expected = expected if bias is None else expected + bias.double()
    eps = torch.finfo(out_dtype).eps
    assert y.dtype == out_dtype
    torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=2 * eps * float(expected.abs().mean()))


# A low-rank term in the epilogue


def low_rank(M, N, rank, dtype, device):
    generator = torch.Generator().manual_seed(rank)
    hidden, up = (torch.randn(rows, rank, generator=generator).to(device, dtype) for rows in (M, N))
    return hidden, up


@pytest.mark.parametrize("rank", [16, 32, 128, 5, 256])
@pytest.mark.parametrize("M, N, K", [(40, 72, 96), (17, 331, 528), (130, 259, 129)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_low_rank_term_is_added(implementation, out_dtype, M, N, K, rank, device, poison_empty):
    """In the epilogue before it is rounded, or, for ranks that it has no room for, to the rounded product."""
    xq, x_scale, wq, w_scale, bias = operands(M, N, K, device)
    term = low_rank(M, N, rank, out_dtype, device)
    options = {"low_rank": term} if implementation != "triton_impl" else {"low_rank": term, "tune": False}
    y = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias.to(out_dtype), out_dtype, **options)
    product = (xq.double() @ wq.double().t()) * x_scale.double() * w_scale.double().t() + bias.to(out_dtype).double()
    expected = product + term[0].double() @ term[1].double().t()
    eps = torch.finfo(out_dtype).eps
    summed = rank**0.5 * torch.finfo(torch.float32).eps  # the noise of adding the term up in float32
    torch.testing.assert_close(
        y.double(), expected, rtol=2 * eps, atol=(2 * eps + summed) * float(product.abs().mean())
    )


@pytest.mark.parametrize("implementation", ["triton_impl", "torch_impl"])
def test_a_product_in_parts_adds_it_too(implementation, device, launch_with, monkeypatch, poison_empty):
    """Parts along K in one implementation, of the tokens in the other."""
    launch_with(parts=3)
    monkeypatch.setattr(torch_impl, "CHUNK_BYTES", 4 * 40 * 20)
    xq, x_scale, wq, w_scale, _ = operands(60, 40, 512, device)
    term = low_rank(60, 40, 16, torch.bfloat16, device)
    y = by(implementation, int8_linear, xq, x_scale, wq, w_scale, None, torch.bfloat16, low_rank=term)
    expected = by("reference", int8_linear, xq, x_scale, wq, w_scale, None, torch.bfloat16, low_rank=term)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, expected, rtol=2 * eps, atol=2 * eps * float(expected.abs().float().mean()))


def test_a_low_rank_term_may_be_strided(device, poison_empty):
    xq, x_scale, wq, w_scale, _ = operands(40, 24, 64, device)
    hidden, up = low_rank(40, 24, 16, torch.bfloat16, device)
    strided = hidden.repeat_interleave(2, dim=1)[:, ::2], up.t().contiguous().t()
    arguments = (xq, x_scale, wq, w_scale, None, torch.bfloat16, False)
    expected = by("triton_impl", int8_linear, *arguments, (hidden, up))
    assert torch.equal(by("triton_impl", int8_linear, *arguments, strided), expected)


def test_a_low_rank_term_that_does_not_fit_is_refused(device):
    xq, x_scale, wq, w_scale, _ = operands(4, 6, 8, device)
    hidden, up = low_rank(4, 6, 16, torch.bfloat16, device)
    for term in ((hidden[:3], up), (hidden, up[:5]), (hidden[:, :8], up)):
        with pytest.raises(ValueError, match=r"a low-rank term needs hidden \(4, 'R'\) and up \(6, 'R'\), got"):
            int8_linear(xq, x_scale, wq, w_scale, low_rank=term)
    with pytest.raises(ValueError, match=r"a low-rank term must be torch\.bfloat16, got torch\.float32"):
        int8_linear(xq, x_scale, wq, w_scale, low_rank=(hidden.float(), up))


@pytest.mark.parametrize("M, N, K", SHAPES, ids=IDS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", op.OP.implementations[:-1])
def test_outputs_are_the_references_within_two_eps(implementation, out_dtype, M, N, K, device, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(M, N, K, device)
    arguments = (xq, x_scale, wq, w_scale, bias, out_dtype)
    y = by(implementation, int8_linear, *arguments)
    assert_within_eps(y, by("reference", int8_linear, *arguments), 2)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations[:-1])
def test_a_bias_of_any_dtype_is_added_in_float32(implementation, bias_dtype, out_dtype, device):
    xq, x_scale, wq, w_scale, bias = operands(20, 72, 96, device)
    bias = (bias * 100).to(bias_dtype)
    y = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias, out_dtype)
    widened = by("reference", int8_linear, xq, x_scale, wq, w_scale, bias.float(), out_dtype)
    assert_within_eps(y, widened, 2)


@pytest.mark.parametrize("M", [1, 16, 17, 32, 33, 64, 65, 300])
def test_every_number_of_tokens_finds_a_configuration(M, device, poison_empty):
    xq, _, wq, _, _ = operands(M, 150, 272, device)
    assert torch.equal(integer_sums("triton_impl", xq, wq), integer_sums("reference", xq, wq))


def shipped_configurations():
    return list(
        {
            tuple(configuration.items()): configuration
            for table in configs.TABLE.values()
            for _, configurations in table
            for configuration in configurations
        }.values()
    )


@pytest.mark.parametrize("N, K", [(132, 384), (131, 417)], ids=["even", "ragged"])
@pytest.mark.parametrize("configuration", shipped_configurations(), ids=configuration_id)
def test_every_configuration_gives_the_same(configuration, N, K, device, launch_with, poison_empty):
    if device.type == "cuda" and configuration not in of_this_device(device):
        pytest.skip("is not for this device")
    launch_with(configuration)
    xq, _, wq, _, _ = operands(40, N, K, device)
    assert torch.equal(integer_sums("triton_impl", xq, wq), integer_sums("reference", xq, wq))


def of_this_device(device):
    buckets = {largest for table in configs.TABLE.values() for largest, _ in table}
    return [configuration for bucket in buckets for configuration in configs.candidates(device, bucket)]


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 17, 256, 4352])
def test_every_configuration_gives_the_same_at_the_models_shapes(M, device, launch_with, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(M, 4608, 12288, device)
    results = []
    for configuration in of_this_device(device):
        launch_with(configuration)
        results.append(by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=False))
    for result in results[1:]:
        assert torch.equal(result, results[0])


# The sum split along K


@pytest.mark.parametrize("parts", [2, 5, 1000])
@pytest.mark.parametrize("M, N, K", [(1, 64, 4608), (17, 131, 1027), (33, 40, 1024)], ids=["one_token", "odd", "even"])
def test_a_split_sum_is_the_whole_one_bit_for_bit(M, N, K, parts, device, launch_with, poison_empty):
    """More parts than steps along K, and parts of unequal length, among them."""
    xq, x_scale, wq, w_scale, bias = operands(M, N, K, device)
    for scale, bias_or_none, out_dtype in ((w_scale, bias, torch.bfloat16), (w_scale[:1], None, torch.float32)):
        launch_with(parts=1)
        whole = by("triton_impl", int8_linear, xq, x_scale, wq, scale, bias_or_none, out_dtype)
        launch_with(parts=parts)
        split = by("triton_impl", int8_linear, xq, x_scale, wq, scale, bias_or_none, out_dtype)
        assert torch.equal(split, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [3, 16])
def test_a_split_sum_is_the_whole_one_at_the_models_longest_k(parts, device, launch_with, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(256, 4608, 53248, device)
    launch_with(parts=1)
    whole = by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=False)
    launch_with(parts=parts)
    assert torch.equal(by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=False), whole)


def test_a_sum_is_split_where_tiles_are_few_and_k_is_long(device):
    assert configs.parts_along_k(1, 53248, 4, device) > 1
    assert configs.parts_along_k(100_000, 53248, 4, device) == 1


@pytest.mark.triton
@pytest.mark.parametrize("multiprocessors", [82, 128, 132, 170, 188])
@pytest.mark.parametrize("M", [65_536, 70_000, 100_000])
def test_grids_fit_any_number_of_tokens(M, multiprocessors, monkeypatch):
    """The model's last layer has 128 features: few tiles, however many tokens."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: multiprocessors)
    configs.parts_along_k.cache_clear()
    xq, wq = (torch.empty(rows, 4608, dtype=torch.int8, device="meta") for rows in (M, 128))
    scales = [torch.empty(rows, 1, device="meta") for rows in (M, 128)]
    call = op.Int8LinearCall(xq, scales[0], wq, scales[1], None, torch.bfloat16)
    assert_grids_fit(monkeypatch, op, call)
    configs.parts_along_k.cache_clear()


# Operands as callers have them


def test_a_long_call_is_chunked_to_the_same_result(device, monkeypatch, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(256, 64, 64, device)
    whole = by("torch_impl", int8_linear, xq, x_scale, wq, w_scale, bias, torch.bfloat16)
    monkeypatch.setattr(torch_impl, "CHUNK_BYTES", 4 * 64 * 100)  # 100 rows: two whole chunks and a rest
    chunked = by("torch_impl", int8_linear, xq, x_scale, wq, w_scale, bias, torch.bfloat16)
    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_leading_dimensions(implementation, device):
    xq, x_scale, wq, w_scale, bias = operands(60, 64, 64, device)
    flat = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias)
    batched = by(implementation, int8_linear, xq.reshape(3, 20, 64), x_scale.reshape(3, 20, 1), wq, w_scale, bias)
    assert torch.equal(batched, flat.reshape(3, 20, 64))


def apart(tensor):
    """The same values, each with a stranger between it and its neighbours along every dimension."""
    spread = torch.full([2 * size + 1 for size in tensor.shape], 77, dtype=tensor.dtype, device=tensor.device)
    view = spread[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("strided", ["xq_rows", "xq", "x_scale", "wq_rows", "wq", "w_scale", "bias"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_operands_of_any_stride(implementation, strided, device):
    named = dict(zip(("xq", "x_scale", "wq", "w_scale", "bias"), operands(60, 72, 64, device), strict=True))
    expected = by("reference", int8_linear, **named)
    name = strided.removesuffix("_rows")
    named[name] = apart(named[name].t()).t() if strided == name else torch.stack((named[name],) * 2, dim=1)[:, 0]
    assert not named[name].is_contiguous()
    assert_within_eps(by(implementation, int8_linear, **named), expected, 2)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_one_scale_expanded_to_every_feature(implementation, device):
    xq, x_scale, wq, w_scale, bias = operands(20, 72, 64, device)
    expected = by("reference", int8_linear, xq, x_scale, wq, w_scale[:1], bias)
    expanded = w_scale[:1].expand(72, 1)
    assert_within_eps(by(implementation, int8_linear, xq, x_scale, wq, expanded, bias), expected, 2)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens(implementation, shape, device):
    _, _, wq, w_scale, bias = operands(1, 72, 64, device)
    xq = torch.empty((*shape, 64), dtype=torch.int8, device=device)
    y = by(implementation, int8_linear, xq, torch.empty((*shape, 1), device=device), wq, w_scale, bias)
    assert tuple(y.shape) == (*shape, 72) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_whose_scale_is_not_finite_spoils_only_itself(implementation, device):
    """The quantizer gives a token that holds a NaN or an infinity zeros and such a scale."""
    xq, x_scale, wq, w_scale, bias = operands(40, 72, 64, device)
    expected = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias)
    for row, value in ((3, float("nan")), (20, float("inf"))):
        xq[row], x_scale[row] = 0, value
    y = by(implementation, int8_linear, xq, x_scale, wq, w_scale, bias)
    finite = x_scale.isfinite().squeeze(1)
    assert y[~finite].isnan().all() and torch.equal(y[finite], expected[finite])


@pytest.mark.parametrize("tune", [True, False])
def test_tuning_is_the_callers_choice(tune, device, monkeypatch):
    asked = []
    choose = tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda *arguments: asked.append(arguments[-1]) or choose(*arguments))
    xq, x_scale, wq, w_scale, bias = operands(20, 72, 64, device)
    y = by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=tune)
    assert asked == [tune]
    assert_within_eps(y, by("reference", int8_linear, xq, x_scale, wq, w_scale, bias), 2)


@pytest.mark.gpu
def test_what_tuning_finds_gives_the_same(device):
    xq, x_scale, wq, w_scale, bias = operands(300, 1024, 4608, device)
    untuned = by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=False)
    for _ in range(2):
        assert torch.equal(by("triton_impl", int8_linear, xq, x_scale, wq, w_scale, bias, tune=True), untuned)


def test_what_does_not_fit_is_refused():
    xq, x_scale, wq, w_scale, bias = operands(4, 8, 16, "cpu")
    with pytest.raises(ValueError, match=r"needs int8 operands, got xq torch\.float32"):
        int8_linear(xq.float(), x_scale, wq, w_scale)
    with pytest.raises(ValueError, match="do not share K"):
        int8_linear(xq, x_scale, wq[:, :8], w_scale)
    with pytest.raises(ValueError, match="w_scale must hold 1 or N=8 values"):
        int8_linear(xq, x_scale, wq, w_scale[:3])
    with pytest.raises(ValueError, match=r"x_scale must have shape \(4, 1\), got \(4,\)"):
        int8_linear(xq, x_scale.flatten(), wq, w_scale)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(7,\)"):
        int8_linear(xq, x_scale, wq, w_scale, bias[:7])
    with pytest.raises(ValueError, match=r"gives a floating dtype, not torch\.int32"):
        int8_linear(xq, x_scale, wq, w_scale, None, torch.int32)
    with pytest.raises(ValueError, match="needs its operands on one device, got xq on cpu and wq on meta"):
        int8_linear(xq, x_scale, wq.to("meta"), w_scale)
    with pytest.raises(ValueError, match="K=131072 could overflow"):
        int8_linear(
            torch.zeros(1, 131072, dtype=torch.int8), x_scale[:1], torch.zeros(1, 131072, dtype=torch.int8), w_scale
        )


# Prints what the op says of a product by oneDNN for an older CPU, and whether its own is exact.
PRODUCT_ON_AN_OLD_CPU = """
import sys
import types
sys.path.insert(0, "tests")
import conftest
import torch
from lowbit.kernels import int8_linear as op
ones, codes = torch.ones(32, 1), torch.full((32, 64), 127, dtype=torch.int8)
print(op.OP.refusals(op.Int8LinearCall(codes, ones, codes, ones, None, torch.float32))["torch_impl"])
print(bool((op.int8_linear(codes, ones, codes, ones, None, torch.float32) == 64 * 127**2).all()))
"""


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_rocm_is_left_to_the_definition(monkeypatch, hip):
    """`torch._int_mm` ends the process on some of its GPUs."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch_impl, "device_capability", lambda device: (11, 0))
    call = types.SimpleNamespace(device=torch.device("cuda"), M=32, N=64, K=64)
    assert torch_impl.supports(call) == (hip and "is not tested on ROCm, where some GPUs fail in it")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="limits oneDNN to an older x86 CPU")
def test_a_cpu_whose_sums_saturate_is_refused():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", PRODUCT_ON_AN_OLD_CPU]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.stdout.splitlines() == ["needs a CPU with VNNI, whose sums are exact", "True"], told.stderr


@pytest.mark.triton
def test_an_out_dtype_that_triton_does_not_write(device):
    xq, x_scale, wq, w_scale, bias = operands(20, 72, 64, device)
    with (
        use_implementation("triton_impl"),
        pytest.raises(RuntimeError, match=r"writes bf16, fp16 and fp32, not torch\.float64"),
    ):
        int8_linear(xq, x_scale, wq, w_scale, bias, torch.float64)
    assert int8_linear(xq, x_scale, wq, w_scale, bias, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_the_fake_agrees_with_the_op(with_bias, out_dtype, device):
    with torch.inference_mode(False):
        xq, x_scale, wq, w_scale, bias = operands(20, 72, 64, device)
        arguments = (xq[::2], x_scale[::2], wq, w_scale, bias if with_bias else None, out_dtype, False)
        torch.library.opcheck(torch.ops.lowbit.int8_linear.default, arguments)


def test_a_descriptor_is_what_tritons_constructor_makes():
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or newer")
    from lowbit.kernels.int8_linear import triton_impl

    for tensor in (torch.zeros(17, 48, dtype=torch.int8), torch.zeros(5, 64, dtype=torch.bfloat16)[:, :32]):
        made = triton_impl._descriptor(tensor, 128, 64)
        expected = descriptor.TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [128, 64])
        assert made.base is tensor
        assert {**vars(made), "base": None} == {**vars(expected), "base": None}
        assert triton_impl._unfilled(tensor.dtype, tuple(tensor.shape), tensor.stride(), 128, 64).base is None
