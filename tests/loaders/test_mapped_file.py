import builtins
import gc
import mmap
import os
import sys
import tracemalloc

import psutil
import pytest
import torch
from lowbit.loaders import CheckpointError, MappedFile, open_checkpoint
from lowbit.tests.loaders.raw_files import entry, safetensors_bytes, write


@pytest.fixture
def sixteen_bytes(tmp_path):
    return write(tmp_path, "some.bin", bytes(range(16)))


def test_tensor_is_a_view_with_its_own_storage(sixteen_bytes):
    file = MappedFile(sixteen_bytes)
    first = file.tensor(4, 8, torch.uint8, (2, 4))
    second = file.tensor(4, 8, torch.int32, (2,))
    assert first.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert first.data_ptr() == second.data_ptr()
    assert first.storage_offset() == 0
    assert first.untyped_storage().nbytes() == 8


@pytest.mark.skipif(sys.platform == "win32", reason="a mapping is read-only on Windows")
def test_writing_to_a_view_does_not_reach_the_file(sixteen_bytes):
    file = MappedFile(sixteen_bytes)
    first = file.tensor(4, 8, torch.uint8, (2, 4))
    second = file.tensor(4, 8, torch.int32, (2,))
    first[0, 0] = 255
    assert second[0].item() & 0xFF == 255
    assert sixteen_bytes.read_bytes() == bytes(range(16)), "writing to a view must not reach the file"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_making_a_view_does_not_warn(sixteen_bytes, monkeypatch, platform):
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("the flags of Linux")
    torch.set_warn_always(True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            file = MappedFile(sixteen_bytes)
        assert file.tensor(0, 16, torch.uint8, (16,)).tolist() == list(range(16))
        assert file.tensor(1, 4, torch.int32, (1,)).data_ptr() % 4 == 0
    finally:
        torch.set_warn_always(False)


def mapping_options(path, monkeypatch, platform):
    """What the mapping is asked for on a platform."""
    asked, mapping = {}, mmap.mmap

    def record(number, size, **options):
        asked.update(options)
        return mapping(number, size, access=mmap.ACCESS_READ)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        patch.setattr(mmap, "mmap", record)
        MappedFile(path).close()
    return asked


def test_windows_maps_read_only_since_copy_on_write_counts_as_memory(sixteen_bytes, monkeypatch):
    assert mapping_options(sixteen_bytes, monkeypatch, "win32") == {"access": mmap.ACCESS_READ}
    assert mapping_options(sixteen_bytes, monkeypatch, "darwin") == {"access": mmap.ACCESS_COPY}


@pytest.mark.skipif(sys.platform == "win32", reason="the flags of Linux")
def test_linux_maps_privately_without_reserving_memory(sixteen_bytes, monkeypatch):
    asked = mapping_options(sixteen_bytes, monkeypatch, "linux")
    assert asked["flags"] == mmap.MAP_PRIVATE | 0x4000
    assert asked["prot"] == mmap.PROT_READ | mmap.PROT_WRITE


def test_unaligned_tensor_is_copied(sixteen_bytes):
    file = MappedFile(sixteen_bytes)
    copy = file.tensor(1, 4, torch.int32, (1,))
    assert copy.item() == int.from_bytes(bytes([1, 2, 3, 4]), "little")
    assert copy.data_ptr() % 4 == 0
    copy[0] = 0
    assert file.read(1, 4) == bytes([1, 2, 3, 4])


def test_zero_size_tensor(sixteen_bytes):
    tensor = MappedFile(sixteen_bytes).tensor(16, 0, torch.bfloat16, (0, 7))
    assert (tensor.shape, tensor.dtype) == ((0, 7), torch.bfloat16)


def test_views_keep_the_mapping_alive(sixteen_bytes):
    file = MappedFile(sixteen_bytes)
    tensor = file.tensor(8, 8, torch.uint8, (8,))
    file.close()
    del file
    gc.collect()
    assert tensor.tolist() == list(range(8, 16))


def test_closing_lets_the_file_go(sixteen_bytes):
    file = MappedFile(sixteen_bytes)
    file.close()
    with pytest.raises(ValueError, match="released"):
        file.read(0, 1)


@pytest.mark.parametrize(("offset", "size"), [(9, 8), (-1, 4), (0, -1), (17, 0), (2**62, 2**62)])
def test_reading_outside_the_file_is_refused(sixteen_bytes, offset, size):
    file = MappedFile(sixteen_bytes)
    with pytest.raises(CheckpointError, match="found a file of 16 bytes"):
        file.read(offset, size)
    with pytest.raises(CheckpointError, match="found a file of 16 bytes"):
        file.tensor(offset, size, torch.uint8, (size,))


def test_missing_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^gone\.gguf: found no such file, expected a readable file\. Pick "
    ) as caught:
        MappedFile(tmp_path / "gone.gguf")
    assert str(tmp_path / "gone.gguf") in str(caught.value), "the whole path is told"


def test_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"found a folder, .* Pick a file inside the folder\."):
        MappedFile(tmp_path)


def test_empty_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"found an empty file \(0 bytes\), expected a checkpoint\. .*download it again"
    ):
        MappedFile(write(tmp_path, "none.gguf", b""))


def test_path_that_no_system_takes():
    with pytest.raises(CheckpointError, match="found a path the system refuses"):
        MappedFile("a\0b.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="found a device or pipe"):
        MappedFile(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("where", [(builtins, "open"), (os, "stat")], ids=["open", "stat"])
def test_permission_denied(sixteen_bytes, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(*where, refuse)
        with pytest.raises(CheckpointError, match=r"permission denied.*right to read it") as caught:
            MappedFile(sixteen_bytes)
    assert str(caught.value).startswith("some.bin: ")


def test_mapping_that_the_system_refuses(sixteen_bytes, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("lowbit.loaders.mapped_file.mmap.mmap", refuse)
    with pytest.raises(CheckpointError, match=r"cannot map its 16 bytes \(Cannot allocate memory\).*paging file"):
        MappedFile(sixteen_bytes)


def test_message_of_an_undecodable_path_can_be_printed(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        MappedFile(os.fspath(tmp_path) + "/bad\udcff.gguf")
    assert str(caught.value).encode("utf-8")


def test_opening_a_large_file_costs_no_memory(tmp_path):
    size = 200 * 2**20
    path = tmp_path / "large.safetensors"
    header = safetensors_bytes({"w": entry("F32", [size // 4], 0, size)})
    with open(path, "wb") as out:
        out.write(header)
        out.truncate(len(header) + size)  # sparse: 200 MB that take no disk
    process = psutil.Process()
    before = process.memory_info().rss
    tracemalloc.start()
    try:
        weight = open_checkpoint(path).tensors["w"].load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weight.shape == (size // 4,)
    assert weight[-1].item() == 0.0
    assert peak < 2**20
    assert process.memory_info().rss - before < 20 * 2**20
