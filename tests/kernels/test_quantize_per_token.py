import pytest
import torch
from lowbit.formats import chunks
from lowbit.formats.int8 import hadamard, rotate
from lowbit.kernels import quantize_per_token as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.quantize_per_token import quantize_per_token
from lowbit.tests.kernels.comparing import (
    assert_grids_fit,
    assert_nearly_the_same_codes,
    assert_same_codes,
    by,
)

REPLACEMENTS = op.OP.implementations[:-1]  # of the reference
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu
# One feature, a part of a block, a block and its edges, two parts, the model's two, the longest that is held in
# registers, and tokens that several programs share.
WIDTHS = [1, 64, 255, 256, 528, 4608, pytest.param(12288, marks=gpu), 16384, 17411, pytest.param(53248, marks=gpu)]
ROTATED_WIDTHS = [256, 768, 4608, pytest.param(12288, marks=gpu), 17408, pytest.param(53248, marks=gpu)]


def tokens(M, K, dtype, device, seed=0):
    """x [M, K] whose rows differ in size by up to 10**6; with rows of zeros and of denormals, and a loud channel."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.linspace(-3, 3, M).unsqueeze(1)
    x = torch.randn(M, K, generator=generator) * size
    x[:, K // 3] *= 20
    x[1::5] = 0
    x[2::5] = torch.finfo(dtype).smallest_normal / 8 * torch.randn(x[2::5].shape, generator=generator)
    return x.clamp(-60000, 60000).to(device, dtype)


def factors(K, device, seed=1):
    return (torch.rand(K, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device)


def definition(x, smooth=None, rotation_group=0):
    """x / scale and scale in float64, apart from the rotation, which is the format's own."""
    x = x.double() if smooth is None else x.double() * smooth.double()
    x = rotate(x, rotation_group) if rotation_group else x
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return x / scale, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (17, 528), (2, 3, 256)], ids=["one_token", "ragged", "batched"])
@pytest.mark.parametrize("options", ["plain", "smooth", "rotated"])
def test_codes_and_scales_are_the_definitions(dtype, shape, options, device, poison_empty):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    smooth = factors(shape[-1], device) if options == "smooth" else None
    rotation_group = 16 if options == "rotated" else 0
    xq, x_scale = quantize_per_token(x, smooth, rotation_group)
    scaled, scale = definition(x, smooth, rotation_group)
    assert (xq.dtype, xq.shape) == (torch.int8, x.shape)
    assert (x_scale.dtype, x_scale.shape) == (torch.float32, (*shape[:-1], 1))
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(x_scale.double(), scale, rtol=4 * eps, atol=0)
    assert (
        xq.double() - scaled
    ).abs().max() <= 0.5 + 127 * 4 * eps  # the nearest integer, up to float32's own rounding
    assert xq.abs().max() == 127


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_every_bit_is_the_references(implementation, smoothed, dtype, K, device, poison_empty):
    x = tokens(6 if device.type == "cpu" else 300, K, dtype, device)
    smooth = factors(K, device) if smoothed else None
    actual = by(implementation, quantize_per_token, x, smooth)
    assert_same_codes(actual, by("reference", quantize_per_token, x, smooth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_a_half_that_is_one_only_after_rounding_the_product_is_rounded_as_in_the_reference(
    implementation, dtype, device
):
    """x * (1 / x_scale) in float32 can land on a half that the exact product misses: a kernel that fuses the product
    with the rounding gets the neighbouring code there. In bfloat16, whose values are few, that is no rarity."""
    x = torch.randn(1024, 4608, generator=torch.Generator().manual_seed(0)).to(dtype)
    reciprocal = (x.float().abs().amax(1, keepdim=True) / torch.tensor(127.0)).reciprocal()
    fused = (x.double() * reciprocal.double()).round()
    told_apart = ((x.float() * reciprocal).round().double() != fused).sum(1)
    x = x[told_apart.argsort(descending=True)[:4]].to(device)
    assert int(told_apart.amax()) > 0
    assert_same_codes(by(implementation, quantize_per_token, x), by("reference", quantize_per_token, x))


@pytest.mark.parametrize("K", ROTATED_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_rotated_codes_are_the_references_but_for_values_between_two(
    implementation, smoothed, dtype, K, device, poison_empty
):
    x = tokens(6 if device.type == "cpu" else 300, K, dtype, device)
    smooth = factors(K, device) if smoothed else None
    actual = by(implementation, quantize_per_token, x, smooth, 256)
    rotated = dtype if smoothed else torch.float32  # unsmoothed values have their dtype already
    assert_nearly_the_same_codes(actual, by("reference", quantize_per_token, x, smooth, 256), rotated)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_the_rotation_spreads_a_loud_channel(implementation, device):
    """One value among zeros becomes 256 of the same size: +-127 all over its group, none elsewhere."""
    x = torch.zeros(1, 768, device=device)
    x[0, 300] = 5.0
    xq, x_scale = by(implementation, quantize_per_token, x, None, 256)
    assert torch.equal(xq[0, 256:512].abs(), torch.full((256,), 127, dtype=torch.int8, device=device))
    assert not xq[0, :256].any() and not xq[0, 512:].any()
    torch.testing.assert_close(x_scale, torch.full((1, 1), 5.0 / 16 / 127, device=device))


@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_large_float16_values_do_not_overflow(implementation, rotation_group, device):
    x = torch.full((3, 512), 65504.0, dtype=torch.float16, device=device)
    x[1, ::2] *= -1
    x[2] *= hadamard(256, device, torch.float16)[3].sign().repeat(2)  # rotated: one value of 16 times the size
    # What is rotated is rounded to float16 first: it may not grow there.
    smooth = None if rotation_group else torch.full((512,), 4.0, device=device)
    xq, x_scale = by(implementation, quantize_per_token, x, smooth, rotation_group)
    values = rotate(x.double(), 256) if rotation_group else x.double() * 4
    assert x_scale.isfinite().all() and float(values.abs().max()) > 65504
    assert ((xq.double() * x_scale.double() - values).abs() <= x_scale.double() * 0.501).all()


@pytest.mark.parametrize("K", [64, 528, 17411])
@pytest.mark.parametrize("implementation", REPLACEMENTS)
def test_tokens_of_any_strides(implementation, K, device):
    """Tokens apart from each other, features apart from each other, and a first value at an odd address."""
    wide = tokens(10, 2 * K + 1, torch.bfloat16, device)
    for x in (wide[:, :K], wide[::3, 1 : K + 1], wide[:, : 2 * K : 2], tokens(K, 5, torch.bfloat16, device).t()):
        actual = by(implementation, quantize_per_token, x)
        assert_same_codes(actual, by("reference", quantize_per_token, x.contiguous()))


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_smooth_of_any_stride(implementation, device):
    x, smooth = tokens(4, 300, torch.bfloat16, device), factors(600, device)[::2]
    actual = by(implementation, quantize_per_token, x, smooth)
    assert_same_codes(actual, by("reference", quantize_per_token, x, smooth.contiguous()))


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_of_zeros_gives_zeros_and_a_positive_scale(implementation, device, poison_empty):
    for K in (32, 4608, 17411):
        xq, x_scale = by(implementation, quantize_per_token, torch.zeros(2, K, device=device))
        assert torch.equal(xq, torch.zeros_like(xq)) and torch.equal(x_scale, torch.full_like(x_scale, 1e-30))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("K, rotation_group", [(32, 0), (768, 0), (17411, 0), (768, 256), (17408, 256)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_that_is_not_finite_spoils_only_itself(implementation, K, rotation_group, value, device, poison_empty):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).to(device)
    alone = by(implementation, quantize_per_token, x, None, rotation_group)
    x[1, K // 2 + 3] = value
    xq, x_scale = by(implementation, quantize_per_token, x, None, rotation_group)
    assert not x_scale[1].isfinite() and torch.equal(xq[1], torch.zeros_like(xq[1]))
    if not rotation_group:  # rotating mixes an infinity into sums that are NaN or infinite
        assert bool(x_scale[1].isnan()) == (value != value)
    for row in (0, 2):
        assert torch.equal(xq[row], alone[0][row]) and torch.equal(x_scale[row], alone[1][row])


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (0, 17408)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens(implementation, shape, device):
    xq, x_scale = by(implementation, quantize_per_token, torch.zeros(shape, device=device), None, 256)
    assert (xq.dtype, tuple(xq.shape)) == (torch.int8, shape)
    assert (x_scale.dtype, tuple(x_scale.shape)) == (torch.float32, (*shape[:-1], 1))


@pytest.mark.triton
@pytest.mark.parametrize("K", [4608, 16640])
def test_grids_fit_any_number_of_tokens(K, monkeypatch):
    x = torch.empty(100_000, K, dtype=torch.bfloat16, device="meta")
    assert_grids_fit(monkeypatch, op, op.QuantizePerTokenCall(x, None, 256))


@pytest.mark.gpu
def test_more_long_tokens_than_a_grid_has_rows(device):
    x = torch.randn(65537, 16400, device=device, dtype=torch.bfloat16)
    xq, x_scale = by("triton_impl", quantize_per_token, x)
    tail = slice(-5, None)
    assert_same_codes((xq[tail], x_scale[tail]), by("reference", quantize_per_token, x[tail]))


@pytest.mark.gpu
def test_more_than_2_to_31_values(device):
    x = torch.randn(262_150, 8448, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    xq, x_scale = by("triton_impl", quantize_per_token, x, None, 256)
    tail = slice(-50, None)
    assert_nearly_the_same_codes(
        (xq[tail], x_scale[tail]), by("reference", quantize_per_token, x[tail], None, 256), torch.float32
    )


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"quantize_per_token needs floating-point activations, got torch\.int32"):
        quantize_per_token(x.int())
    with pytest.raises(ValueError, match=r"smooth must be float32 of shape \(32,\), got torch\.float32 \(31,\)"):
        quantize_per_token(x, torch.ones(31))
    with pytest.raises(ValueError, match=r"smooth must be float32 of shape \(32,\), got torch\.float64 \(32,\)"):
        quantize_per_token(x, torch.ones(32).double())
    with pytest.raises(ValueError, match="rotation group 64 does not divide K=96"):
        quantize_per_token(torch.zeros(2, 96), rotation_group=64)
    with pytest.raises(ValueError, match=r"a rotation group has 4, 16, 64, 256, \.\.\. features, found 8"):
        quantize_per_token(x, rotation_group=8)


@pytest.mark.triton
def test_what_triton_refuses_is_computed_by_the_reference(device):
    for x, group, reason in [
        (torch.randn(2, 64), 64, "rotates groups of 256, found 64"),
        (torch.randn(2, 64).double(), 0, r"reads bf16, fp16 and fp32, found torch\.float64"),
    ]:
        call = op.QuantizePerTokenCall(x.to(device), None, group)
        with (
            use_implementation("triton_impl"),
            pytest.raises(RuntimeError, match=f"'triton_impl' was asked for, but it {reason}"),
        ):
            op.OP.run(call)
        actual = quantize_per_token(call.x, None, group)
        assert_same_codes(actual, by("reference", quantize_per_token, call.x, None, group))


def test_chunks_of_tokens_give_the_same(device, monkeypatch):
    x = torch.randn(50, 64, device=device)
    whole = by("reference", quantize_per_token, x)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 64 * 7)
    assert_same_codes(by("reference", quantize_per_token, x), whole)


@pytest.mark.parametrize("options", ["plain", "smooth", "rotated"])
def test_the_fake_agrees_with_the_op(options, device):
    with torch.inference_mode(False):
        x = torch.randn(8, 512, device=device)[::2]
        smooth = factors(512, device) if options == "smooth" else None
        arguments = (x, smooth, 256 if options == "rotated" else 0)
        torch.library.opcheck(torch.ops.lowbit.quantize_per_token.default, arguments)
