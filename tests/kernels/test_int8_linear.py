import pytest
import torch
from lowbit.kernels import int8_linear as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.int8_linear import int8_linear

SHAPES = [(1, 64, 256), (17, 331, 528), (33, 40, 24), (256, 768, 512), (20, 16, 4608)]
IDS = ["one_token", "ragged", "small", "aligned", "deep"]


def operands(M, N, K, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xq = torch.randint(-127, 128, (M, K), generator=generator).to(torch.int8)
    wq = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
    x_scale = torch.rand((M, 1), generator=generator) * 0.1 + 1e-3
    w_scale = torch.rand((N, 1), generator=generator) * 0.1 + 1e-3
    bias = torch.randn(N, generator=generator)
    return [tensor.to(device) for tensor in (xq, x_scale, wq, w_scale, bias)]


@pytest.mark.parametrize("M, N, K", SHAPES, ids=IDS)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_integer_product_is_exact(implementation, M, N, K, device, poison_empty):
    """Unit scales and float32 out show the int32 sum itself, which stays below 2**24 here."""
    xq, _, wq, _, _ = operands(M, N, K, device)
    ones = torch.ones(M, 1, device=device), torch.ones(N, 1, device=device)
    call = op.Int8LinearCall(xq, ones[0], wq, ones[1], None, torch.float32)
    if reason := op.OP.refusals(call)[implementation]:
        pytest.skip(reason)
    with use_implementation(implementation):
        y = int8_linear(xq, ones[0], wq, ones[1], None, torch.float32)
    assert torch.equal(y.cpu().long(), xq.cpu().long() @ wq.cpu().long().t())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_epilogue_matches_float64(implementation, with_bias, per_channel, out_dtype, device, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(40, 72, 96, device)
    w_scale = w_scale if per_channel else w_scale[:1].reshape(())
    bias = bias.to(out_dtype) if with_bias else None
    with use_implementation(implementation):
        y = int8_linear(xq, x_scale, wq, w_scale, bias, out_dtype)
    expected = (xq.double() @ wq.double().t()) * x_scale.double() * w_scale.double().reshape(1, -1)
    expected = expected if bias is None else expected + bias.double()
    eps = torch.finfo(out_dtype).eps
    assert y.dtype == out_dtype
    torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=2 * eps * float(expected.abs().mean()))


def test_a_long_call_is_chunked_to_the_same_result(device, monkeypatch, poison_empty):
    xq, x_scale, wq, w_scale, bias = operands(256, 64, 64, device)
    whole = int8_linear(xq, x_scale, wq, w_scale, bias, torch.bfloat16)
    from lowbit.kernels.int8_linear import torch_impl

    monkeypatch.setattr(torch_impl, "CHUNK_BYTES", 4 * 64 * 100)  # 100 rows: two whole chunks and a rest
    assert torch.equal(int8_linear(xq, x_scale, wq, w_scale, bias, torch.bfloat16), whole)


def test_leading_dimensions_and_strided_operands(device):
    xq, x_scale, wq, w_scale, bias = operands(60, 64, 64, device)
    flat = int8_linear(xq, x_scale, wq, w_scale, bias)
    batched = int8_linear(xq.reshape(3, 20, 64), x_scale.reshape(3, 20, 1), wq, w_scale, bias)
    assert torch.equal(batched, flat.reshape(3, 20, 64))
    strided = torch.stack((xq, xq), dim=1)[:, 0]
    assert not strided.is_contiguous() and torch.equal(int8_linear(strided, x_scale, wq, w_scale, bias), flat)


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
    with pytest.raises(ValueError, match="K=131072 could overflow"):
        int8_linear(
            torch.zeros(1, 131072, dtype=torch.int8), x_scale[:1], torch.zeros(1, 131072, dtype=torch.int8), w_scale
        )
