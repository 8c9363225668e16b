import importlib
import mmap
import warnings

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.formats import UnknownQuantizationError, chunks, ggml
from lowbit.formats.ggml import q4_k

PLAIN = ["F32", "F16", "BF16"]
BLOCKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
SAME_BYTES_AS_C = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SEARCHED = ["Q4_K", "Q5_K", "Q6_K"]  # scales of least squared error, not the bytes of C
# Rows of the golden source by what makes them hard. Rows of 1e-7 are tested apart: their scale underflows float16.
ROW_CLASSES = {
    "gaussian": slice(0, 16),
    "heavy_tailed": slice(16, 32),
    "outlier_columns": slice(32, 40),
    "constant_41": slice(41, 42),
    "constant_42": slice(42, 43),
    "ramp": slice(43, 44),
    "absolute_ramp": slice(44, 45),
    "large": slice(46, 47),
    "lone_spike": slice(47, 48),
    "rest": slice(48, 96),
}


def random_bytes(ggml_type, rows, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, ggml.row_size_bytes(ggml_type, K))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def reference(blocks, ggml_type):
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks.contiguous().numpy(), gguf.GGMLQuantizationType[ggml_type])
    return torch.from_numpy(np.array(values))


def assert_same_bits(got, expected):
    """Equal bit for bit, zeros' signs included; a NaN equals any NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    assert torch.equal(
        got.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(bits),
        expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(bits),
    )


def sqnr_db(reference, values):
    noise = (reference.double() - values.double()).square().sum()
    return (10 * torch.log10(reference.double().square().sum() / noise)).item()


def test_types_agree_with_gguf_py():
    assert list(ggml.TYPES) == PLAIN + BLOCKED
    for name, ggml_type in ggml.TYPES.items():
        assert ggml_type.name == name
        assert ggml_type.type_id == gguf.GGMLQuantizationType[name]
        assert (ggml_type.block_size, ggml_type.type_size) == gguf.GGML_QUANT_SIZES[ggml_type.type_id]
        assert ggml.type_from_id(ggml_type.type_id) is ggml_type
        assert ggml.type_from_name(name) is ggml_type
        assert ggml.ggml_type_of_format(ggml.format_name(name)) == name
    others = {int(known): known.name for known in gguf.GGMLQuantizationType if known.name not in ggml.TYPES}
    assert others.items() <= ggml.UNSUPPORTED_NAMES.items()
    assert not ggml.UNSUPPORTED_NAMES.keys() & ggml.TYPES_BY_ID.keys()


def test_plain_types_name_their_dtype():
    dtypes = {name: ggml_type.plain_dtype for name, ggml_type in ggml.TYPES.items() if ggml_type.plain_dtype}
    assert dtypes == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("name", BLOCKED)
def test_dequantize_reads_what_c_reads(golden, name, poison_empty):
    got = ggml.dequantize(torch.from_numpy(golden[f"{name}_bytes"]), name)
    assert_same_bits(got, torch.from_numpy(golden[f"{name}_values"]))


@pytest.mark.parametrize("name", PLAIN + BLOCKED)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), units=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_dequantize_of_any_bytes(name, rows, units, seed):
    blocks = random_bytes(name, rows, units * ggml.TYPES[name].block_size, seed)
    assert_same_bits(ggml.dequantize(blocks, name), reference(blocks, name))


@pytest.mark.parametrize("name", PLAIN + BLOCKED)
@pytest.mark.parametrize("chunk_elements", [1, 512, 1000], ids=["unit", "two_units", "ragged"])
def test_dequantize_in_chunks(monkeypatch, poison_empty, name, chunk_elements):
    blocks = random_bytes(name, 7, 768)
    expected = reference(blocks, name)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: chunk_elements)
    assert_same_bits(ggml.dequantize(blocks, name), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_dequantize_bounds_its_chunks(monkeypatch, name):
    sizes = []
    ggml_type = ggml.TYPES[name]

    def recording(blocks):
        sizes.append(blocks.shape[0] * ggml_type.block_size)
        return ggml_type.dequantize_blocks(blocks)

    K = chunks.chunk_elements(torch.device("cpu")) + ggml_type.block_size
    blocks = torch.zeros((2, ggml.row_size_bytes(name, K)), dtype=torch.uint8)
    ggml.dequantize(blocks, ggml.GgmlType(name, 0, ggml_type.block_size, ggml_type.type_size, recording), torch.float16)
    assert sum(sizes) == 2 * K and max(sizes) <= chunks.chunk_elements(torch.device("cpu"))


@pytest.mark.parametrize("name", PLAIN + BLOCKED)
def test_dequantize_of_strided_bytes(name):
    blocks = random_bytes(name, 6, 512)
    expected = reference(blocks, name)
    wide = torch.zeros((6, blocks.shape[1] + 3), dtype=torch.uint8)
    wide[:, 1:-2] = blocks
    assert_same_bits(ggml.dequantize(wide[:, 1:-2], name), expected)
    assert_same_bits(ggml.dequantize(blocks.T.contiguous().T, name), expected)
    assert_same_bits(ggml.dequantize(blocks[::2], name), expected[::2])


@pytest.mark.parametrize("name", PLAIN + BLOCKED)
@pytest.mark.parametrize("rows, units", [(1, 1), (3, 2)], ids=["one_block", "rows"])
def test_dequantize_of_a_read_only_map_at_an_odd_address(tmp_path, name, rows, units):
    blocks = random_bytes(name, rows, units * ggml.TYPES[name].block_size)
    path = tmp_path / "blocks"
    path.write_bytes(b"\xff" + blocks.numpy().tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(mapped, dtype=torch.uint8, offset=1).view(blocks.shape)
    assert data.data_ptr() % 2 == 1
    assert_same_bits(ggml.dequantize(data, name), reference(blocks, name))
    assert_same_bits(ggml.dequantize(data[-1], name), reference(blocks[-1], name))


@pytest.mark.parametrize("name", PLAIN + BLOCKED)
def test_dequantize_at_an_odd_offset_of_a_storage(name):
    """A single block is contiguous as it lies: the case where a view of its scale would be refused."""
    blocks = random_bytes(name, 1, ggml.TYPES[name].block_size)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:].view(blocks.shape)
    assert shifted.storage_offset() == 1
    assert_same_bits(ggml.dequantize(shifted, name), reference(blocks, name))


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_leading_dimensions(name):
    blocks = random_bytes(name, 6, 256)
    expected = reference(blocks, name)
    assert_same_bits(ggml.dequantize(blocks[0], name), expected[0])
    assert_same_bits(ggml.dequantize(blocks.view(2, 3, -1), name), expected.view(2, 3, -1))
    assert_same_bits(
        ggml.dequantize(blocks.view(2, 3, -1).transpose(0, 1), name), expected.view(2, 3, -1).transpose(0, 1)
    )
    assert ggml.dequantize(blocks[:0], name).shape == (0, 256)
    values = torch.randn((2, 3, 256), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ggml.quantize(values, name).view(6, -1), ggml.quantize(values.view(6, -1), name))
    assert ggml.quantize(values[:0], name).shape == (0, 3, ggml.row_size_bytes(name, 256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN + BLOCKED)
def test_dequantize_rounds_once(name, dtype):
    blocks = random_bytes(name, 4, 512)
    assert_same_bits(ggml.dequantize(blocks, name, dtype), reference(blocks, name).to(dtype))


@pytest.mark.parametrize("name", SAME_BYTES_AS_C)
def test_quantize_writes_what_c_writes(golden, name, poison_empty):
    got = ggml.quantize(torch.from_numpy(golden["src"]), name)
    assert torch.equal(got, torch.from_numpy(golden[f"{name}_bytes"]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAME_BYTES_AS_C)
def test_quantize_writes_the_same_bytes_on_a_gpu(name):
    rows = torch.randn(500, 4096, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 500)[:, None]
    assert torch.equal(ggml.quantize(rows.cuda(), name).cpu(), ggml.quantize(rows, name))


def test_q8_0_rounds_halves_away_from_zero():
    values = torch.zeros((1, 32))
    values[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997])
    blocks = ggml.quantize(values, "Q8_0")
    assert blocks[0, 2:9].view(torch.int8).tolist() == [127, 1, 2, 3, -1, -3, 0]
    assert np.array_equal(blocks.numpy(), gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_types_round_trip(name):
    values = torch.randn((5, 7), generator=torch.Generator().manual_seed(0)).to(ggml.TYPES[name].plain_dtype)
    blocks = ggml.quantize(values, name)
    assert blocks.shape == (5, 7 * values.itemsize)
    assert_same_bits(ggml.dequantize(blocks, name), values.float())


@pytest.mark.parametrize("rows", ROW_CLASSES.values(), ids=ROW_CLASSES)
@pytest.mark.parametrize("name", SEARCHED)
def test_search_is_no_worse_than_c(golden, name, rows):
    values = torch.from_numpy(golden["src"])[rows]
    got = sqnr_db(values, ggml.dequantize(ggml.quantize(values, name), name))
    floor = sqnr_db(values, torch.from_numpy(golden[f"{name}_values"])[rows])
    assert got >= floor - 1e-3, f"{got:.3f} dB, C reaches {floor:.3f} dB"


@pytest.mark.parametrize("rows, gains_db", [
    ("gaussian", (0.23, 0.44, 0.64)), ("heavy_tailed", (0.28, 0.37, 0.56)), ("outlier_columns", (0.31, 0.17, 0.1)),
    ("constant_41", (40.0, 36.0, None)), ("constant_42", (17.0, 17.0, None)), ("ramp", (0.12, 0.16, 0.02)),
    ("absolute_ramp", (0.45, 0.55, 0.7)), ("large", (0.26, 0.44, 0.67)), ("lone_spike", (0.42, 0.35, 0.17)),
    ("rest", (0.25, 0.51, 0.64)),
])  # fmt: skip
@pytest.mark.parametrize("name", SEARCHED)
def test_search_gains_over_c(golden, name, rows, gains_db):
    """A little under what was measured: a search that stopped working would fall back to C's level or below. None:
    both are exact."""
    gain_db = gains_db[SEARCHED.index(name)]
    values = torch.from_numpy(golden["src"])[ROW_CLASSES[rows]]
    got = ggml.dequantize(ggml.quantize(values, name), name)
    if gain_db is None:
        assert torch.equal(got, values)
    else:
        of_c = torch.from_numpy(golden[f"{name}_values"])[ROW_CLASSES[rows]]
        assert sqnr_db(values, got) > sqnr_db(values, of_c) + gain_db


@pytest.mark.parametrize("scale, floor_db", [(1e-2, 35.6), (1e-3, 35.4), (1e-4, 35.3), (1e-5, 34.3), (1e-6, 30.8)])
def test_q6_k_of_small_values(scale, floor_db):
    """Its d is a 4096th of the values, for which float16 has few bits, and soon none. C: 35.0, 33.8, 18.9, 0, 0 dB."""
    values = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * scale
    assert sqnr_db(values, ggml.dequantize(ggml.quantize(values, "Q6_K"), "Q6_K")) > floor_db


def test_q6_k_of_ramps():
    """Blocks of values that hardly differ, of which sc itself has to be chosen by the codes it gives. C: 45.7 dB."""
    generator = torch.Generator().manual_seed(1)
    spans, middles = torch.rand(50, 1, generator=generator), 0.3 * torch.randn(50, 1, generator=generator)
    values = torch.linspace(-1, 1, 2048) * spans + middles
    assert sqnr_db(values, ggml.dequantize(ggml.quantize(values, "Q6_K"), "Q6_K")) > 46.1


@pytest.mark.parametrize("sign", [1, -1])
def test_q6_k_uses_its_longer_side_for_either_sign(sign):
    """The value of largest magnitude gets -32, by a negative scale where it is positive."""
    values = torch.randint(-31, 32, (8, 256), generator=torch.Generator().manual_seed(0)).float()
    values[:, ::16] = 32.0 * sign
    assert torch.equal(ggml.dequantize(ggml.quantize(values, "Q6_K"), "Q6_K"), values)


@pytest.mark.parametrize("name, code_bytes", [("Q5_K", slice(16, 176)), ("Q6_K", slice(0, 192))])
def test_codes_of_any_bytes_are_packed_as_they_were(name, code_bytes):
    module = importlib.import_module(f"lowbit.formats.ggml.{name.lower()}")
    packed = random_bytes(name, 50, 256)[:, code_bytes]
    codes = module.unpack_codes(packed)
    assert codes.shape == (50, 256) and codes.max() == {"Q5_K": 31, "Q6_K": 63}[name] and codes.min() == 0
    assert torch.equal(module.pack_codes(codes), packed)


def test_six_bit_scales_of_any_bytes_are_packed_as_they_were():
    packed = random_bytes("Q4_K", 50, 256)[:, 4:16]
    sc, m = q4_k.unpack_scale_codes(packed)
    assert sc.shape == m.shape == (50, 8) and sc.max() == m.max() == 63
    assert torch.equal(q4_k.pack_scale_codes(sc, m), packed)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("with_importance", [False, True])
def test_search_has_the_same_bytes_on_any_number_of_threads(with_importance, name):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((101, 2304), generator=generator)  # 909 super-blocks: no thread's part is a round number
    importance = torch.rand(2304, generator=generator) if with_importance else None
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(ggml.quantize(values, name, importance))
    finally:
        torch.set_num_threads(threads)
    one_by_one = torch.stack([ggml.quantize(row, name, importance) for row in values])
    assert all(torch.equal(result, one_by_one) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("with_importance", [False, True])
def test_search_has_the_same_bytes_on_a_gpu(with_importance, name):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 4096, generator=generator) * torch.logspace(-3, 3, 500)[:, None]
    importance = torch.rand(4096, generator=generator) if with_importance else None
    assert torch.equal(ggml.quantize(rows.cuda(), name, importance).cpu(), ggml.quantize(rows, name, importance))


@pytest.mark.parametrize("name", SEARCHED)
def test_search_keeps_zeros_and_underflows_to_zeros(golden, name):
    values = torch.from_numpy(golden["src"])
    zero, tiny = values[40:41], values[45:46]
    assert not zero.any() and tiny.any()
    assert not ggml.dequantize(ggml.quantize(zero, name), name).any()
    assert not ggml.dequantize(ggml.quantize(tiny, name), name).any()


@pytest.mark.parametrize("name, largest_code", [("Q4_K", 15), ("Q5_K", 31)])
def test_search_of_one_sign(name, largest_code):
    """All positive needs no min; all negative rests on the min alone. Both stay within half a step of the block."""
    ramp = torch.linspace(1.0, 2.0, 256).view(1, 256)
    for values in (ramp, -ramp):
        error = (ggml.dequantize(ggml.quantize(values, name), name) - values).abs().max().item()
        assert error <= 2.0 / largest_code / 2 * 1.02  # 2 % for the 6-bit scale


@pytest.mark.parametrize("name", [*PLAIN, *SAME_BYTES_AS_C, *SEARCHED])
def test_quantize_of_strided_and_half_values(monkeypatch, name):
    values = torch.randn((6, 768), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = ggml.quantize(values.float(), name)
    wide = torch.zeros((6, 770), dtype=torch.bfloat16)
    wide[:, 1:-1] = values
    assert torch.equal(ggml.quantize(wide[:, 1:-1], name), expected)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 300)
    assert torch.equal(ggml.quantize(values.T.contiguous().T.requires_grad_(), name), expected)


@pytest.mark.parametrize("name", [*SAME_BYTES_AS_C, *SEARCHED])
def test_quantize_of_float32_subnormals_gives_zeros(name):
    """Their scale has no finite inverse."""
    values = torch.full((1, 256), 1e-42)
    values[0, ::2] = -1e-42
    assert values.any() and not ggml.dequantize(ggml.quantize(values, name), name).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*PLAIN, *SAME_BYTES_AS_C, *SEARCHED])
def test_quantize_refuses_values_that_are_not_finite(name, bad):
    values = torch.ones((2, 256))
    values[1, 3] = bad
    with pytest.raises(ValueError, match=f"values to quantize to {name} must be finite"):
        ggml.quantize(values, name)


@pytest.mark.parametrize("name", [*SAME_BYTES_AS_C, *SEARCHED])
def test_quantize_refuses_a_scale_beyond_float16(name):
    values = torch.linspace(-1e9, 1e9, 256).view(1, 256)
    with pytest.raises(ValueError, match=r"a scale of .* does not fit float16 \(largest value 65504\)"):
        ggml.quantize(values, name)


@pytest.mark.parametrize("largest", [2.69e8, 3e38])
@pytest.mark.parametrize("with_importance", [False, True])
def test_q6_k_holds_what_its_largest_scale_holds(largest, with_importance):
    """32 * 128 * 65504 is 2.68e8. Squares of much larger values are infinite: what they would give is no number."""
    values, importance = torch.linspace(-1, 1, 256).view(1, 256), 5 * torch.ones(256) if with_importance else None
    got = ggml.dequantize(ggml.quantize(2.6e8 * values, "Q6_K", importance), "Q6_K")
    assert sqnr_db(2.6e8 * values, got) > 39
    with pytest.raises(ValueError, match=r"a scale of .* does not fit float16 \(largest value 65504\)"):
        ggml.quantize(largest * values, "Q6_K", importance)


def test_quantize_refuses_a_plain_value_beyond_float16():
    with pytest.raises(ValueError, match=r"a value of 1e\+05 does not fit float16"):
        ggml.quantize(torch.full((1, 2), 1e5), "F16")


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_types_without_a_quantizer_say_so(name):
    assert not ggml.TYPES[name].can_quantize
    with pytest.raises(
        UnknownQuantizationError, match=f"{name} can be read but not written.*those that have: F32.*Q4_K, Q5_K, Q6_K"
    ):
        ggml.quantize(torch.zeros((1, 256)), name)


def test_unknown_types_are_named():
    with pytest.raises(
        UnknownQuantizationError, match=r"IQ2_XXS \(number 16\) is not supported; supported: F32, .*IQ4_XS"
    ):
        ggml.type_from_id(16)
    with pytest.raises(UnknownQuantizationError, match="GGML type number 999 is not a known type; supported: F32"):
        ggml.type_from_id(999)
    with pytest.raises(UnknownQuantizationError, match=r"MXFP4 \(number 39\) is not supported"):
        ggml.type_from_name("MXFP4")
    with pytest.raises(UnknownQuantizationError, match="'Q4_X' is not a known GGML type; supported: F32"):
        ggml.dequantize(torch.zeros((1, 144), dtype=torch.uint8), "Q4_X")
    with pytest.raises(UnknownQuantizationError, match="'int8' is not a GGUF format"):
        ggml.ggml_type_of_format("int8")


def test_row_sizes():
    assert ggml.row_size_bytes("Q4_K", 4608) == 4608 // 256 * 144
    assert ggml.row_size_bytes(ggml.TYPES["Q8_0"], 4608) == 4608 // 32 * 34
    assert ggml.logical_K("Q4_K", 288) == 512
    assert ggml.logical_K("BF16", 10) == 5
    with pytest.raises(ValueError, match="a Q4_K row has a multiple of 256 elements, found K=300"):
        ggml.row_size_bytes("Q4_K", 300)
    with pytest.raises(ValueError, match=r"a Q8_0 row has a multiple of 34 bytes \(32 elements each\), found 33 bytes"):
        ggml.logical_K("Q8_0", 33)


def test_refused_tensors():
    with pytest.raises(ValueError, match=r"GGML bytes are uint8 \[\.\.\., row bytes\], found int8 \[2, 34\]"):
        ggml.dequantize(torch.zeros((2, 34), dtype=torch.int8), "Q8_0")
    with pytest.raises(ValueError, match="weights dequantize to a floating dtype, found int32"):
        ggml.dequantize(torch.zeros((2, 34), dtype=torch.uint8), "Q8_0", torch.int32)
    with pytest.raises(ValueError, match=r"values to quantize are floating point \[\.\.\., K\], found int64 \[2, 32\]"):
        ggml.quantize(torch.zeros((2, 32), dtype=torch.int64), "Q8_0")
    with pytest.raises(ValueError, match="a Q8_0 row has a multiple of 32 elements, found K=31"):
        ggml.quantize(torch.zeros((2, 31)), "Q8_0")


def test_ggml_weight(golden):
    data = torch.from_numpy(golden["Q4_K_bytes"])
    weight = ggml.GgmlWeight(data, (96, 768), "Q4_K")
    assert weight.format_name == "gguf_q4_k"
    assert weight.size_bytes == 96 * 3 * 144
    assert list(weight.tensors()) == ["data"]
    expected = torch.from_numpy(golden["Q4_K_values"])
    assert_same_bits(weight.dequantize(), expected)
    assert_same_bits(weight.dequantize(torch.bfloat16), expected.to(torch.bfloat16))
    stacked = ggml.GgmlWeight(data.view(2, 48, -1), (2, 48, 768), "Q4_K")
    assert_same_bits(stacked.dequantize(), expected.view(2, 48, 768))
    assert weight == weight and weight != stacked


@pytest.mark.parametrize(
    "data_shape, dtype, shape",
    [
        ((96, 431), torch.uint8, (96, 768)),
        ((95, 432), torch.uint8, (96, 768)),
        ((96, 432), torch.int8, (96, 768)),
        ((432,), torch.uint8, (1, 768)),
    ],
    ids=["short_rows", "missing_row", "dtype", "missing_dimension"],
)
def test_ggml_weight_refuses_data_of_another_shape(data_shape, dtype, shape):
    text = r"Q4_K weight of shape .* is uint8 .*\(144 bytes for 256 elements, 432 bytes a row\), found u?int8 \["
    with pytest.raises(ValueError, match=text):
        ggml.GgmlWeight(torch.zeros(data_shape, dtype=dtype), shape, "Q4_K")


def test_ggml_weight_refuses_impossible_types_and_shapes():
    data = torch.zeros((1, 144), dtype=torch.uint8)
    with pytest.raises(ValueError, match="a Q4_K row has a multiple of 256 elements, found K=255"):
        ggml.GgmlWeight(data, (1, 255), "Q4_K")
    with pytest.raises(ValueError, match=r"a Q4_K weight has at least one dimension, found shape \(\)"):
        ggml.GgmlWeight(data, (), "Q4_K")
    with pytest.raises(UnknownQuantizationError, match="'q4_k' is not a known GGML type"):
        ggml.GgmlWeight(data, (1, 256), "q4_k")
