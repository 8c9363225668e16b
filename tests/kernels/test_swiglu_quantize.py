import pytest
import torch
from lowbit.kernels import swiglu_quantize as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.swiglu_quantize import reference, swiglu_quantize
from lowbit.tests.kernels.comparing import (
    INTERPRETER_WARNING,
    assert_codes_of,
    assert_grids_fit,
    assert_nearly_the_same_codes,
    assert_same_codes,
    by,
)

pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING)

REPLACEMENTS = op.OP.implementations[:-1]  # of the reference
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = pytest.mark.gpu
WIDTHS = [1, 64, 255, 528, 768, 4608, pytest.param(12288, marks=gpu), pytest.param(16384, marks=gpu)]
ROTATED_WIDTHS = [256, 768, 4608, pytest.param(12288, marks=gpu), pytest.param(16384, marks=gpu)]


def operands(shape, dtype, device, seed=0):
    """gate and up [..., K]: quiet and loud tokens, gates far out on both sides of the sigmoid, a loud channel."""
    generator = torch.Generator().manual_seed(seed)
    K = shape[-1]
    size = 10.0 ** torch.linspace(-2, 1.5, shape[-2]).unsqueeze(1)
    gate = torch.randn(shape, generator=generator) * size
    up = torch.randn(shape, generator=generator)
    up[..., K // 3] *= 20
    return gate.to(device, dtype), up.to(device, dtype)


def factors(K, device):
    return (torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5).to(device)


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("rotation_group", [0, 16, 256])
def test_the_reference_quantizes_the_gated_values(rotation_group, smoothed, device, poison_empty):
    """In float32, where rounding before a rotation is nothing."""
    gate, up = operands((7, 768), torch.float32, device)
    smooth = factors(768, device) if smoothed else None
    codes = by("reference", swiglu_quantize, gate, up, smooth, rotation_group)
    assert_codes_of(codes, reference.swiglu(gate, up), smooth, rotation_group)


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
    gate, up = operands((4 if device.type == "cpu" else 300, K), dtype, device)
    smooth = factors(K, device) if smoothed else None
    actual = by(implementation, swiglu_quantize, gate, up, smooth, rotation_group)
    expected = by("reference", swiglu_quantize, gate, up, smooth, rotation_group)
    # exp(-gate) is 2 to the power of a rounded product: far from 0 it is off by more than an eps.
    assert_nearly_the_same_codes(actual, expected, rotated=dtype if rotation_group else None, eps=32)


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_kept_values_are_the_definitions(implementation, dtype, K, device, poison_empty):
    """Neither smoothed nor rotated, and the codes are those of the call that does not keep them."""
    gate, up = operands((4 if device.type == "cpu" else 300, K), dtype, device)
    for smooth, rotation_group in ((None, 0), (factors(K, device), 0 if K % 256 else 256)):
        *codes, values = by(implementation, swiglu_quantize, gate, up, smooth, rotation_group, keep_values=True)
        assert_same_codes(codes, by(implementation, swiglu_quantize, gate, up, smooth, rotation_group))
        assert_values(values, gate, up)


def assert_values(values, gate, up):
    """silu(gate) * up in gate's dtype, each within two of its eps of the float32 definition, and what exp(-gate) loses:
    it is 2 to the power of a product, whose rounding counts as many eps as the exponent is large."""
    info = torch.finfo(gate.dtype)
    assert values.dtype == gate.dtype
    expected = reference.swiglu(gate, up)
    eps = 2 * info.eps + (4 + gate.float().abs()) * torch.finfo(torch.float32).eps
    off = (values.float() - expected).abs()
    assert (off <= eps * expected.abs() + info.tiny * info.eps).all(), f"off by {float(off.max())}"


@pytest.mark.parametrize("K", [255, 768])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_kept_values_of_one_token(implementation, K, device, poison_empty):
    gate, up = operands((1, K), torch.bfloat16, device)
    *codes, values = by(implementation, swiglu_quantize, gate, up, keep_values=True)
    assert_same_codes(codes, by(implementation, swiglu_quantize, gate, up))
    assert_values(values, gate, up)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_float16_is_limited_and_bfloat16_is_not(implementation, device, poison_empty):
    """As in the host, which clamps float16 models alone: beyond 65504 is 65504, and a NaN is 0."""
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([60000.0, 60000.0, inf, inf, -inf, nan, 2.0, 1.0], device=device).expand(2, 8).clone()
    up = torch.tensor([60000.0, -60000.0, 1.0, 0.0, 1.0, 1.0, nan, 100.0], device=device).expand(2, 8).clone()
    silu_of_1_times_100 = 73.1058578
    limited = torch.tensor([65504.0, -65504.0, 65504.0, 0.0, 0.0, 0.0, 0.0, silu_of_1_times_100], device=device)
    xq, x_scale, values = by(implementation, swiglu_quantize, gate.half(), up.half(), keep_values=True)
    expected = torch.tensor([[65504.0 / 127]] * 2, device=device)
    torch.testing.assert_close(x_scale, expected, rtol=1e-6, atol=0)
    assert torch.equal(xq.float(), (limited / x_scale).round())
    torch.testing.assert_close(values, limited.half().expand(2, 8), rtol=torch.finfo(torch.float16).eps, atol=0)

    gate, up = gate[:, :2].bfloat16(), up[:, :2].bfloat16()
    xq, x_scale, values = by(implementation, swiglu_quantize, gate, up, keep_values=True)
    torch.testing.assert_close(x_scale, gate[:, :1].float() ** 2 / 127, rtol=1e-6, atol=0)
    torch.testing.assert_close(values, gate * up, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert xq.tolist() == [[127, -127]] * 2


@pytest.mark.parametrize("where", ["gate", "up"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rotation_group", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_that_is_not_finite_spoils_only_itself(
    implementation, rotation_group, value, where, device, poison_empty
):
    gate, up = operands((4, 768), torch.bfloat16, device)
    alone = by(implementation, swiglu_quantize, gate, up, None, rotation_group)
    (gate if where == "gate" else up)[1, 400] = value
    xq, x_scale = by(implementation, swiglu_quantize, gate, up, None, rotation_group)
    assert not x_scale[1].isfinite() and not xq[1].any()
    for row in (0, 2, 3):
        assert torch.equal(xq[row], alone[0][row]) and torch.equal(x_scale[row], alone[1][row])


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_token_of_zeros(implementation, device, poison_empty):
    gate, up = operands((3, 528), torch.bfloat16, device)
    gate[0], up[1] = 0, 0
    gate[2] = -1000  # whose exponential float32 does not hold
    xq, x_scale = by(implementation, swiglu_quantize, gate, up)
    assert not xq.any() and torch.equal(x_scale, torch.full_like(x_scale, 1e-30))


@pytest.mark.parametrize("keep_values", [False, True], ids=["codes", "values"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_operands_of_any_stride(implementation, keep_values, device):
    """The two halves of one wide product among them."""
    gate, up = operands((2, 6, 300), torch.bfloat16, device)
    smooth = factors(300, device)
    expected = by(implementation, swiglu_quantize, gate, up, smooth, keep_values=keep_values)
    assert len(expected) == 2 + keep_values
    halves = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (gate, up)]
    odd = torch.cat((gate[..., :1], gate), dim=-1)[..., 1:]
    cases = {
        "halves": (*halves, smooth),
        "features apart": (*turned, smooth),
        "differing": (odd, turned[1], smooth),
        "smooth": (gate, up, torch.stack((smooth, -smooth), 1)[:, 0]),
    }
    for name, arguments in cases.items():
        actual = by(implementation, swiglu_quantize, *arguments, keep_values=keep_values)
        assert all(map(torch.equal, actual, expected)), name


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_no_tokens(implementation, shape, device):
    empty = torch.zeros(shape, device=device)
    xq, x_scale, values = by(implementation, swiglu_quantize, empty, empty, None, 256, keep_values=True)
    assert tuple(xq.shape) == tuple(values.shape) == shape and tuple(x_scale.shape) == (*shape[:-1], 1)
    assert len(by(implementation, swiglu_quantize, empty, empty, None, 256)) == 2


@pytest.mark.triton
def test_grids_fit_any_number_of_tokens(monkeypatch):
    gate = torch.empty(100_000, 12288, dtype=torch.bfloat16, device="meta")
    assert_grids_fit(monkeypatch, op, op.SwigluQuantizeCall(gate, gate, None, 256, keep_values=True))


@pytest.mark.gpu
def test_more_than_2_to_31_values(device):
    gate = torch.randn(262_150, 8448, device=device, dtype=torch.bfloat16)
    xq, x_scale, values = by("triton_impl", swiglu_quantize, gate, gate, keep_values=True)
    tail = by("reference", swiglu_quantize, gate[-50:], gate[-50:])
    assert_nearly_the_same_codes((xq[-50:], x_scale[-50:]), tail)
    assert_values(values[-50:], gate[-50:], gate[-50:])


# The host's own operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_definition_is_torchs_silu_times_the_other(dtype, device):
    """silu and the product each round once more."""
    gate, up = operands((9, 4608), dtype, device)
    theirs = torch.nn.functional.silu(gate) * up
    info = torch.finfo(dtype)
    torch.testing.assert_close(theirs.float(), reference.swiglu(gate, up), rtol=2 * info.eps, atol=info.tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_definition_is_what_the_hosts_ffn_hands_to_its_last_linear(dtype, comfy_host, device):
    """With its limits in float16, which the last values pass."""
    ffn = comfy_host.module("comfy.ldm.lumina.model").FeedForward(
        dim=64,
        hidden_dim=96,
        multiple_of=1,
        ffn_dim_multiplier=None,
        operation_settings={
            "operations": comfy_host.module("comfy.ops").disable_weight_init,
            "dtype": dtype,
            "device": device,
        },
    )
    gate, up = operands((9, 96), dtype, device)
    gate[:, -3:] = torch.tensor([300.0, 300.0, float("nan")])
    up[:, -3:] = torch.tensor([300.0, -300.0, 1.0])
    theirs = ffn._forward_silu_gating(gate, up)
    info = torch.finfo(dtype)
    torch.testing.assert_close(
        theirs.float(), reference.swiglu(gate, up), rtol=2 * info.eps, atol=info.tiny, equal_nan=True
    )


def test_what_does_not_fit_is_refused():
    gate, up = operands((4, 32), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"gate \(4, 32\) torch\.float32 and up \(4, 31\) torch\.float32 differ"):
        swiglu_quantize(gate, up[:, :31])
    with pytest.raises(ValueError, match=r"gate \(4, 32\) torch\.float32 and up \(4, 32\) torch\.bfloat16 differ"):
        swiglu_quantize(gate, up.bfloat16())
    with pytest.raises(ValueError, match=r"swiglu_quantize needs floating-point activations, got torch\.int8"):
        swiglu_quantize(gate.to(torch.int8), up.to(torch.int8))
    with pytest.raises(ValueError, match=r"smooth must be float32 of shape \(32,\), got torch\.float32 \(4, 32\)"):
        swiglu_quantize(gate, up, torch.ones(4, 32))
    with pytest.raises(ValueError, match="rotation group 256 does not divide K=32"):
        swiglu_quantize(gate, up, None, 256)


@pytest.mark.triton
def test_what_triton_refuses_is_computed_by_the_reference(device):
    gate, up = operands((2, 17408), torch.bfloat16, device)
    with (
        use_implementation("triton_impl"),
        pytest.raises(RuntimeError, match="holds K up to 16384 in registers, found K=17408"),
    ):
        swiglu_quantize(gate, up)
    actual = swiglu_quantize(gate, up)
    assert_nearly_the_same_codes(actual, by("reference", swiglu_quantize, gate, up))


@pytest.mark.parametrize("options", ["plain", "smooth", "rotated", "kept"])
def test_the_fake_agrees_with_the_op(options, device):
    with torch.inference_mode(False):
        gate, up = operands((4, 512), torch.bfloat16, device)
        smooth = factors(512, device) if options == "smooth" else None
        arguments = (gate[::2], up[::2], smooth, 256 if options == "rotated" else 0, options == "kept")
        torch.library.opcheck(torch.ops.lowbit.swiglu_quantize.default, arguments)
