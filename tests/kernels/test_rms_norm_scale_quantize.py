import pytest
import torch
from lowbit.kernels import rms_norm_scale_quantize as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.rms_norm_scale_quantize import reference, rms_norm_scale_quantize
from lowbit.tests.kernels.comparing import (
    INTERPRETER_WARNING,
    assert_codes_of,
    assert_grids_fit,
    assert_nearly_the_same_codes,
    assert_same_codes,
    by,
    listening_block,
)

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)

REPLACEMENTS = op.OP.implementations[:-1]  # of the reference
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu
WIDTHS = [1, 64, 255, 528, 768, 4608, pytest.param(12288, marks=gpu), pytest.param(16384, marks=gpu)]
ROTATED_WIDTHS = [256, 768, 4608, pytest.param(12288, marks=gpu), pytest.param(16384, marks=gpu)]


def operands(shape, dtype, device, seed=0):
    """x [..., L, K], weight [K], scale [..., 1, K] as a block has them: a loud channel, quiet and loud tokens, and a
    modulation that is a quarter of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    *samples, length, K = shape
    size = 10.0 ** torch.linspace(-2, 2, length).unsqueeze(1)
    x = torch.randn(shape, generator=generator) * size
    x[..., K // 3] *= 20
    weight = torch.rand(K, generator=generator) + 0.5
    modulation = torch.randn(*samples, 1, 4 * K, generator=generator) * 0.3 + 1
    x, weight, modulation = (tensor.to(device, dtype) for tensor in (x, weight, modulation))
    return x, weight, modulation.chunk(4, dim=-1)[1]


def factors(K, device):
    return (torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5).to(device)


def normalized(x, weight, scale):
    """The definition's float32 values."""
    values = reference.rms_norm(x, weight, EPS)
    return values if scale is None else values * scale.float()


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("rotation_group", [0, 16, 256])
def test_the_reference_quantizes_the_normalized_values(rotation_group, smoothed, device, poison_empty):
    """In float32, where rounding before a rotation is nothing."""
    x, weight, scale = operands((2, 7, 768), torch.float32, device)
    smooth = factors(768, device) if smoothed else None
    codes = by("reference", rms_norm_scale_quantize, x, weight, scale, EPS, smooth, rotation_group)
    assert_codes_of(codes, normalized(x, weight, scale), smooth, rotation_group)


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_codes_are_the_references(implementation, smoothed, dtype, K, device, poison_empty):
    check_codes(implementation, K, dtype, device, smoothed, 0)


@pytest.mark.parametrize("K", ROTATED_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_rotated_codes_are_the_references(implementation, smoothed, dtype, K, device, poison_empty):
    check_codes(implementation, K, dtype, device, smoothed, 256)


def check_codes(implementation, K, dtype, device, smoothed, rotation_group):
    x, weight, scale = operands((1, 4 if device.type == "cpu" else 300, K), dtype, device)
    smooth = factors(K, device) if smoothed else None
    actual = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, smooth, rotation_group)
    expected = by("reference", rms_norm_scale_quantize, x, weight, scale, EPS, smooth, rotation_group)
    assert_nearly_the_same_codes(actual, expected, rotated=dtype if rotation_group else None)


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_kept_values_are_the_definitions(implementation, with_scale, dtype, K, device, poison_empty):
    """Neither smoothed nor rotated, and the codes are those of the call that does not keep them."""
    x, weight, scale = operands((1, 4 if device.type == "cpu" else 300, K), dtype, device)
    scale = scale if with_scale else None
    for smooth, rotation_group in ((None, 0), (factors(K, device), 0 if K % 256 else 256)):
        arguments = (x, weight, scale, EPS, smooth, rotation_group)
        *codes, values = by(implementation, rms_norm_scale_quantize, *arguments, keep_values=True)
        assert_same_codes(codes, by(implementation, rms_norm_scale_quantize, *arguments))
        assert_values(values, normalized(x, weight, scale), dtype)


def assert_values(values, expected, dtype):
    """Values of this dtype, each within two of its eps of the float32 definition, or within 8 of float32's own."""
    info = torch.finfo(dtype)
    assert values.dtype == dtype
    eps = 8 if dtype == torch.float32 else 2
    torch.testing.assert_close(values.float(), expected, rtol=eps * info.eps, atol=info.tiny * info.eps)


@pytest.mark.parametrize("K", [255, 768])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_kept_values_of_one_token(implementation, K, device, poison_empty):
    x, weight, scale = operands((1, K), torch.bfloat16, device)
    *codes, values = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, keep_values=True)
    assert_same_codes(codes, by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS))
    assert_values(values, normalized(x, weight, scale), torch.bfloat16)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_without_a_scale(implementation, device, poison_empty):
    x, weight, _ = operands((2, 5, 528), torch.bfloat16, device)
    actual = by(implementation, rms_norm_scale_quantize, x, weight, None, EPS)
    ones = torch.ones(2, 1, 528, dtype=torch.bfloat16, device=device)
    assert_codes_of(actual, normalized(x, weight, None))
    assert_nearly_the_same_codes(actual, by(implementation, rms_norm_scale_quantize, x, weight, ones, EPS))


@pytest.mark.parametrize("samples", [(3,), (1, 2)])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_every_sample_has_its_own_scale(implementation, length, samples, device, poison_empty):
    x, weight, scale = operands((*samples, length, 264), torch.bfloat16, device)
    actual = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, keep_values=True)
    assert actual[0].shape == actual[2].shape == x.shape and tuple(actual[1].shape) == (*samples, length, 1)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in samples)).reshape(-1, len(samples)).tolist():
        i = tuple(index)
        one = by(implementation, rms_norm_scale_quantize, x[i], weight, scale[i], EPS, keep_values=True)
        for batched, alone in zip(actual, one, strict=True):
            assert torch.equal(batched[i], alone)


@pytest.mark.parametrize("keep_values", [False, True], ids=["codes", "values"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_operands_of_any_stride(implementation, keep_values, device):
    keep = {"keep_values": keep_values}
    x, weight, scale = operands((2, 6, 300), torch.bfloat16, device)
    smooth = factors(300, device)
    expected = by(implementation, rms_norm_scale_quantize, x, weight, scale.contiguous(), EPS, smooth, **keep)
    wide = torch.randn(2, 6, 700, device=device).to(torch.bfloat16)
    wide[..., 1:301] = x
    expanded = scale[:1].expand(2, 1, 300)
    cases = {
        "tokens apart": (wide[..., 1:301], weight, scale, smooth),
        "features apart": (x.transpose(1, 2).contiguous().transpose(1, 2), weight, scale, smooth),
        "weight": (x, torch.stack((weight, -weight), 1)[:, 0], scale, smooth),
        "scale": (x, weight, torch.stack((scale, -scale), -1)[..., 0], smooth),
        "smooth": (x, weight, scale, torch.stack((smooth, -smooth), 1)[:, 0]),
    }
    for name, arguments in cases.items():
        actual = by(implementation, rms_norm_scale_quantize, *arguments[:3], EPS, arguments[3], **keep)
        assert all(map(torch.equal, actual, expected)), name
    one = by(implementation, rms_norm_scale_quantize, x, weight, expanded, EPS, **keep)
    same = by(implementation, rms_norm_scale_quantize, x, weight, expanded.contiguous(), EPS, **keep)
    assert len(expected) == len(one) == 2 + keep_values and all(map(torch.equal, one, same))


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_tokens_of_zeros_denormals_and_huge_values(implementation, device, poison_empty):
    """eps keeps the norm of nearly nothing finite; a square that float32 cannot hold normalizes its token to zeros."""
    x = torch.zeros(1, 3, 512, device=device)
    x[0, 1] = 1e-40
    x[0, 2] = 1e30
    weight = torch.ones(512, device=device)
    xq, x_scale, values = by(implementation, rms_norm_scale_quantize, x, weight, None, EPS, keep_values=True)
    assert torch.equal(xq.float() * x_scale, torch.zeros_like(x))
    assert float(values.abs().max()) < 1e-37


@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_large_float16_values_do_not_overflow(implementation, rotation_group, device, poison_empty):
    """The normalized values are small, whatever the size of x and of its product with weight and scale."""
    x, weight, scale = operands((1, 4, 512), torch.float32, device)
    x = (x / x.abs().amax(-1, keepdim=True) * 60000).half()
    weight, scale = (weight * 4).half(), scale.half()
    *codes, values = by(
        implementation, rms_norm_scale_quantize, x, weight, scale, EPS, None, rotation_group, keep_values=True
    )
    assert codes[1].isfinite().all()
    assert_values(values, normalized(x, weight, scale), torch.float16)
    if not rotation_group:
        assert_codes_of(codes, normalized(x, weight, scale))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_that_is_not_finite_spoils_only_itself(implementation, rotation_group, value, device, poison_empty):
    x, weight, scale = operands((1, 6, 768), torch.bfloat16, device)
    alone = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, None, rotation_group)
    x[0, 2, 400] = value
    xq, x_scale = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, None, rotation_group)
    assert not x_scale[0, 2].isfinite() and not xq[0, 2].any()
    for row in (0, 1, 3, 4, 5):
        assert torch.equal(xq[0, row], alone[0][0, row]) and torch.equal(x_scale[0, row], alone[1][0, row])


@pytest.mark.parametrize("shape", [(1, 0, 256), (2, 0, 256), (0, 5, 256)])
@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens(implementation, with_scale, shape, device):
    x = torch.zeros(shape, device=device)
    scale = torch.zeros(shape[0], 1, 256, device=device) if with_scale else None
    weight = torch.ones(256, device=device)
    xq, x_scale, values = by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS, keep_values=True)
    assert tuple(xq.shape) == tuple(values.shape) == shape and tuple(x_scale.shape) == (*shape[:-1], 1)
    assert len(by(implementation, rms_norm_scale_quantize, x, weight, scale, EPS)) == 2


@pytest.mark.triton
@pytest.mark.parametrize("samples", [1, 4])
def test_grids_fit_any_number_of_tokens(samples, monkeypatch):
    x = torch.empty(100_000, 4608, dtype=torch.bfloat16, device="meta")
    scale = torch.empty(samples, 4608, dtype=torch.bfloat16, device="meta")
    assert_grids_fit(monkeypatch, op, op.RmsNormScaleQuantizeCall(x, x[0], scale, EPS, None, 256, keep_values=True))


@pytest.mark.triton
def test_grids_fit_any_number_of_samples(monkeypatch):
    x = torch.empty(100_000, 256, dtype=torch.bfloat16, device="meta")
    assert_grids_fit(monkeypatch, op, op.RmsNormScaleQuantizeCall(x, x[0], x, EPS, None, 0))


@pytest.mark.gpu
def test_more_than_2_to_31_values(device):
    x = torch.randn(1, 262_150, 8448, device=device, dtype=torch.bfloat16)
    weight, scale = (torch.rand(shape, device=device).to(torch.bfloat16) for shape in ((8448,), (1, 1, 8448)))
    xq, x_scale, values = by("triton_impl", rms_norm_scale_quantize, x, weight, scale, EPS, keep_values=True)
    tail = by("reference", rms_norm_scale_quantize, x[:, -50:], weight, scale, EPS)
    assert_nearly_the_same_codes((xq[:, -50:], x_scale[:, -50:]), tail)
    assert_values(values[:, -50:], normalized(x[:, -50:], weight, scale), torch.bfloat16)


# The host's own operations


def test_the_definition_is_torchs_norm_times_the_scale(device):
    """In bfloat16 the norm, its weight and the product each round once more."""
    x, weight, scale = operands((2, 9, 4608), torch.bfloat16, device)
    theirs = torch.nn.functional.rms_norm(x, (4608,), weight, EPS) * scale
    torch.testing.assert_close(
        theirs.float(), normalized(x, weight, scale), rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0
    )


def test_the_definition_is_what_the_hosts_block_hands_to_its_linears(comfy_host, device):
    """Ideogram 4's own block, with its attention and FFN replaced by ears."""
    block, heard = listening_block(comfy_host, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 256, generator=generator).to(device, torch.bfloat16)
    condition = torch.randn(2, 1, 64, generator=generator).to(device, torch.bfloat16)
    with torch.no_grad():
        scale = 1.0 + block.adaln_modulation(condition).chunk(4, dim=-1)[0]
        block(x, None, None, condition)
    expected = normalized(x, block.attention_norm1.weight, scale)
    torch.testing.assert_close(heard[0].float(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_what_does_not_fit_is_refused():
    x, weight, scale = operands((2, 5, 32), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"rms_norm_scale_quantize: weight must have shape \(32,\), got \(31,\)"):
        rms_norm_scale_quantize(x, weight[:31], scale, EPS)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 1, 32\), one row a sample, got \(1, 1, 32\)"):
        rms_norm_scale_quantize(x, weight, scale[:1], EPS)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 1, 32\), one row a sample, got \(2, 32\)"):
        rms_norm_scale_quantize(x, weight, scale[:, 0], EPS)
    with pytest.raises(ValueError, match=r"rms_norm_scale_quantize needs floating-point activations, got torch\.int64"):
        rms_norm_scale_quantize(x.long(), weight, scale, EPS)
    with pytest.raises(ValueError, match=r"smooth must be float32 of shape \(32,\), got torch\.bfloat16 \(32,\)"):
        rms_norm_scale_quantize(x, weight, scale, EPS, torch.ones(32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rotation group 256 does not divide K=32"):
        rms_norm_scale_quantize(x, weight, scale, EPS, None, 256)


@pytest.mark.triton
def test_what_triton_refuses_is_computed_by_the_reference(device):
    x, weight, scale = operands((1, 2, 17408), torch.bfloat16, device)
    with (
        use_implementation("triton_impl"),
        pytest.raises(RuntimeError, match="holds K up to 16384 in registers, found K=17408"),
    ):
        rms_norm_scale_quantize(x, weight, scale, EPS)
    actual = rms_norm_scale_quantize(x, weight, scale, EPS)
    assert_nearly_the_same_codes(actual, by("reference", rms_norm_scale_quantize, x, weight, scale, EPS))


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("options", ["plain", "smooth", "rotated", "kept"])
def test_the_fake_agrees_with_the_op(options, with_scale, device):
    with torch.inference_mode(False):
        x, weight, scale = operands((4, 512), torch.bfloat16, device)
        smooth = factors(512, device) if options == "smooth" else None
        rows = scale.reshape(1, 512) if with_scale else None
        arguments = (x[::2], weight, rows, EPS, smooth, 256 if options == "rotated" else 0, options == "kept")
        torch.library.opcheck(torch.ops.lowbit.rms_norm_scale_quantize.default, arguments)
