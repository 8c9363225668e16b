import io
import zipfile

import pytest
import torch
from lowbit.loaders import CheckpointError, MappedFile, open_checkpoint
from lowbit.tests.loaders.raw_files import entry, gguf_bytes, safetensors_bytes, write

SAFETENSORS = safetensors_bytes({"w": entry("U8", [4], 0, 4)}, b"abcd")
GGUF = gguf_bytes([("w", (2,), 0, 0)], bytes(8))


def torch_file(**options):
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.safetensors", SAFETENSORS), ("a.sft", SAFETENSORS), ("A.SafeTensors", SAFETENSORS), ("a.gguf", GGUF)],
)
def test_container_and_extension_agree(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert open_checkpoint(path).container == ("gguf" if content is GGUF else "safetensors")
    assert open_checkpoint(str(path)).path == str(path)


def test_header_whose_length_looks_like_a_pickle(tmp_path):
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(0x280)
    path = write(tmp_path, "a.safetensors", safetensors_bytes(header, b"abcd"))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(open_checkpoint(path).tensors) == ["w"]


REFUSED = {
    "gguf_as_safetensors": (
        "a.safetensors",
        GGUF,
        r"found a GGUF file behind the extension \.safetensors, expected a safetensors file\. Rename .* \.gguf",
    ),
    "safetensors_as_gguf": (
        "a.gguf",
        SAFETENSORS,
        r"found a safetensors file behind the extension \.gguf, expected a GGUF file\. Rename",
    ),
    "gguf_as_bin": ("a.bin", GGUF, r"found a GGUF file behind the extension \.bin, expected the extension \.gguf"),
    "no_extension": ("model", SAFETENSORS, r"behind the extension \(none\), expected the extension \.safetensors"),
    "torch": (
        "a.pt",
        torch_file(),
        r"found a PyTorch checkpoint .*, expected a \.safetensors or \.gguf file\. Other files",
    ),
    "old_torch": (
        "a.ckpt",
        torch_file(_use_new_zipfile_serialization=False),
        "found a PyTorch checkpoint .* a Python pickle",
    ),
    "unknown": (
        "a.bin",
        b"12345678901234567890",
        r"found a file with the extension \.bin, expected a \.safetensors or \.gguf file",
    ),
    "renamed_torch": (
        "a.safetensors",
        torch_file(),
        r"found a PyTorch checkpoint .* zip archive behind the extension \.safetensors",
    ),
    "renamed_pickle": (
        "a.gguf",
        torch_file(_use_new_zipfile_serialization=False),
        r"a Python pickle behind the extension \.gguf",
    ),
    "web_page": (
        "a.gguf",
        b"\n<!DOCTYPE html><html>",
        r"found a web page behind the extension \.gguf, expected a GGUF file\. Download",
    ),
    "json": ("a.safetensors", b'{"error": "not authorized"}', "found a JSON text behind"),
    "index": (
        "a.safetensors.index.json",
        b'{"weight_map": {"w": "a-00001-of-00002.safetensors"}}',
        "found the index of a model split into several files, expected a whole model in one file. Download the file",
    ),
    "lfs": (
        "a.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "found a git-lfs pointer",
    ),
    "zeros": ("a.gguf", bytes(4096), "found only zero bytes at its start behind"),
    "ggml": ("a.gguf", b"tjgg" + bytes(60), "an old GGML file"),
    "noise_gguf": (
        "a.gguf",
        b"\x01\x02\x03\x04" * 40,
        "found something else than a model, which starts with .*, expected a GGUF file. Pick another file",
    ),
    "noise_safetensors": (
        "a.safetensors",
        b"\x01\x02\x03\x04" * 40,
        "found a header length of 289,077,004,467,372,545 bytes",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_named(tmp_path, name, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write(tmp_path, name, content))
    assert str(caught.value).startswith(f"{name}: found ")


def test_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("model.safetensors", SAFETENSORS)
    with pytest.raises(CheckpointError, match="or another zip archive"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("name", "content"), [("a.gguf", GGUF[:-1]), ("a.safetensors", SAFETENSORS[:-1])])
def test_refused_file_is_let_go(tmp_path, name, content):
    files = []

    def remember(path):
        files.append(MappedFile(path))
        return files[-1]

    with pytest.raises(CheckpointError):
        open_checkpoint(write(tmp_path, name, content), open_file=remember)
    assert files[0]._mapping.closed


@pytest.mark.parametrize(("name", "content"), [("a.gguf", GGUF), ("a.safetensors", SAFETENSORS)])
def test_subclass_sees_every_view(tmp_path, name, content):
    seen = []

    class Recording(MappedFile):
        def tensor(self, offset, size_bytes, dtype, shape):
            seen.append((offset, size_bytes))
            return super().tensor(offset, size_bytes, dtype, shape)

    stored = open_checkpoint(write(tmp_path, name, content), open_file=Recording).tensors["w"]
    assert seen == [], "opening reads the header only"
    stored.load()
    assert seen == [(stored.offset, stored.size_bytes)]


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors"])
def test_thousand_tensors_take_a_few_reads_of_the_header(tmp_path, name):
    names = [f"conditional.layers.{i}.feed_forward.w1.weight" for i in range(1000)]
    if name == "a.gguf":
        content = gguf_bytes([(key, (256, 15), 12, 2176 * i) for i, key in enumerate(names)], bytes(2_176_000))
    else:
        header = {key: entry("U8", [2176], 2176 * i, 2176 * i + 2176) for i, key in enumerate(names)}
        content = safetensors_bytes(header, bytes(2_176_000))
    path = write(tmp_path, name, content)
    reads = []

    class Recording(MappedFile):
        def read(self, offset, size_bytes):
            reads.append(size_bytes)
            return super().read(offset, size_bytes)

    assert list(open_checkpoint(path, open_file=Recording).tensors) == names
    assert len(reads) < 10
    assert sum(reads) < 2**20
