"""A model's files come into the system's cache while nodes still work."""

import io
import os

import pytest
import torch
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
    module.ReadAhead(*files, files[0]).start().join()
    of_one = [(0, 1024), (1024, 1024), (2048, 1024), (3072, 5)]
    assert reads == [(name, *read) for name in ("a.gguf", "b.gguf") for read in of_one]


@pytest.mark.parametrize("share", [0, 2048])
def test_what_has_no_room_in_memory_is_left_on_the_disk(module, files, reads, monkeypatch, share):
    monkeypatch.setattr(module, "SHARE_OF_FREE_RAM", 1)
    monkeypatch.setattr(module.comfy.model_management, "get_free_memory", lambda device: share)
    module.ReadAhead(*files).start().join()
    assert reads == [("a.gguf", 0, 1024), ("a.gguf", 1024, 1024)][: share // 1024]


def test_a_file_that_cannot_be_read_is_left_to_the_loader(module, files, reads, tmp_path, caplog):
    with caplog.at_level("DEBUG", logger="lowbit"):
        module.ReadAhead(str(tmp_path / "gone.gguf"), files[1]).start().join()
    assert "gone.gguf is not read ahead" in caplog.text
    assert {name for name, *_ in reads} == {"b.gguf"}


@pytest.mark.parametrize(
    "taken, left",
    [
        ([(1024, 1024)], [0, 2048, 3072]),  # a piece
        ([(1500, 100)], [0, 1024, 2048, 3072]),  # less than half of one
        ([(1024, 300), (1324, 300)], [0, 2048, 3072]),  # more than half, in two tensors
        ([(500, 2600)], [1024 * 3]),  # half of the first piece, all of the next two, a bit of the last
        ([(0, 512), (3072, 5)], [1024, 2048, 3072]),
    ],
)
def test_what_the_host_has_begun_to_read_is_left_out(module, files, reads, monkeypatch, taken, left):
    ahead = module.ReadAhead(*files)
    monkeypatch.setattr(ahead._thread, "is_alive", lambda: True)
    for offset, size_bytes in taken:
        ahead.leave_out(files[0], offset, size_bytes)
    ahead.leave_out("another.gguf", 0, 4096)
    ahead.start().join()
    assert [offset for name, offset, _ in reads if name == "a.gguf"] == left
    assert [offset for name, offset, _ in reads if name == "b.gguf"] == [0, 1024, 2048, 3072]


def test_nobody_counts_once_the_files_are_read(module, files):
    ahead = module.ReadAhead(*files).start()
    ahead.join()
    ahead.leave_out(files[0], 0, 1024)
    assert not any(ahead._taken[files[0]].values())


@pytest.fixture
def loading(comfy_host, monkeypatch):
    """Paths that are read ahead, and (path, offset, bytes) that the host has read by itself."""
    from lowbit.host import model

    asked, left_out = [], []

    class Recorded:
        def __init__(self, *paths):
            asked.append(paths)

        def start(self):
            return self

        def leave_out(self, *place):
            left_out.append(place)

    monkeypatch.setattr(model, "ReadAhead", Recorded)
    return asked, left_out


def test_loading_reads_both_files_ahead(tmp_path, loading):
    from lowbit.host import model

    asked, _ = loading
    paths = [str(quantized.write(tmp_path, "q8_0", branch)) for branch in ("conditional", "unconditional")]
    model.load_pair(model.LoadRequest(paths[0]), paths[1])
    model.load_pair(model.LoadRequest(paths[0]), model.NONE)
    assert asked == [tuple(paths), (paths[0],)]


@pytest.mark.parametrize("kind", ["q8_0", "int8"])
def test_what_dynamic_vram_reads_is_left_out(comfy_host, tmp_path, monkeypatch, loading, kind):
    """It asks for the file's number and passes that to a library, or seeks."""
    from lowbit.host import model

    memory_management = comfy_host.module("comfy.memory_management")
    monkeypatch.setattr(memory_management, "aimdo_enabled", True)
    path = str(quantized.write(tmp_path, kind))
    loaded, _ = model.load_pair(model.LoadRequest(path, compute_mode="exact"), model.NONE)
    monkeypatch.setattr(memory_management, "aimdo_enabled", False)
    weight = loaded.model.diffusion_model.layers[1].feed_forward.w2.weight._qdata
    place = weight.untyped_storage()._comfy_tensor_file_slice
    _, left_out = loading
    assert not left_out
    number = comfy_host.module("comfy_aimdo.host_buffer")._file_handle(place.file_ref)
    if os.name != "nt":  # there it is a handle of the system's
        os.lseek(number, place.offset, os.SEEK_SET)
        assert os.read(number, place.size) == bytes(weight.view(-1).view(torch.uint8))
    destination = torch.empty_like(weight)
    assert memory_management.read_tensor_file_slice_into(weight, destination)
    assert torch.equal(destination, weight)
    assert left_out == [(path, place.offset, weight.nbytes)] * 2
