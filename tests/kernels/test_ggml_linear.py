import concurrent.futures
import gc
import threading

import pytest
import torch
from lowbit.formats import GgmlWeight, ggml
from lowbit.kernels import ggml_linear as op
from lowbit.kernels import scratch as scratch_module
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.ggml_int8_linear import ggml_int8_linear
from lowbit.kernels.ggml_linear import ggml_linear
from lowbit.kernels.quantized_linear import ggml_weight_linear
from lowbit.kernels.scratch import scratch
from lowbit.kernels.unpack_to_int8 import find_row_scale, unpack_to_int8
from lowbit.tests.kernels.comparing import INTERPRETER_WARNING, assert_grids_fit, by
from lowbit.tests.kernels.test_unpack import TYPES, golden

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)


def float32_linear(x, values, bias):
    y = x.double() @ values.double().t()
    return y if bias is None else y + bias.double()


def operands(ggml_type, M, N, device, dtype=torch.bfloat16, with_bias=True):
    blocks, values = (tensor[:N] for tensor in golden(ggml_type, device))
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, values.shape[1], generator=generator).to(device, dtype)
    return x, blocks, values, torch.randn(N, generator=generator).to(device, dtype) if with_bias else None


def assert_close_to_the_product(y, x, values, bias):
    """Within what rounding each weight and the result to the dtype costs: the errors of K weights add up like noise."""
    expected = float32_linear(x, values, bias)
    eps = torch.finfo(y.dtype).eps
    assert y.dtype == x.dtype
    noise = eps / 2 * (x.double().square() @ values.double().square().t()).sqrt()
    assert bool(((y.double() - expected).abs() <= eps * expected.abs() + 5 * noise).all())


@pytest.mark.parametrize("M", [1, 2, 5, 16])
@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_few_tokens(implementation, ggml_type, M, device, poison_empty):
    """33 rows end within a tile; K = 768 is three steps."""
    x, blocks, values, bias = operands(ggml_type, M, 33, device)
    assert_close_to_the_product(by(implementation, ggml_linear, x, blocks, ggml_type, bias), x, values, bias)


@pytest.mark.parametrize("M, N, dtype", [(1, 7, torch.float16), (3, 96, torch.float16), (40, 17, torch.bfloat16)])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_shapes_and_dtypes(implementation, ggml_type, with_bias, M, N, dtype, device, poison_empty):
    x, blocks, values, bias = operands(ggml_type, M, N, device, dtype, with_bias)
    assert_close_to_the_product(by(implementation, ggml_linear, x, blocks, ggml_type, bias), x, values, bias)


@pytest.mark.parametrize("K", [32, 96, 288])
@pytest.mark.parametrize("M", [1, 4])
def test_rows_that_end_within_a_step(M, K, device, poison_empty):
    w = torch.randn(20, K, generator=torch.Generator().manual_seed(0))
    blocks = ggml.quantize(w, "Q8_0").to(device)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    y = by("triton_impl", ggml_linear, x, blocks, "Q8_0")
    assert_close_to_the_product(y, x, ggml.dequantize(blocks, "Q8_0"), None)


@pytest.mark.parametrize("M", [1, 6])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_operands_may_lie_anyhow(implementation, M, device, poison_empty):
    x, blocks, values, bias = operands("Q4_K", M, 24, device)
    strided = torch.stack((x, x), dim=1)[:, 1]
    at_odd_address = torch.cat((blocks.new_zeros(1), blocks.flatten()))[1:].view(blocks.shape)
    spread_bias = torch.stack((bias, bias), dim=1)[:, 0]
    for x_, blocks_ in ((strided, blocks), (x.t().contiguous().t(), at_odd_address)):
        y = by(implementation, ggml_linear, x_, blocks_, "Q4_K", spread_bias)
        assert_close_to_the_product(y, x, values, bias)
    nested = by(implementation, ggml_linear, x[None, :, None], blocks, "Q4_K", bias)
    assert nested.shape == (1, M, 1, 24)
    assert_close_to_the_product(nested[0, :, 0], x, values, bias)


def test_no_tokens_and_no_features(device):
    x, blocks, _, _ = operands("Q4_K", 2, 8, device)
    assert ggml_linear(x[:0], blocks, "Q4_K").shape == (0, 8)
    assert ggml_linear(x, blocks[:0], "Q4_K").shape == (2, 0)


def test_gradients_flow_through_the_composed_linear(device):
    with torch.inference_mode(False), torch.enable_grad():  # a host in this process computes in inference mode
        x, blocks, values, bias = (tensor.clone() for tensor in operands("Q4_K", 3, 16, device, torch.float32))
        x.requires_grad_(True)
        ggml_weight_linear(x, GgmlWeight(blocks, tuple(values.shape), "Q4_K"), bias, "exact").sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(3, -1))


# On quantized activations


@pytest.mark.parametrize("rotation_group", [0, 256])
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0"])
def test_the_product_of_codes_is_int8_linears(ggml_type, rotation_group, device, poison_empty):
    x, blocks, _, bias = operands(ggml_type, 24, 40, device)
    xq, x_scale = torch.ops.lowbit.quantize_per_token(x, None, rotation_group)
    wq, row_scale = unpack_to_int8(blocks, ggml_type, None, rotation_group)
    expected = torch.ops.lowbit.int8_linear(xq, x_scale, wq, row_scale, bias, torch.bfloat16, False)
    y = ggml_int8_linear(
        xq[None], x_scale[None], blocks, ggml_type, row_scale, rotation_group, bias, torch.bfloat16, False
    )
    assert torch.equal(y, expected[None])


def test_ops_are_opaque_to_the_compiler(device):
    x, blocks, _, bias = operands("Q4_K", 20, 8, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lowbit.ggml_linear, (x, blocks, "Q4_K", bias), test_utils=checks)
    xq, x_scale = torch.ops.lowbit.quantize_per_token(x, None, 256)
    _, row_scale = unpack_to_int8(blocks, "Q4_K", None, 256)
    arguments = (xq, x_scale, blocks, "Q4_K", row_scale, 256, None, torch.bfloat16, False)
    torch.library.opcheck(torch.ops.lowbit.ggml_int8_linear, arguments, test_utils=checks)


# Scratch memory


@pytest.mark.gpu
def test_scratch_memory_is_one_buffer_that_grows(device):
    small = scratch((3, 5), torch.int8, device)
    large = scratch((7, 11), torch.bfloat16, device)
    assert large.shape == (7, 11) and large.dtype == torch.bfloat16 and large.is_contiguous()
    assert scratch((2,), torch.float32, device).data_ptr() == large.data_ptr()
    assert small.data_ptr() % 16 == large.data_ptr() % 16 == 0
    kept = torch.cuda.memory_allocated(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert scratch((2,), torch.float32, device).data_ptr() != large.data_ptr()
    assert torch.cuda.memory_allocated(device) == kept
    del small, large
    scratch_module.release()
    assert torch.cuda.memory_allocated(device) < kept


@pytest.mark.gpu
def test_threads_do_not_share_scratch_memory(device):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(scratch, (64,), torch.int8, device).result()
    assert other.data_ptr() != scratch((64,), torch.int8, device).data_ptr()
    del pool
    gc.collect()
    assert set(scratch_module._buffers) == {threading.current_thread()}, "a thread's memory goes when it does"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_captured_product_has_memory_of_its_own(mode, device):
    """Replayed after other products have used the scratch buffer, with other activations."""
    x, blocks, values, _ = operands("Q4_K", 64, 96, device)
    weight = GgmlWeight(blocks, tuple(values.shape), "Q4_K")
    other = GgmlWeight(blocks.flip(0).contiguous(), tuple(values.shape), "Q4_K")
    row_scale = find_row_scale(blocks, "Q4_K", 256)
    product = lambda: ggml_weight_linear(x, weight, None, mode, row_scale, tune=False)  # noqa: E731
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product()
    x.copy_(torch.randn_like(x))
    ggml_weight_linear(x, other, None, mode, None, tune=False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, product())


@pytest.mark.gpu
def test_the_compilers_graphs_take_the_products(device):
    x, blocks, values, _ = operands("Q4_K", 64, 96, device)
    weight = GgmlWeight(blocks, tuple(values.shape), "Q4_K")
    row_scale = find_row_scale(blocks, "Q4_K", 256)

    def two_products(x):
        return [ggml_weight_linear(x, weight, None, mode, row_scale, tune=False) for mode in ("exact", "int8")]

    compiled = torch.compile(two_products, backend="cudagraphs")
    for _ in range(4):  # warmed up, captured, replayed
        x = torch.randn_like(x)
        for actual, expected in zip(compiled(x), two_products(x), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_a_large_one_is_not_kept(device):
    shape = (scratch_module.LARGEST_BYTES + 1,)
    first, second = (scratch(shape, torch.int8, device) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("M, mode", [(64, "exact"), (64, "int8")])
def test_a_call_takes_its_result_and_one_unpacked_weight(M, mode, device):
    N, K = 4096, 4096
    blocks = ggml.quantize(torch.randn(N, K, device=device), "Q4_K")
    weight = GgmlWeight(blocks, (N, K), "Q4_K")
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    row_scale = unpack_to_int8(blocks, "Q4_K", None, 256)[1]
    for call in range(2):
        if call:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        ggml_weight_linear(x, weight, None, mode, row_scale, tune=False)
    # Scratch memory is there since the first call: the second takes activations and sums, never another weight.
    assert torch.cuda.max_memory_allocated(device) - before < N * K / 2


def test_on_other_devices_memory_is_the_calls_own():
    first, second = (scratch((4,), torch.int8, torch.device("cpu")) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


# Limits


@pytest.mark.triton
def test_what_triton_does_not_take_is_unpacked(device):
    blocks, _ = golden("Q4_K", device)
    with use_implementation("triton_impl"):
        call = op.GgmlLinearCall(torch.zeros(17, 768, dtype=torch.bfloat16, device=device), blocks, "Q4_K", None)
        assert op.OP.refusals(call)["triton_impl"] == "is for at most 16 tokens, found 17"
        call = op.GgmlLinearCall(torch.zeros(2, 768, device=device), blocks, "Q4_K", None)
        assert op.OP.refusals(call)["triton_impl"] == "reads bf16 and fp16, found torch.float32"


@pytest.mark.triton
@pytest.mark.parametrize("ggml_type", ["Q4_K", "Q8_0"])
def test_the_largest_linears_grids_fit(ggml_type, monkeypatch):
    blocks = torch.empty(4608, ggml.row_size_bytes(ggml_type, 53248), dtype=torch.uint8, device="meta")
    x = torch.empty(16, 53248, dtype=torch.bfloat16, device="meta")
    assert_grids_fit(monkeypatch, op, op.GgmlLinearCall(x, blocks, ggml_type, None))


def test_what_does_not_fit_is_refused():
    x, blocks = torch.zeros(3, 256), torch.zeros(4, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match="needs float x and uint8 blocks"):
        ggml_linear(x.int(), blocks, "Q4_K")
    with pytest.raises(ValueError, match=r"x \(3, 255\) and Q4_K blocks \(4, 144\) do not share K: the rows hold 256"):
        ggml_linear(x[:, 1:], blocks, "Q4_K")
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        ggml_linear(x, blocks, "Q4_K", torch.zeros(3))
    xq, x_scale, row_scale = x.to(torch.int8), torch.ones(3, 1), torch.ones(4, 1)
    with pytest.raises(ValueError, match="needs int8 xq and uint8 blocks"):
        ggml_int8_linear(x, x_scale, blocks, "Q4_K", row_scale)
    with pytest.raises(ValueError, match="do not share a K"):
        ggml_int8_linear(xq[:, 1:], x_scale, blocks, "Q4_K", row_scale)
    with pytest.raises(ValueError, match=r"x_scale must be float32 \(3, 1\), got torch.float32 \(3,\)"):
        ggml_int8_linear(xq, x_scale[:, 0], blocks, "Q4_K", row_scale)
    with pytest.raises(ValueError, match=r"row_scale must be float32 \(4, 1\), got torch.float16 \(4, 1\)"):
        ggml_int8_linear(xq, x_scale, blocks, "Q4_K", row_scale.half())
    with pytest.raises(ValueError, match="rotation group 1024 does not divide K=256"):
        ggml_int8_linear(xq, x_scale, blocks, "Q4_K", row_scale, 1024)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        ggml_int8_linear(xq, x_scale, blocks, "Q4_K", row_scale, 0, torch.zeros(3))
