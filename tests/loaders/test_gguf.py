import gguf
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit.formats.ggml import TYPES, GgmlWeight
from lowbit.loaders import CheckpointError, Omitted, open_checkpoint
from lowbit.tests.loaders.raw_files import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    GgufBytes,
    gguf_bytes,
    write,
)

Q = gguf.GGMLQuantizationType
BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ONE = [("w", (2,), 0, 0)]


def finite_blocks(ggml_type, rows, row_elements, seed=0):
    """Random blocks whose scales are ordinary float16 numbers."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[ggml_type]
    random = np.random.default_rng(seed).integers(0, 256, (rows, row_elements // block_size, type_size), dtype=np.uint8)
    random[..., 1::2] &= 0xBF  # clears the top exponent bit of every float16 at an even position
    return random.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_quantized_tensor_reads_back_what_gguf_py_wrote(tmp_path, name):
    blocks = finite_blocks(Q[name], 3, 512)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("cond.w", blocks, raw_dtype=Q[name])
    finish(writer)
    stored = open_checkpoint(path).tensors["cond.w"]
    assert (stored.shape, stored.dtype, stored.ggml_type) == ((3, 512), None, name)
    assert stored.size_bytes == blocks.nbytes
    weight = stored.load()
    assert isinstance(weight, GgmlWeight)
    assert (weight.shape, weight.ggml_type) == ((3, 512), name)
    assert torch.equal(weight.data, torch.from_numpy(blocks))
    assert weight.data.data_ptr() == stored.load().data.data_ptr(), "a view, not a copy"
    np.testing.assert_array_equal(weight.dequantize().numpy(), gguf.quants.dequantize(blocks, Q[name]))


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_plain_tensors_and_metadata(tmp_path):
    path = tmp_path / "x.GGUF"
    writer = gguf.GGUFWriter(path, "ideogram4")
    writer.add_custom_alignment(128)
    values = {
        "u8": 200,
        "i8": -5,
        "u16": 60_000,
        "i16": -300,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind.replace('i', 'int').replace('u', 'uint')}")(kind, value)
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Größe 🙂")
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("texts", ["a", "ä"])
    writer.add_array("tokens", [f"token{i}" for i in range(100_000)])
    writer.add_array("scores", [0.5] * 1000)
    plain = {
        "f32": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "f16": np.array([1.0, 2.0, 65504.0], dtype=np.float16),
        "f64": np.array([[0.1]]),
        "i8": np.array([-128, 127], dtype=np.int8),
        "i16": np.array([-1], dtype=np.int16),
        "i32": np.array([2**31 - 1], dtype=np.int32),
        "i64": np.array([-(2**63)], dtype=np.int64),
        "scalar": np.array(2.5, dtype=np.float32),
    }
    for name, array in plain.items():
        writer.add_tensor(name, array)
    brain = torch.tensor([[1.0, -2.0], [3e38, 0.0]], dtype=torch.bfloat16)
    writer.add_tensor("bf16", brain.view(torch.uint8).numpy(), raw_dtype=Q.BF16)
    finish(writer)

    file = open_checkpoint(path)
    assert file.container == "gguf"
    expected = {
        "general.architecture": "ideogram4",
        "general.alignment": 128,
        **values,
        "f32": 1.5,
        "f64": 0.1,
        "yes": True,
    }
    expected |= {"text": "Größe 🙂", "ints": [1, 2, 3], "texts": ["a", "ä"]}
    expected |= {"tokens": Omitted("array of string", 100_000), "scores": Omitted("array of f32", 1000)}
    assert file.metadata == expected
    assert list(file.tensors) == [*plain, "bf16"]
    for name, array in plain.items():
        stored = file.tensors[name]
        assert (stored.shape, stored.ggml_type) == (array.shape, None)
        assert torch.equal(stored.load(), torch.from_numpy(np.array(array)))
        assert stored.offset % 128 == 0
    assert torch.equal(file.tensors["bf16"].load(), brain)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    tensors=st.dictionaries(
        st.text("abc.0189_äß🙂", min_size=1, max_size=14),
        st.sampled_from(["<f4", "<f2", "<f8", "i1", "<i2", "<i4", "<i8"]).flatmap(
            lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(max_dims=4, max_side=5))
        ),
        min_size=1,
        max_size=6,
    ),
    alignment=st.sampled_from([None, 8, 32, 256]),
)
def test_round_trip_of_any_tensors(tmp_path, tensors, alignment):
    path = tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, "test")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    finish(writer)
    read = open_checkpoint(path).tensors
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        loaded = read[name].load()
        assert loaded.shape == array.shape
        assert loaded.numpy().tobytes() == array.tobytes(), name


def opened(tmp_path, content):
    return open_checkpoint(write(tmp_path, "x.gguf", content))


def test_version_2_is_read(tmp_path):
    file = opened(tmp_path, gguf_bytes(ONE, np.float32([1, 2]).tobytes(), version=2))
    assert file.tensors["w"].load().tolist() == [1.0, 2.0]


def test_dims_are_innermost_first(tmp_path):
    file = opened(tmp_path, gguf_bytes([("w", (4, 3, 2), 0, 0)], bytes(96)))
    assert file.tensors["w"].shape == (2, 3, 4)


def test_five_dims(tmp_path):
    """The patch embedding of video models, [N, C, frames, height, width]."""
    values = np.arange(2 * 3 * 1 * 2 * 2, dtype=np.float16)
    file = opened(tmp_path, gguf_bytes([("patch_embedding.weight", (2, 2, 1, 3, 2), 1, 0)], values.tobytes()))
    weight = file.tensors["patch_embedding.weight"].load()
    assert weight.shape == (2, 3, 1, 2, 2)
    assert weight.flatten().tolist() == values.tolist()


def test_original_shape_of_a_plain_tensor(tmp_path):
    metadata = [("comfy.gguf.orig_shape.w", ARRAY, I32, [1, 2, 1, 1, 3])]
    content = gguf_bytes([("w", (6,), 1, 0)], np.arange(6, dtype=np.float16).tobytes(), metadata)
    weight = opened(tmp_path, content).tensors["w"].load()
    assert weight.shape == (1, 2, 1, 1, 3)
    assert weight.flatten().tolist() == list(range(6))


def test_original_shape_cuts_the_same_blocks_into_other_rows(tmp_path):
    blocks = finite_blocks(Q.Q8_0, 4, 32)
    metadata = [("comfy.gguf.orig_shape.w", ARRAY, I32, [2, 64])]
    stored = opened(tmp_path, gguf_bytes([("w", (32, 4), 8, 0)], blocks.tobytes(), metadata)).tensors["w"]
    weight = stored.load()
    assert stored.shape == weight.shape == (2, 64)
    assert weight.data.shape == (2, 68)
    np.testing.assert_array_equal(weight.dequantize().numpy().reshape(4, 32), gguf.quants.dequantize(blocks, Q.Q8_0))


def test_original_rows_that_are_no_whole_blocks_come_unpacked(tmp_path):
    blocks = finite_blocks(Q.Q8_0, 3, 96)
    metadata = [("comfy.gguf.orig_shape.w", ARRAY, I32, [16, 2, 3, 3])]
    stored = opened(tmp_path, gguf_bytes([("w", (96, 3), 8, 0)], blocks.tobytes(), metadata)).tensors["w"]
    loaded = stored.load()
    assert (stored.shape, stored.ggml_type, stored.size_bytes) == ((16, 2, 3, 3), "Q8_0", blocks.nbytes)
    assert (loaded.shape, loaded.dtype) == ((16, 2, 3, 3), torch.float16)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, Q.Q8_0)).to(torch.float16)
    assert torch.equal(loaded.reshape(3, 96), expected)


def test_nested_arrays_are_stepped_over(tmp_path):
    nested = ("n", ARRAY, ARRAY, [(I16, [1, 2]), (STRING, ["a"]), (ARRAY, [(U8, [9])])])
    file = opened(tmp_path, gguf_bytes(ONE, bytes(8), [nested, ("after", I8, -1)]))
    assert file.metadata == {"n": Omitted("array of array", 3), "after": -1}


def test_metadata_beyond_the_budget_stays_in_the_file(tmp_path):
    file = opened(tmp_path, gguf_bytes(ONE, bytes(8), [("big", STRING, "x" * 2**23), ("small", STRING, b"\xff!")]))
    assert file.metadata == {"big": Omitted("string", 2**23), "small": "\ufffd!"}


def with_metadata(*metadata):
    return gguf_bytes(ONE, bytes(8), metadata)


def with_info(*info, data=bytes(2**14)):
    return gguf_bytes([info], data)


def head(tensors, metadata, version=3):
    return bytes(GgufBytes(version, tensors, metadata).raw) + bytes(200)


def with_raw_value(kind, *numbers):
    """One metadata entry "k" of this kind, then u32 and u64 numbers as they are given, then noise."""
    builder = GgufBytes(3, 1, 1).string("k").number("I", kind)
    for code, value in numbers:
        builder.number(code, value)
    return bytes(builder.raw) + bytes(99)


def deep_array(depth):
    element = (U8, [1])
    for _ in range(depth):
        element = (ARRAY, [element])
    return ("deep", ARRAY, *element)


REFUSED = {
    "only_magic": (b"GGUF", "found only 0 bytes after position 4, expected 4 bytes for the version"),
    "version_1": (head(1, 1, 1), "found GGUF version 1, expected a little-endian GGUF file of version 2 or 3"),
    "version_9": (head(1, 1, 9), "found GGUF version 9"),
    "big_endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "found a big-endian GGUF file"),
    "endless_tensors": (
        head(2**60, 0),
        "expected 28,823,037,615,171,174,400 bytes for the description of 1,152,9.* tensors",
    ),
    "endless_metadata": (head(1, 2**60), "bytes for metadata of 1,152,921,504,606,846,976 values"),
    "no_tensors": (head(0, 0), "found no tensors, expected the weights of a model"),
    "endless_key": (
        bytes(GgufBytes(3, 1, 1).number("Q", 2**60).raw) + bytes(99),
        "a length of 1,152,921,504,606,846,976 bytes for a metadata key",
    ),
    "endless_string": (with_raw_value(8, ("Q", 2**60)), "bytes for the metadata 'k'"),
    "endless_array": (with_raw_value(9, ("I", 12), ("Q", 2**60)), "bytes for the metadata 'k'"),
    "endless_strings": (with_raw_value(9, ("I", 8), ("Q", 2**60)), "bytes for the metadata 'k'"),
    "empty_key": (with_metadata(("", U8, 1)), "a metadata entry without a key"),
    "key_not_utf8": (with_metadata((b"\xff", U8, 1)), r"found b'\\xff' as a metadata key, expected UTF-8 text"),
    "duplicate_key": (with_metadata(("k", U8, 1), ("k", U8, 1)), "two metadata entries 'k'"),
    "unknown_kind": (with_raw_value(13), "the value kind 13 in the metadata 'k', expected a kind"),
    "unknown_element_kind": (with_raw_value(9, ("I", 77), ("Q", 1)), "the value kind 77"),
    "deep_arrays": (with_metadata(deep_array(6)), "long or deeply nested arrays in the metadata 'deep'"),
    "many_strings": (
        with_metadata(("k", ARRAY, STRING, [""] * (2**20 + 1))),
        "long or deeply nested arrays in the metadata 'k'",
    ),
    "alignment_zero": (with_metadata(("general.alignment", U32, 0)), "found the alignment 0, expected a power of two"),
    "alignment_odd": (with_metadata(("general.alignment", U32, 48)), "found the alignment 48"),
    "alignment_huge": (with_metadata(("general.alignment", U32, 2**31)), "found the alignment 2147483648"),
    "alignment_text": (with_metadata(("general.alignment", STRING, "32")), "found the alignment '32'"),
    "alignment_bool": (with_metadata(("general.alignment", BOOL, True)), "found the alignment True"),
    "alignment_float": (with_metadata(("general.alignment", F32, 32.0)), r"found the alignment 32\.0"),
    "split": (
        with_metadata(("split.count", U16, 3)),
        r"one part of a model split into 3 files, expected a whole model in one file\. Merge",
    ),
    "nameless": (with_info("", (2,), 0, 0), "a tensor without a name"),
    "long_name": (with_info("n" * 257, (2,), 0, 0), "a length of 257 bytes for a tensor name, expected at most 256"),
    "name_not_utf8": (with_info(b"w\x80", (2,), 0, 0), r"found b'w\\x80' as a tensor name"),
    "nine_dims": (with_info("w", (1,) * 9, 0, 0), "9 dimensions in the tensor 'w', expected at most 8"),
    "endless_dims": (
        bytes(GgufBytes(3, 1, 0).string("w").number("I", 2**32 - 1).raw) + bytes(99),
        "4,294,967,295 dimensions in the tensor 'w'",
    ),
    "impossible_shape": (
        with_info("w", (2**62, 2**62), 0, 0),
        r"the impossible shape \[4611686018427387904, 4611686018427387904\]",
    ),
    "impossible_empty_shape": (with_info("w", (0, 2**63), 0, 0), "the impossible shape"),
    "unknown_type": (
        with_info("w", (32,), 99, 0),
        r"type 99 in the tensor 'w', expected a known type\. GGML type number 99",
    ),
    "unsupported_type": (
        with_info("w", (256,), 16, 0),
        r"the quantization type 16 in the tensor 'w'.*IQ2_XXS.*Pick another quantization",
    ),
    "removed_type": (with_info("w", (32,), 4, 0), "the quantization type 4 in the tensor 'w'"),
    "ragged_rows": (
        with_info("w", (48, 2), 12, 0),
        r"rows of 48 elements in the Q4_K tensor 'w' of shape \[2, 48\], .* whole blocks of 256",
    ),
    "quantized_scalar": (with_info("w", (), 8, 0), r"rows of 1 element in the Q8_0 tensor 'w' of shape \[\]"),
    "quantized_nothing": (with_info("w", (0, 3), 8, 0), "rows of 0 elements in the Q8_0 tensor 'w'"),
    "unaligned_offset": (
        with_info("w", (2,), 0, 16),
        "the tensor 'w' at offset 16, expected a multiple of the alignment 32",
    ),
    "far_offset": (with_info("w", (2,), 0, 2**62), "that the tensor 'w' starts at byte 4,611,686,018,427,38"),
    "cut_in_data": (
        with_info("w", (64, 4), 8, 0, data=bytes(271)),
        r"found 367 of 368 bytes, expected the whole file\. The download is incomplete",
    ),
    "cut_in_infos": (
        gguf_bytes(ONE, b"")[:30],
        "found only 6 bytes after position 24, expected 25 bytes for the description of 1 tensor",
    ),
    "overlap": (
        gguf_bytes([("a", (16,), 0, 0), ("b", (2,), 0, 32)], bytes(64)),
        "that the tensors 'a' and 'b' overlap",
    ),
    "same_place": (
        gguf_bytes([("a", (2,), 0, 0), ("b", (2,), 0, 0)], bytes(64)),
        "that the tensors 'a' and 'b' overlap",
    ),
    "duplicate_tensor": (gguf_bytes([("a", (2,), 0, 0), ("a", (2,), 0, 32)], bytes(64)), "two tensors named 'a'"),
    "original_shape_count": (
        with_metadata(("comfy.gguf.orig_shape.w", ARRAY, I32, [3])),
        r"the original shape \[3\] of the tensor 'w', expected as many elements as .* \[2\]",
    ),
    "original_shape_negative": (
        with_metadata(("comfy.gguf.orig_shape.w", ARRAY, I32, [-1, -2])),
        r"the original shape \[-1, -2\]",
    ),
    "original_shape_text": (with_metadata(("comfy.gguf.orig_shape.w", STRING, "2")), "the original shape '2'"),
    "original_shape_floats": (
        with_metadata(("comfy.gguf.orig_shape.w", ARRAY, F64, [2.0])),
        r"the original shape \[2.0\]",
    ),
    "original_shape_endless": (
        with_metadata(("comfy.gguf.orig_shape.w", ARRAY, I64, [1] * 65)),
        "the original shape Omitted",
    ),
    "original_shape_long": (
        with_metadata(("comfy.gguf.orig_shape.w", ARRAY, U64, [1] * 9 + [2])),
        "10 dimensions in the tensor 'w'",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damaged_files_are_refused_with_their_reason(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, content)
    text = str(caught.value)
    assert text.startswith("x.gguf: found ")
    assert len(text) < 700


def test_every_known_type_is_plain_or_quantized(tmp_path):
    for ggml_type in TYPES.values():
        file = opened(tmp_path, with_info("w", (256, 2), ggml_type.type_id, 0))
        stored = file.tensors["w"]
        assert stored.ggml_type == (None if ggml_type.plain_dtype else ggml_type.name)
        assert stored.dtype == ggml_type.plain_dtype
