"""GGUF files as ggml's own C code reads them: header, places, types and values, bit for bit what we meant."""

import json
import pathlib
import struct

import gguf
import pytest
import torch
from host_harness import small_models as small
from lowbit.convert.policy import WRITABLE
from lowbit.formats import ggml
from lowbit.tests.convert import c_library
from lowbit.tests.convert.making import BLOCK_LINEARS, BRANCHES, floats_of, to_gguf

PREFIXES = ("cond.", "uncond.")


@pytest.fixture(scope="module")
def c_read():
    """path -> `c_library.CFile`, None for a refused file."""
    path = c_library.find()
    if path is None:
        pytest.skip(c_library.MISSING)
    library = c_library.load(path)
    return lambda file: c_library.read(library, file)


def policy_file(folder: pathlib.Path, **policy) -> pathlib.Path:
    path = folder / "policy.json"
    path.write_text(json.dumps(policy))
    return path


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert got.dtype == expected.dtype == torch.float32 and got.numel() == expected.numel(), name
    assert torch.equal(got.view(torch.int32), expected.flatten().view(torch.int32)), name


def assert_is_what_was_meant(file: c_library.CFile, source: dict[str, torch.Tensor], kind: str, prefix: str = ""):
    """The block linears as this type, everything else as BF16, under a prefix."""
    tensors = {name.removeprefix(prefix): t for name, t in file.tensors.items() if name.startswith(prefix)}
    assert list(tensors) == list(source)
    for key, value in source.items():
        tensor, stored = tensors[key], kind if key.removesuffix(".weight") in BLOCK_LINEARS else "BF16"
        assert tensor.type.upper() == stored
        assert tensor.dims == (*reversed(value.shape), *[1] * (4 - value.dim()))
        assert_same_bits(tensor.values, ggml.dequantize(ggml.quantize(value, stored), stored), key)


def assert_tensors_follow_each_other(path, file: c_library.CFile) -> None:
    position = 0
    for tensor in file.tensors.values():
        assert tensor.offset == position and position % file.alignment == 0
        position += -(-tensor.size_bytes // file.alignment) * file.alignment
    assert file.data_offset % file.alignment == 0
    assert pathlib.Path(path).stat().st_size == file.data_offset + position


@pytest.mark.parametrize("kind", WRITABLE)
def test_one_branch_of_every_type(tmp_path, fp8_files, c_read, kind):
    policy = policy_file(tmp_path, default=kind, rest="BF16")
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy)
    file, ours = c_read(written.path), floats_of(written.path)
    assert_is_what_was_meant(file, floats_of(fp8_files["conditional"]), kind)
    for key, tensor in file.tensors.items():
        assert_same_bits(tensor.values, ours[key], key)
    assert (file.version, file.alignment) == (3, 32)
    assert_tensors_follow_each_other(written.path, file)
    assert file.metadata["general.architecture"] == "ideogram4"
    assert file.metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    name = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}.get(kind, f"MOSTLY_{kind}")
    assert file.metadata["general.file_type"] == gguf.LlamaFileType[name]
    assert json.loads(file.metadata["lowbit.recipe"])["policy"]["default"] == kind


@pytest.mark.parametrize("kind", WRITABLE)
def test_two_branches_of_every_type(tmp_path, fp8_files, c_read, kind):
    policy = policy_file(tmp_path, default=kind, rest="BF16")
    unconditional = str(fp8_files["unconditional"])
    (written,) = to_gguf(
        fp8_files["conditional"], tmp_path / "m.gguf", policy, unconditional=unconditional, one_file=True
    )
    file = c_read(written.path)
    assert_tensors_follow_each_other(written.path, file)
    assert all(name.startswith(PREFIXES) for name in file.tensors)
    for branch, prefix in zip(BRANCHES, PREFIXES, strict=True):
        assert_is_what_was_meant(file, floats_of(fp8_files[branch]), kind, prefix)


def test_several_types_in_one_file_and_shapes_beside_matrices(tmp_path, c_read):
    extra = {
        "video.weight": torch.randn(4, 3, 2, 2, 2),
        "image.weight": torch.randn(4, 3, 2, 2),
        "scalar": torch.tensor(1.5),
        "bytes": torch.arange(-4, 4, dtype=torch.int8),
        "shorts": torch.arange(5, dtype=torch.int16),
        "numbers": torch.arange(6, dtype=torch.int32),
        "steps": torch.arange(7),
        "empty": torch.zeros(0),
    }
    floats = small.ideogram4()
    source = small.save(tmp_path / "m.safetensors", floats | extra)
    layers = {"*.w1": "Q4_0", "*.w2": "Q8_0", "*.o": "Q5_1", "*.w3": "F16"}
    (written,) = to_gguf(source, tmp_path / "m.gguf", policy_file(tmp_path, default="Q4_K", layers=layers, rest="F32"))
    file = c_read(written.path)
    assert_tensors_follow_each_other(written.path, file)
    kinds = {"w1": "Q4_0", "w2": "Q8_0", "o": "Q5_1", "w3": "F16", "qkv": "Q4_K"}
    for name in BLOCK_LINEARS:
        kind, key = kinds[name.rpartition(".")[2]], f"{name}.weight"
        assert file.tensors[key].type.upper() == kind
        assert_same_bits(file.tensors[key].values, ggml.dequantize(ggml.quantize(floats[key], kind), kind), key)
    assert file.tensors["image.weight"].dims == (2, 2, 3, 4)
    assert file.tensors["video.weight"].dims == (2, 48, 1, 1)  # five dimensions are one more than GGML has
    assert file.metadata["comfy.gguf.orig_shape.video.weight"] == [4, 3, 2, 2, 2]
    assert file.tensors["scalar"].dims == (1, 1, 1, 1)
    for key, value in extra.items():
        assert torch.equal(file.tensors[key].values, value.flatten()), key


def test_the_library_checks_what_it_reads(tmp_path, fp8_files, c_read):
    """Without that, its reading our files would say little."""
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf")
    content = pathlib.Path(written.path).read_bytes()
    offset = struct.pack("<Q", c_read(written.path).tensors["layers.0.attention.qkv.weight"].offset)
    damages = {
        "cut": content[:-1000],
        "version": content.replace(struct.pack("<I", 3), struct.pack("<I", 99), 1),
        "place": content.replace(offset, struct.pack("<Q", 32), 1),
    }
    for name, damaged in damages.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        assert damaged != content
        assert c_read(path) is None, name
