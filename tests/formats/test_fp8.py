import pytest
import torch
from lowbit.formats import Fp8Weight, chunks

FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def every_code(dtype):
    """[2, 256]: every bit pattern, twice."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).expand(2, 256).contiguous()


def decoded(code, exponent_bits):
    """A bit pattern's value by the definition of the format; None for NaN and infinity."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    last = (1 << exponent_bits) - 1
    if exponent == last and (exponent_bits == 5 or mantissa == 7):  # e4m3fn has no infinity and a single NaN
        return None
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("scale_shape", [(), (1,), (2,), (2, 1)], ids=["scalar", "one", "vector", "column"])
@pytest.mark.parametrize("name, exponent_bits", [("fp8_e4m3", 4), ("fp8_e5m2", 5)])
def test_dequantize_of_every_code(monkeypatch, poison_empty, name, exponent_bits, scale_shape):
    scale = torch.tensor([0.37, 1.7])[: max(1, len(scale_shape) and scale_shape[0])].reshape(scale_shape)
    weight = Fp8Weight(every_code(FORMATS[name]), (2, 256), scale)
    assert weight.format_name == name
    assert weight.size_bytes == 512 + 4 * scale.numel()
    codes = [decoded(code, exponent_bits) for code in range(256)]
    finite = torch.tensor([code is not None for code in codes])
    exact = torch.tensor([code or 0.0 for code in codes], dtype=torch.float64)
    expected = (exact * scale.double().reshape(-1, 1)).float().expand(2, 256)
    assert torch.equal(weight.dequantize()[:, finite], expected[:, finite])
    assert not weight.dequantize()[:, ~finite].isfinite().any()
    assert torch.equal(weight.dequantize(torch.bfloat16)[:, finite], expected[:, finite].to(torch.bfloat16))
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 256)
    assert torch.equal(weight.dequantize()[:, finite], expected[:, finite])


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"data": torch.zeros((4, 64), dtype=torch.int8)},
            r"float8_e4m3fn or float8_e5m2 \[N, K\], found int8 \[4, 64\]",
        ),
        ({"shape": (64, 4)}, r"an FP8 weight of shape \[64, 4\] .* found float8_e4m3fn \[4, 64\]"),
        ({"scale": torch.ones(5)}, r"float32 \[\], \[1\], \[4\] or \[4, 1\] \(N=4\), found float32 \[5\]"),
        ({"scale": torch.ones(()).bfloat16()}, r"found bfloat16 \[\]"),
    ],
)
def test_refused_weights(changes, text):
    fields = {"data": torch.zeros((4, 64)).to(torch.float8_e4m3fn), "shape": (4, 64), "scale": torch.ones(())}
    Fp8Weight(**fields)
    with pytest.raises(ValueError, match=text):
        Fp8Weight(**{**fields, **changes})


def test_refused_dtype():
    weight = Fp8Weight(torch.zeros((4, 64)).to(torch.float8_e5m2), (4, 64), torch.ones(()))
    with pytest.raises(ValueError, match="weights dequantize to a floating dtype, found int64"):
        weight.dequantize(torch.int64)
