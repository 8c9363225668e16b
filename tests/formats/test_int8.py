import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as host
from comfy_kitchen.tensor import int8_utils
from lowbit.formats import Int8Weight, chunks, int8

SHAPES = [(1, 64), (17, 331), (64, 4608)]
SHAPE_IDS = ["one_channel", "ragged", "model_K"]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def defined_codes(w, scale):
    """The definition in float64: the quotient rounded once to float32, then halves to even, then clamped."""
    quotient = (w.double().numpy() / scale.double().numpy()).astype(np.float32)
    return torch.from_numpy(np.clip(np.rint(quotient), -127, 127).astype(np.int8))


def defined_scale(absmax):
    return (absmax.double() / 127).float().clamp(min=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, K", SHAPES, ids=SHAPE_IDS)
def test_quantize_weight_per_channel_is_exact(N, K, dtype, poison_empty):
    w = gaussian(N, K, dtype=dtype)
    weight = int8.quantize_weight(w)
    assert weight.shape == (N, K) and weight.scale.shape == (N, 1) and weight.per_channel
    assert weight.format_name == "int8"
    assert torch.equal(weight.scale, defined_scale(w.float().abs().amax(dim=1, keepdim=True)))
    assert torch.equal(weight.data, defined_codes(w.float(), weight.scale))
    assert weight.data.abs().amax(dim=1).eq(127).all()


@pytest.mark.parametrize("N, K", SHAPES, ids=SHAPE_IDS)
def test_quantize_weight_per_tensor_is_exact(N, K, poison_empty):
    w = gaussian(N, K)
    weight = int8.quantize_weight(w, per_channel=False)
    assert weight.scale.shape == () and not weight.per_channel
    assert torch.equal(weight.scale, defined_scale(w.abs().amax()))
    assert torch.equal(weight.data, defined_codes(w, weight.scale))


def test_quantize_weight_agrees_with_the_host():
    w = gaussian(33, 512)
    weight = int8.quantize_weight(w)
    codes, scale = host.quantize_int8_rowwise(w)
    assert torch.equal(weight.scale, scale) and torch.equal(weight.data, codes)
    assert torch.equal(weight.dequantize(), host.dequantize_int8_simple(codes, scale))
    rotated = int8.quantize_weight(w, rotation_group=256)
    codes, scale = host.quantize_int8_convrot_weight(w, 256)
    # The order of a matmul's sum is not defined: a code beside a half may fall to the other side.
    assert (rotated.data.int() - codes.int()).abs().max() <= 1
    assert rotated.data.ne(codes).float().mean() < 1e-3
    torch.testing.assert_close(rotated.scale, scale, rtol=1e-6, atol=0)


def test_halves_go_to_even():
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49999997]])
    weight = int8.quantize_weight(w)
    assert weight.scale.item() == 1.0
    assert weight.data.tolist() == [[127, 0, 2, 2, 0, -2, -126, 0]]


@pytest.mark.parametrize("per_channel", [True, False])
def test_chunks_do_not_change_the_weight(monkeypatch, per_channel):
    w, smooth = gaussian(9, 1024), gaussian(1024, seed=1).abs() + 0.5
    options = {"per_channel": per_channel, "smooth": smooth}
    whole = int8.quantize_weight(w, **options)
    values = whole.dequantize()
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 2048)
    parts = int8.quantize_weight(w, **options)
    assert torch.equal(parts.data, whole.data) and torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.dequantize(), values)


def test_zero_rows_and_the_smallest_scale():
    w = gaussian(3, 64)
    w[1] = 0
    w[2] = 1e-32  # its exact scale would lie under the smallest one
    weight = int8.quantize_weight(w)
    assert weight.scale[1].item() == weight.scale[2].item() == np.float32(1e-30)
    assert not weight.data[1:].any() and not weight.dequantize()[1:].any()
    zero = int8.quantize_weight(torch.zeros((2, 64)), per_channel=False)
    assert zero.scale.item() == np.float32(1e-30) and not zero.data.any()


def test_strided_and_extreme_weights():
    w = gaussian(64, 40).T
    assert torch.equal(int8.quantize_weight(w).data, int8.quantize_weight(w.contiguous()).data)
    weight = int8.quantize_weight(torch.tensor([[1e38, -1e38, 2.5e37], [1e-27, -1e-27, 2.5e-28]]))
    assert weight.data.tolist() == [[127, -127, 32]] * 2
    assert weight.dequantize().isfinite().all()


@pytest.mark.parametrize("scale_shape", [(), (1,), (5, 1)], ids=["scalar", "one", "per_channel"])
def test_dequantize_is_exact(scale_shape, poison_empty):
    data = torch.randint(-127, 128, (5, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = gaussian(*scale_shape).abs()
    exact = (data.double() * scale.double()).float()
    weight = Int8Weight(data, (5, 96), scale)
    assert torch.equal(weight.dequantize(), exact)
    assert torch.equal(weight.dequantize(torch.bfloat16), exact.to(torch.bfloat16))
    assert weight.size_bytes == 5 * 96 + 4 * scale.numel()


def test_round_trip_of_codes():
    """Codes of a weight that is already quantized come back: its scale is found again within one rounding."""
    weight = int8.quantize_weight(gaussian(16, 512))
    again = int8.quantize_weight(weight.dequantize())
    assert torch.equal(again.data, weight.data)


def test_smooth_is_divided_out_and_multiplied_back():
    w, smooth = gaussian(8, 128), torch.linspace(0.1, 4.0, 128)
    weight = int8.quantize_weight(w, smooth=smooth)
    assert weight.format_name == "int8_smooth"
    divided = torch.from_numpy((w.double() / smooth.double()).numpy().astype(np.float32))
    assert torch.equal(weight.data, defined_codes(divided, weight.scale))
    expected = (weight.data.double() * weight.scale.double()).float() * smooth
    assert torch.equal(weight.dequantize(), expected)
    # Half a step of the smoothed weight, brought back; the rest is float32 rounding.
    assert ((weight.dequantize() - w).abs() <= 0.5001 * weight.scale * smooth).all()


def product(x, weight):
    """What `Int8Weight` says the product is, with exact activations."""
    x = x * weight.smooth.double() if weight.smooth is not None else x
    x = int8.rotate(x, weight.rotation_group) if weight.rotation_group else x
    return (x @ weight.data.double().T) * weight.scale.double().reshape(1, -1)


@pytest.mark.parametrize("per_channel", [True, False], ids=["per_channel", "per_tensor"])
@pytest.mark.parametrize("rotation_group", [0, 256])
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
def test_the_logical_weight_is_that_of_the_product(smoothed, rotation_group, per_channel):
    smooth = torch.linspace(0.1, 4.0, 512) if smoothed else None
    weight = int8.quantize_weight(gaussian(24, 512), per_channel, smooth, rotation_group)
    x = gaussian(5, 512, seed=2).double()
    expected = product(x, weight)
    got = x @ weight.dequantize().double().T
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()  # float32 weights, float64 products
    suffixes = ("_smooth" if smoothed else "") + ("_convrot" if rotation_group else "")
    assert weight.format_name == f"int8{suffixes}"


@pytest.mark.parametrize("rotation_group", [0, 16, 256])
def test_quantized_weight_sqnr(rotation_group):
    """Measured 41.1 dB with and without rotation on Gaussian rows of 4608."""
    w = gaussian(32, 4608)
    noise = int8.quantize_weight(w, rotation_group=rotation_group).dequantize() - w
    assert 10 * torch.log10(w.square().sum() / noise.square().sum()) > 41.0


def test_rotation_spreads_outliers():
    w = gaussian(32, 1024)
    w[:, ::256] *= 40

    def error(rotation_group):
        return (int8.quantize_weight(w, rotation_group=rotation_group).dequantize() - w).square().mean()

    assert error(256) < error(0) / 10


@pytest.mark.parametrize("group_size", [4, 16, 64, 256])
def test_hadamard_is_the_hosts(group_size):
    matrix = int8.hadamard(group_size)
    assert torch.equal(matrix, int8_utils._build_hadamard(group_size))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.double() @ matrix.double(), torch.eye(group_size, dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(int8.hadamard(group_size, "cpu", dtype).float(), matrix)
    assert int8.hadamard(group_size) is matrix


def test_hadamard_cache_survives_tracing_and_inference_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    int8._hadamard_cache.clear()
    with FakeTensorMode():
        int8.hadamard(64)
    with torch.inference_mode():
        matrix = int8.hadamard(64)
    assert type(matrix) is torch.Tensor and not matrix.is_inference()
    assert int8.hadamard(64) is matrix


@pytest.mark.parametrize("group_size, K", [(4, 12), (64, 192), (256, 768)])
def test_rotate_is_the_hosts_for_weights_and_activations(group_size, K):
    matrix = int8_utils._build_hadamard(group_size)
    # Small whole numbers: every sum is exact in float32, so the conventions must agree bit for bit.
    whole = torch.randint(-127, 128, (6, K), generator=torch.Generator().manual_seed(0)).float()
    rotated = int8.rotate(whole, group_size)
    assert torch.equal(rotated, int8_utils._rotate_weight(whole, matrix, group_size))
    assert torch.equal(rotated, int8_utils._rotate_activation(whole, matrix, group_size))
    assert torch.equal(int8.rotate(rotated, group_size), whole)
    x = gaussian(2, 3, K)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        int8.rotate(x, group_size), int8_utils._rotate_activation(x, matrix, group_size), rtol=0, atol=16 * eps
    )
    assert torch.equal(int8.rotate(whole.T.contiguous().T, group_size), rotated)
    assert int8.rotate(x.bfloat16(), group_size).dtype == torch.bfloat16


def test_host_unrotates_our_weight():
    weight = int8.quantize_weight(gaussian(16, 512), rotation_group=256)
    expected = host.dequantize_int8_convrot_weight(weight.data, weight.scale, 256)
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"data": torch.zeros((4, 64), dtype=torch.uint8)}, r"shape \[4, 64\] is int8 \[N, K\], found uint8 \[4, 64\]"),
        ({"shape": (4, 65)}, r"shape \[4, 65\] is int8 \[N, K\], found int8 \[4, 64\]"),
        ({"data": torch.zeros(64, dtype=torch.int8), "shape": (64,)}, r"is int8 \[N, K\], found int8 \[64\]"),
        ({"scale": torch.ones(4)}, r"float32 \[\], \[1\] or \[4, 1\] \(N=4\), found float32 \[4\]"),
        ({"scale": torch.ones((4, 2))}, r"found float32 \[4, 2\]"),
        ({"scale": torch.ones((4, 1), dtype=torch.float16)}, r"found float16 \[4, 1\]"),
        ({"smooth": torch.ones(63)}, r"smooth factors .* float32 \[64\] \(K=64\), found float32 \[63\]"),
        ({"smooth": torch.ones(64).bfloat16()}, r"found bfloat16 \[64\]"),
        ({"rotation_group": 256}, "K=64 is not a multiple of the rotation group of 256 features"),
        ({"rotation_group": 32}, "a rotation group has 4, 16, 64, 256, ... features, found 32"),
    ],
)
def test_refused_weights(changes, text):
    fields = {"data": torch.zeros((4, 64), dtype=torch.int8), "shape": (4, 64), "scale": torch.ones(())}
    Int8Weight(**fields)
    with pytest.raises(ValueError, match=text):
        Int8Weight(**{**fields, **changes})


@pytest.mark.parametrize(
    "w, options, text",
    [
        (torch.zeros((4, 64), dtype=torch.int8), {}, r"floating point \[N, K\] and not empty, found int8 \[4, 64\]"),
        (torch.zeros(64), {}, r"found float32 \[64\]"),
        (torch.zeros((0, 64)), {}, r"found float32 \[0, 64\]"),
        (torch.full((4, 64), torch.nan), {}, "must be finite"),
        (torch.full((4, 64), torch.inf), {"per_channel": False}, "must be finite"),
        (torch.ones((4, 64)), {"smooth": torch.zeros(64)}, "must be finite"),
        (torch.ones((4, 64)), {"smooth": torch.ones(32)}, r"float32 \[64\] \(K=64\), found float32 \[32\]"),
        (torch.ones((4, 64)), {"rotation_group": 256}, "K=64 is not a multiple of the rotation group of 256"),
    ],
)
def test_refused_values(w, options, text):
    with pytest.raises(ValueError, match=text):
        int8.quantize_weight(w, **options)


def test_refused_rotations_and_dtypes():
    for group_size in (0, 1, 2, 8, 100, 128, -4):
        with pytest.raises(ValueError, match=f"found {group_size}"):
            int8.hadamard(group_size)
    with pytest.raises(ValueError, match="K=300 is not a multiple of the rotation group of 256 features"):
        int8.rotate(torch.zeros((2, 300)), 256)
    with pytest.raises(ValueError, match="weights dequantize to a floating dtype, found int8"):
        int8.quantize_weight(gaussian(2, 4)).dequantize(torch.int8)


def test_rotation_without_values_and_under_autocast():
    assert int8.rotate(torch.empty(3, 512, device="meta"), 256).shape == (3, 512)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = int8.rotate(x, 256)
    assert rotated.dtype == torch.float32 and torch.equal(rotated, int8.rotate(x, 256))
