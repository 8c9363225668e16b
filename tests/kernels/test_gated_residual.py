"""Both ops that end a block's branch: `gated_residual`, and `gated_residual_norm_quantize`, which goes on to the next
linear's codes."""

import pytest
import torch
from lowbit.kernels import gated_residual as op
from lowbit.kernels import gated_residual_norm_quantize as norm_op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.gated_residual import gated_residual
from lowbit.kernels.gated_residual_norm_quantize import gated_residual_norm_quantize
from lowbit.kernels.rms_norm_scale_quantize import rms_norm_scale_quantize
from lowbit.kernels.rms_norm_scale_quantize.reference import rms_norm
from lowbit.tests.kernels.comparing import (
    INTERPRETER_WARNING,
    assert_codes_of,
    assert_grids_fit,
    assert_nearly_the_same_codes,
    assert_same_codes,
    assert_within_eps,
    by,
    listening_block,
)

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu
WIDTHS = [1, 64, 255, 528, 768, 4608, pytest.param(12288, marks=gpu), pytest.param(16384, marks=gpu)]
ROTATED_WIDTHS = [256, 768, 4608, pytest.param(12288, marks=gpu)]


def operands(shape, dtype, device, seed=0):
    """residual, y [..., L, K], y_weight [K], gate [..., 1, K], weight [K], scale [..., 1, K] as a block has them: loud
    channels, quiet and loud tokens, the modulations quarters of one wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    *samples, length, K = shape
    size = 10.0 ** torch.linspace(-2, 2, length).unsqueeze(1)
    residual = torch.randn(shape, generator=generator) * size
    residual[..., K // 3] *= 20
    y = torch.randn(shape, generator=generator) * size.flip(0)
    weights = torch.rand(2, K, generator=generator) + 0.5
    modulation = torch.randn(*samples, 1, 4 * K, generator=generator) * 0.5
    residual, y, weights, modulation = (tensor.to(device, dtype) for tensor in (residual, y, weights, modulation))
    _, gate, scale, _ = modulation.chunk(4, dim=-1)
    return residual, y, weights[0], gate, weights[1], scale


def factors(K, device):
    return (torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5).to(device)


def branch(y, y_weight, gate):
    """gate * rms_norm(y), in float32 and not rounded."""
    return rms_norm(y, y_weight, EPS) * gate.float()


def assert_gated(x, residual, y, y_weight, gate, eps):
    """x = residual + gate * rms_norm(y) within so many eps of x's dtype, relative to the terms, which can cancel."""
    expected, size = (
        residual.float() + branch(y, y_weight, gate),
        residual.float().abs() + branch(y, y_weight, gate).abs(),
    )
    assert (x.dtype, x.shape) == (residual.dtype, residual.shape)
    off = (x.float() - expected).abs()
    info = torch.finfo(x.dtype)
    assert (off <= eps * info.eps * size + info.tiny).all(), f"off by {float((off / size).max() / info.eps)} eps"


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_gated_residual_is_the_definition_within_two_eps(implementation, dtype, K, device, poison_empty):
    residual, y, y_weight, gate, _, _ = operands((1, 4 if device.type == "cpu" else 300, K), dtype, device)
    x = by(implementation, gated_residual, residual, y, y_weight, gate, EPS)
    assert_gated(x, residual, y, y_weight, gate, 8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", norm_op.OP.implementations)
def test_sum_and_codes_are_the_definitions(implementation, smoothed, dtype, K, device, poison_empty):
    check_both(implementation, K, dtype, device, smoothed, 0)


@pytest.mark.parametrize("K", ROTATED_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", norm_op.OP.implementations)
def test_sum_and_rotated_codes_are_the_definitions(implementation, smoothed, dtype, K, device, poison_empty):
    check_both(implementation, K, dtype, device, smoothed, 256)


def check_both(implementation, K, dtype, device, smoothed, rotation_group):
    """The codes are those of the sum as it was rounded and returned."""
    arguments = operands((1, 4 if device.type == "cpu" else 300, K), dtype, device)
    residual, y, y_weight, gate, weight, scale = arguments
    smooth = factors(K, device) if smoothed else None
    x, *codes = by(implementation, gated_residual_norm_quantize, *arguments, EPS, smooth, rotation_group)
    assert_gated(x, residual, y, y_weight, gate, 8 if dtype == torch.float32 else 2)
    expected = by("reference", rms_norm_scale_quantize, x, weight, scale, EPS, smooth, rotation_group)
    assert_nearly_the_same_codes(codes, expected, rotated=dtype if rotation_group else None)


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", norm_op.OP.implementations)
def test_kept_values_are_the_norm_of_the_returned_sum(implementation, dtype, K, device, poison_empty):
    """Neither smoothed nor rotated, and sum and codes are those of the call that does not keep them."""
    arguments = operands((1, 4 if device.type == "cpu" else 300, K), dtype, device)
    for smooth, rotation_group in ((None, 0), (factors(K, device), 0 if K % 256 else 256)):
        options = (EPS, smooth, rotation_group)
        x, *codes, values = by(implementation, gated_residual_norm_quantize, *arguments, *options, keep_values=True)
        same, *same_codes = by(implementation, gated_residual_norm_quantize, *arguments, *options)
        assert torch.equal(x, same)
        assert_same_codes(codes, same_codes)
        assert_values(values, x, *arguments[4:])


def assert_values(values, x, weight, scale):
    """rms_norm(x) * scale in x's dtype, each within two of its eps of the float32 definition, or 8 of float32's own."""
    info = torch.finfo(x.dtype)
    assert values.dtype == x.dtype
    eps = 8 if x.dtype == torch.float32 else 2
    expected = rms_norm(x, weight, EPS) * scale.float()
    torch.testing.assert_close(values.float(), expected, rtol=eps * info.eps, atol=info.tiny * info.eps)


@pytest.mark.parametrize("K", [255, 768])
@pytest.mark.parametrize("implementation", norm_op.OP.implementations)
def test_kept_values_of_one_token(implementation, K, device, poison_empty):
    arguments = operands((1, K), torch.bfloat16, device)
    x, *codes, values = by(implementation, gated_residual_norm_quantize, *arguments, EPS, keep_values=True)
    same, *same_codes = by(implementation, gated_residual_norm_quantize, *arguments, EPS)
    assert torch.equal(x, same)
    assert_same_codes(codes, same_codes)
    assert_values(values, x, *arguments[4:])


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_both_ops_return_the_same_sum(implementation, device, poison_empty):
    arguments = operands((2, 5, 528), torch.bfloat16, device)
    x, _, _ = by(implementation, gated_residual_norm_quantize, *arguments, EPS)
    assert torch.equal(x, by(implementation, gated_residual, *arguments[:4], EPS))


@pytest.mark.parametrize("samples", [(3,), (1, 2)])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_every_sample_has_its_own_gate_and_scale(implementation, length, samples, device, poison_empty):
    residual, y, y_weight, gate, weight, scale = operands((*samples, length, 264), torch.bfloat16, device)
    x = by(implementation, gated_residual, residual, y, y_weight, gate, EPS)
    arguments = (residual, y, y_weight, gate, weight, scale)
    both = by(implementation, gated_residual_norm_quantize, *arguments, EPS, keep_values=True)
    assert x.shape == both[0].shape == both[1].shape == both[3].shape == residual.shape
    assert tuple(both[2].shape) == (*samples, length, 1)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in samples)).reshape(-1, len(samples)).tolist():
        i = tuple(index)
        alone = by(implementation, gated_residual, residual[i], y[i], y_weight, gate[i], EPS)
        assert torch.equal(x[i], alone)
        arguments = (residual[i], y[i], y_weight, gate[i], weight, scale[i])
        one = by(implementation, gated_residual_norm_quantize, *arguments, EPS, keep_values=True)
        for batched, part in zip(both, one, strict=True):
            assert torch.equal(batched[i], part)


def apart(tensor, dim):
    """The same values with a stranger after each along a dimension."""
    return torch.stack((tensor, torch.full_like(tensor, 77)), dim=dim + 1 if dim >= 0 else dim).select(
        dim + 1 if dim >= 0 else dim, 0
    )


@pytest.mark.parametrize("strided", ["residual", "y", "y_weight", "gate", "weight", "scale", "smooth", "tokens"])
@pytest.mark.parametrize("keep_values", [False, True], ids=["codes", "values"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_operands_of_any_stride(implementation, keep_values, strided, device):
    names = ("residual", "y", "y_weight", "gate", "weight", "scale")
    named = dict(zip(names, operands((2, 2, 300), torch.bfloat16, device), strict=True))
    named |= {"smooth": factors(300, device), "eps": EPS, "keep_values": keep_values}
    expected = by(implementation, gated_residual_norm_quantize, **named)
    assert len(expected) == 3 + keep_values
    if strided == "tokens":
        named |= {name: apart(named[name], 1) for name in ("residual", "y")}
    else:
        named[strided] = apart(named[strided], -1)
        assert named[strided].stride(-1) == 2
    both = by(implementation, gated_residual_norm_quantize, **named)
    for actual, plain in zip(both, expected, strict=True):
        assert torch.equal(actual, plain)
    x = by(implementation, gated_residual, *(named[name] for name in names[:4]), EPS)
    assert torch.equal(x, expected[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1], ids=["residual", "y"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_that_is_not_finite_spoils_only_itself(implementation, where, value, device, poison_empty):
    arguments = operands((1, 6, 768), torch.bfloat16, device)
    alone = by(implementation, gated_residual_norm_quantize, *arguments, EPS)
    arguments[where][0, 2, 400] = value
    x, xq, x_scale = by(implementation, gated_residual_norm_quantize, *arguments, EPS)
    assert not x[0, 2].isfinite().all() and not x_scale[0, 2].isfinite() and not xq[0, 2].any()
    others = [0, 1, 3, 4, 5]
    for actual, plain in zip((x, xq, x_scale), alone, strict=True):
        assert torch.equal(actual[0, others], plain[0, others])


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_tokens_of_zeros(implementation, device, poison_empty):
    residual, y, y_weight, gate, weight, scale = operands((1, 3, 528), torch.bfloat16, device)
    y[0, 0], residual[0, 1] = 0, 0
    residual[0, 2], y[0, 2] = 0, 0
    x, xq, x_scale = by(implementation, gated_residual_norm_quantize, residual, y, y_weight, gate, weight, scale, EPS)
    assert torch.equal(x[0, 0], residual[0, 0])
    assert_gated(x, residual, y, y_weight, gate, 2)
    assert not x[0, 2].any() and not xq[0, 2].any() and float(x_scale[0, 2]) == pytest.approx(1e-30)


@pytest.mark.parametrize("shape", [(1, 0, 256), (2, 0, 256), (0, 5, 256)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens(implementation, shape, device):
    tokens, row = torch.zeros(shape, device=device), torch.zeros(shape[0], 1, 256, device=device)
    weight = torch.ones(256, device=device)
    assert tuple(by(implementation, gated_residual, tokens, tokens, weight, row, EPS).shape) == shape
    arguments = (tokens, tokens, weight, row, weight, row, EPS, None, 256)
    x, xq, x_scale, values = by(implementation, gated_residual_norm_quantize, *arguments, keep_values=True)
    assert tuple(x.shape) == tuple(xq.shape) == tuple(values.shape) == shape
    assert tuple(x_scale.shape) == (*shape[:-1], 1)
    assert len(by(implementation, gated_residual_norm_quantize, *arguments)) == 3


@pytest.mark.triton
@pytest.mark.parametrize("samples", [1, 4, 100_000])
def test_grids_fit_any_number_of_tokens_and_samples(samples, monkeypatch):
    x = torch.empty(100_000, 256, dtype=torch.bfloat16, device="meta")
    rows = x[:samples]
    assert_grids_fit(monkeypatch, op, op.GatedResidualCall(x, x, x[0], rows, EPS))
    call = norm_op.GatedResidualNormQuantizeCall(x, x, x[0], rows, x[0], rows, EPS, None, 256, keep_values=True)
    assert_grids_fit(monkeypatch, norm_op, call)


@pytest.mark.gpu
def test_more_than_2_to_31_values(device):
    K = 8448
    residual = torch.randn(1, 262_150, K, device=device, dtype=torch.bfloat16)
    weight, row = (torch.rand(shape, device=device).to(torch.bfloat16) for shape in ((K,), (1, 1, K)))
    arguments = (residual, residual, weight, row, weight, row)
    x, *codes, values = by("triton_impl", gated_residual_norm_quantize, *arguments, EPS, keep_values=True)
    alone = by("triton_impl", gated_residual, *arguments[:4], EPS)
    for tokens in range(0, x.shape[1], 2**15):  # a part at a time: the comparison holds float32 copies
        part = slice(tokens, tokens + 2**15)
        assert_within_eps(x[:, part], alone[:, part], 2)
    tail = residual[:, -50:]
    assert_gated(x[:, -50:], tail, tail, weight, row, 2)
    expected = by("reference", rms_norm_scale_quantize, x[:, -50:], weight, row, EPS)
    assert_nearly_the_same_codes([tensor[:, -50:] for tensor in codes], expected)
    assert_values(values[:, -50:], x[:, -50:], weight, row)


# The host's own operations


def test_the_definition_is_torchs_sum_gate_and_norm(device):
    """In bfloat16 the norm, its weight, the gate and the sum each round once more."""
    residual, y, y_weight, gate, _, _ = operands((2, 9, 4608), torch.bfloat16, device)
    theirs = residual + gate * torch.nn.functional.rms_norm(y, (4608,), y_weight, EPS)
    assert_gated(theirs, residual, y, y_weight, gate, 3)


def test_the_definition_is_the_hosts_block(comfy_host, device):
    """Ideogram 4's own block, with an attention and an FFN that return what they are given."""
    block, heard = listening_block(comfy_host, device, EPS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 256, generator=generator).to(device, torch.bfloat16)
    condition = torch.randn(2, 1, 64, generator=generator).to(device, torch.bfloat16)
    with torch.no_grad():
        _, gate_attention, scale_ffn, gate_ffn = block.adaln_modulation(condition).chunk(4, dim=-1)
        after_block = block(x, None, None, condition)
    gate_attention, gate_ffn, scale_ffn = gate_attention.tanh(), gate_ffn.tanh(), 1.0 + scale_ffn
    attention_out, ffn_out = heard
    norms = block.attention_norm2.weight, gate_attention, block.ffn_norm1.weight, scale_ffn
    ours, *codes = by("reference", gated_residual_norm_quantize, x, attention_out, *norms, EPS)
    assert_gated(ours, x, attention_out, block.attention_norm2.weight, gate_attention, 1)
    # The host's sum rounds three times more, which the second norm then sees, and rounds twice more itself.
    theirs, mine = ffn_out.float(), rms_norm(ours, block.ffn_norm1.weight, EPS) * scale_ffn.float()
    assert float((theirs - mine).norm() / mine.norm()) < torch.finfo(torch.bfloat16).eps
    assert_codes_of(codes, mine)
    # The sum that the host's FFN is added to is not seen from outside: ours stands for it, one more rounding away.
    assert_gated(after_block, ours, ffn_out, block.ffn_norm2.weight, gate_ffn, 4)


def test_what_does_not_fit_is_refused():
    residual, y, y_weight, gate, weight, scale = operands((2, 5, 32), torch.float32, "cpu")
    same = r"residual and y must be floats of one shape and dtype, got \(2, 5, 32\) torch\.float32 and"
    for function, rest, name in (
        (gated_residual, (), "gated_residual"),
        (gated_residual_norm_quantize, (weight, scale), "gated_residual_norm_quantize"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: {same} \(2, 4, 32\) torch\.float32"):
            function(residual, y[:, :4], y_weight, gate, *rest, EPS)
        with pytest.raises(ValueError, match=rf"{name}: {same} \(2, 5, 32\) torch\.float16"):
            function(residual, y.half(), y_weight, gate, *rest, EPS)
        with pytest.raises(ValueError, match=rf"{name}: .* got \(2, 5, 32\) torch\.int32"):
            function(residual.int(), y.int(), y_weight, gate, *rest, EPS)
        with pytest.raises(ValueError, match=rf"{name}: weight must have shape \(32,\), got \(1, 32\)"):
            function(residual, y, y_weight[None], gate, *rest, EPS)
        with pytest.raises(ValueError, match=rf"{name}: gate must have shape \(2, 1, 32\), .* got \(1, 1, 32\)"):
            function(residual, y, y_weight, gate[:1], *rest, EPS)
    operation = gated_residual_norm_quantize
    with pytest.raises(ValueError, match=r"weight must have shape \(32,\), got \(31,\)"):
        operation(residual, y, y_weight, gate, weight[:31], scale, EPS)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 1, 32\), one row a sample, got \(2, 32\)"):
        operation(residual, y, y_weight, gate, weight, scale[:, 0], EPS)
    with pytest.raises(ValueError, match=r"smooth must be float32 of shape \(32,\), got torch\.float16 \(32,\)"):
        operation(residual, y, y_weight, gate, weight, scale, EPS, torch.ones(32).half())
    with pytest.raises(ValueError, match="rotation group 256 does not divide K=32"):
        operation(residual, y, y_weight, gate, weight, scale, EPS, None, 256)


@pytest.mark.triton
def test_what_triton_refuses_is_computed_by_the_reference(device):
    arguments = operands((1, 2, 17408), torch.bfloat16, device)
    refused = "holds K up to 16384 in registers, found K=17408"
    with use_implementation("triton_impl"):
        with pytest.raises(RuntimeError, match=refused):
            gated_residual(*arguments[:4], EPS)
        with pytest.raises(RuntimeError, match=refused):
            gated_residual_norm_quantize(*arguments, EPS)
    assert gated_residual(*arguments[:4], EPS).shape == arguments[0].shape
    assert gated_residual_norm_quantize(*arguments, EPS)[1].shape == arguments[0].shape


@pytest.mark.parametrize("options", ["plain", "smooth", "rotated", "kept"])
def test_the_fakes_agree_with_the_ops(options, device):
    with torch.inference_mode(False):
        residual, y, y_weight, gate, weight, scale = operands((4, 512), torch.bfloat16, device)
        smooth = factors(512, device) if options == "smooth" else None
        arguments = (residual[::2], y[::2], y_weight, gate)
        torch.library.opcheck(torch.ops.lowbit.gated_residual.default, (*arguments, EPS))
        rotation_group = 256 if options == "rotated" else 0
        arguments = (*arguments, weight, scale, EPS, smooth, rotation_group, options == "kept")
        torch.library.opcheck(torch.ops.lowbit.gated_residual_norm_quantize.default, arguments)
