"""A model's files come into the system's cache while nodes still work."""

import io
import os

import pytest
from host_harness import quantized_models as quantized

PIECES = 3


@pytest.fixture
def module(comfy_host, monkeypatch):
    from lowbit.host import read_ahead

    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1024)
    return read_ahead


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    for path in paths:
        with open(path, "wb") as file:
            file.write(os.urandom(PIECES * 1024 + 5))
    return paths


@pytest.fixture
def reads(module, monkeypatch):
    """(file name, offset, bytes) of every read."""
    seen = []

    class Watched(io.FileIO):
        def __init__(self, path, mode, buffering):
            super().__init__(path, mode)

        def readinto(self, piece):
            offset = self.tell()
            seen.append((os.path.basename(self.name), offset, count := super().readinto(piece)))
            return count

    monkeypatch.setattr(module, "open", Watched, raising=False)
    return seen


def test_every_byte_of_each_file_is_read_once_and_in_order(module, files, reads):
    module.read_ahead(*files, files[0]).join()
    of_one = [(0, 1024), (1024, 1024), (2048, 1024), (3072, 5), (3077, 0)]
    assert reads == [(name, *read) for name in ("a.gguf", "b.gguf") for read in of_one]


def test_what_has_no_room_in_memory_is_left_on_the_disk(module, files, reads, monkeypatch):
    module._read(tuple(files), limit_bytes=2048)
    assert reads == [("a.gguf", 0, 1024), ("a.gguf", 1024, 1024)]
    reads.clear()
    monkeypatch.setattr(module, "SHARE_OF_FREE_RAM", 0)
    module.read_ahead(*files).join()
    assert reads == []


def test_a_file_that_cannot_be_read_is_left_to_the_loader(module, files, reads, tmp_path, caplog):
    with caplog.at_level("DEBUG", logger="lowbit"):
        module.read_ahead(str(tmp_path / "gone.gguf"), files[1]).join()
    assert "gone.gguf is not read ahead" in caplog.text
    assert {name for name, *_ in reads} == {"b.gguf"}


def test_loading_reads_both_files_ahead(comfy_host, tmp_path, monkeypatch):
    from lowbit.host import model

    asked = []
    monkeypatch.setattr(model, "read_ahead", lambda *paths: asked.append(paths))
    paths = [str(quantized.write(tmp_path, "q8_0", branch)) for branch in ("conditional", "unconditional")]
    model.load_pair(model.LoadRequest(paths[0]), paths[1])
    model.load_pair(model.LoadRequest(paths[0]), model.NONE)
    assert asked == [tuple(paths), (paths[0],)]
