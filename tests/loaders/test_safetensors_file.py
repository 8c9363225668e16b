import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowbit.loaders import CheckpointError, Omitted, open_checkpoint
from lowbit.loaders.safetensors_file import DTYPES
from lowbit.tests.loaders.raw_files import entry, safetensors_bytes, write

ONE = {"w": entry("U8", [4], 0, 4)}


def raw_bytes(tensor):
    return bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


def raw_equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_reads_back_what_the_library_wrote(tmp_path, dtype):
    data = torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    written = data.view(dtype)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"some.weight": written, "none": written[:0].clone()}, path, metadata={"format": "pt"})
    file = open_checkpoint(path)
    stored = file.tensors["some.weight"]
    assert (file.container, file.path, file.metadata) == ("safetensors", str(path), {"format": "pt"})
    assert (stored.name, stored.shape, stored.dtype, stored.ggml_type) == ("some.weight", (3, 5), dtype, None)
    assert stored.size_bytes == written.nbytes
    assert raw_equal(stored.load(), written)
    assert file.tensors["none"].load().shape == (0, 5)


def test_loading_twice_gives_views_on_the_same_bytes(tmp_path):
    path = write(tmp_path, "x.sft", safetensors_bytes(ONE, b"abcd", pad=True))
    stored = open_checkpoint(path).tensors["w"]
    first, second = stored.load(), stored.load()
    assert first.data_ptr() == second.data_ptr()
    assert bytes(second.tolist()) == b"abcd"


def test_order_unicode_scalars_and_gaps(tmp_path):
    header = {"b": entry("U8", [2], 6, 8), "ä🙂": entry("F32", [], 0, 4), "__metadata__": {"k": "ü", "e": ""}}
    file = open_checkpoint(write(tmp_path, "x.sft", safetensors_bytes(header, bytes(4) + b"__hi" + b"more", pad=True)))
    assert list(file.tensors) == ["b", "ä🙂"]
    assert file.metadata == {"k": "ü", "e": ""}
    assert file.tensors["ä🙂"].load().item() == 0.0
    assert bytes(file.tensors["b"].load().tolist()) == b"hi"


def test_huge_metadata_is_left_in_the_file(tmp_path):
    header = {**ONE, "__metadata__": {"picture": "A" * 2**23, "small": "s"}}
    file = open_checkpoint(write(tmp_path, "x.sft", safetensors_bytes(header, bytes(4))))
    assert file.metadata == {"picture": Omitted("string", 2**23), "small": "s"}


def test_a_large_header_with_text_of_every_kind(tmp_path):
    title = 'ä 模型 🙂 "quoted"\n'
    header = {"ä🙂": ONE["w"], "__metadata__": {"picture": "ä" + "A" * 9 * 2**20, "title": title}}
    for ensure_ascii in (True, False):
        raw = json.dumps(header, ensure_ascii=ensure_ascii).encode()
        file = open_checkpoint(write(tmp_path, f"{ensure_ascii}.sft", safetensors_bytes(raw, bytes(4))))
        assert list(file.tensors) == ["ä🙂"]
        assert file.metadata["title"] == title and isinstance(file.metadata["picture"], Omitted)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: name != "__metadata__"
)
arrays = st.sampled_from(["<f4", "<f2", "<f8", "i1", "u1", "<i2", "<i4", "<i8", "?"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    tensors=st.dictionaries(names, arrays, min_size=1, max_size=6),
    metadata=st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_round_trip_of_any_tensors(tmp_path, tensors, metadata):
    written = {name: torch.from_numpy(np.array(array, order="C")) for name, array in tensors.items()}
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    safetensors.torch.save_file(written, path, metadata=metadata or None)
    file = open_checkpoint(path)
    assert file.metadata == metadata
    assert file.tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert raw_equal(file.tensors[name].load(), tensor), name


def with_entry(**changes):
    return {"w": {**ONE["w"], **changes}}


REFUSED = {
    "too_short": (b"abc", "found a file of 3 bytes, expected a safetensors file"),
    "absurd_length": (safetensors_bytes(ONE, bytes(4), 2**60), "header length of 1,152,921,504,606,846,976 bytes"),
    "cut_in_header": (
        safetensors_bytes(ONE, bytes(4))[:20],
        r"found 20 of 68 bytes, expected the whole file\. The download is",
    ),
    "cut_in_data": (
        safetensors_bytes(ONE, bytes(3)),
        r"found 71 of 72 bytes, expected the whole file\. The download is incomplete",
    ),
    "not_utf8": (safetensors_bytes(b'{"\xff":1}'), r"a header that is not UTF-8 text \(byte 2\)"),
    "not_json": (safetensors_bytes(b"{nothing"), r"found 'nothing' at character 1 of the header \(a name\)"),
    "cut_json": (safetensors_bytes(b'{"w"'), r"found '' at character 4 of the header"),
    "second_document": (safetensors_bytes(b"{}{}"), r"found '\{\}' at character 2 .*after the header's end"),
    "lone_surrogate": (safetensors_bytes(rb'{"\ud800":{}}'), r"at character \d+ of the header \(a name\)"),
    "deep_nesting": (safetensors_bytes(b'{"w":' + b'{"a":' * 50_000), r"of the header \(the entry of 'w'\)"),
    "deep_brackets": (safetensors_bytes(b'{"w":{"shape":' + b"[" * 980 + b"}}"), r"of the header \(the entry of 'w'\)"),
    "deep_metadata": (
        safetensors_bytes(b'{"__metadata__":{"a":' + b"[" * 50_000),
        "value of 'a' in '__metadata__' that is not a text",
    ),
    "duplicate_tensor": (
        safetensors_bytes(b'{"w":%b,"w":%b}' % ((b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2)),
        "two tensors named 'w'",
    ),
    "duplicate_field": (
        safetensors_bytes(b'{"w":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "the fields .* in the tensor 'w'",
    ),
    "duplicate_metadata": (safetensors_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "two entries '__metadata__'"),
    "duplicate_metadata_key": (safetensors_bytes(b'{"__metadata__":{"a":"1","a":"2"}}'), "two metadata entries 'a'"),
    "missing_field": (
        safetensors_bytes({"w": {"dtype": "U8", "shape": [0]}}),
        r"the fields \['dtype', 'shape'\] in the tensor 'w'",
    ),
    "metadata_number": (
        safetensors_bytes({"__metadata__": {"a": 1}}),
        "a value of 'a' in '__metadata__' that is not a text",
    ),
    "metadata_list": (safetensors_bytes({"__metadata__": []}), r"found '\[\]\}' at character 17"),
    "nameless": (safetensors_bytes({"": ONE["w"]}, bytes(4)), "a tensor without a name"),
    "long_name": (safetensors_bytes({"n" * 300: ONE["w"]}, bytes(4)), "a tensor name of 300 characters"),
    "negative_dim": (
        safetensors_bytes(with_entry(shape=[-2, -2]), bytes(4)),
        r"found the shape \[-2, -2\] in the tensor 'w'",
    ),
    "fractional_dim": (
        safetensors_bytes(with_entry(shape=[4.0]), bytes(4)),
        r"found the shape \[4.0\] in the tensor 'w'",
    ),
    "bool_dim": (
        safetensors_bytes(with_entry(shape=[4, True]), bytes(4)),
        r"found the shape \[4, True\] in the tensor 'w'",
    ),
    "overflowing_shape": (safetensors_bytes(with_entry(shape=[2**62, 2**62, 0]), bytes(4)), "the impossible shape"),
    "endless_dim": (
        safetensors_bytes(with_entry(shape=[10**900]), bytes(4)),
        r"found the shape \[1000.*… in the tensor 'w'",
    ),
    "many_dims": (
        safetensors_bytes(with_entry(shape=[1] * 9), bytes(4)),
        "9 dimensions in the tensor 'w', expected at most 8",
    ),
    "size_mismatch": (
        safetensors_bytes(with_entry(shape=[5]), bytes(8)),
        r"4 bytes of data for the tensor 'w', expected 5 for the shape \[5\] in U8",
    ),
    "start_after_end": (
        safetensors_bytes(with_entry(data_offsets=[4, 0]), bytes(4)),
        r"the data_offsets \[4, 0\] in the tensor 'w'",
    ),
    "negative_offset": (
        safetensors_bytes(with_entry(data_offsets=[-4, 0]), bytes(4)),
        r"the data_offsets \[-4, 0\] in the tensor 'w'",
    ),
    "three_offsets": (
        safetensors_bytes(with_entry(data_offsets=[0, 4, 8]), bytes(8)),
        r"the data_offsets \[0, 4, 8\] in the tensor 'w'",
    ),
    "far_offset": (
        safetensors_bytes(with_entry(data_offsets=[2**50, 2**50 + 4]), bytes(4)),
        "that the tensor 'w' starts at byte 1,125,8",
    ),
    "overlap": (
        safetensors_bytes({**ONE, "v": entry("U8", [4], 2, 6)}, bytes(8)),
        "that the tensors 'w' and 'v' overlap",
    ),
    "no_tensors": (safetensors_bytes({"__metadata__": {}}), "found no tensors"),
    "not_utf8_later": (
        safetensors_bytes(b'{"__metadata__":{"a":"\xc3\xa4","b":"\xc3"}}'),
        r"not UTF-8 text \(byte 31\)",
    ),
    "not_json_beyond_ascii": (safetensors_bytes("{ä".encode()), "found 'ä' at character 1 of the header"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damaged_files_are_refused_with_their_reason(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write(tmp_path, "x.sft", content))
    text = str(caught.value)
    assert text.startswith("x.sft: found ")
    assert len(text) < 700


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "f32", "", 7, None, ["F32"]], ids=str)
def test_unknown_dtype_is_named(tmp_path, dtype):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path, "x.sft", safetensors_bytes(with_entry(dtype=dtype), bytes(4))))
    assert f"found the data type {dtype!r} in the tensor 'w', expected one of F64, F32, F16, BF16" in str(caught.value)


def test_too_many_tensors(tmp_path):
    header = {f"t{i}": entry("U8", [0], 0, 0) for i in range(65_537)}
    with pytest.raises(CheckpointError, match=r"more than 65,536 tensors"):
        open_checkpoint(write(tmp_path, "x.sft", safetensors_bytes(header)))
