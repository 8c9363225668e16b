"""The lists that the nodes offer: GGUF beside the host's own files, in folders that are added later too."""

import os

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small


@pytest.fixture
def files(comfy_host):
    from lowbit.host import files

    files.register_gguf_folder()
    return files


@pytest.fixture
def folder(comfy_host, tmp_path):
    """A folder added the way extra_model_paths.yaml adds one, after our list was registered."""
    comfy_host.folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    yield tmp_path
    comfy_host.folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(tmp_path))
    comfy_host.folder_paths.filename_list_cache.clear()


def test_lists_follow_folders_that_are_added_later(comfy_host, files, folder):
    (folder / "sub").mkdir()
    for name in ("added.gguf", "added.safetensors", "added.ckpt", "notes.txt"):
        (folder / "sub" / name).write_bytes(b"x")
    name = os.path.join("sub", "added")
    assert f"{name}.gguf" in files.list_gguf() and f"{name}.safetensors" in files.list_safetensors()
    assert not any(entry.endswith((".ckpt", ".txt")) for entry in files.list_gguf() + files.list_safetensors())
    assert files.full_path(f"{name}.gguf") == str(folder / f"{name}.gguf")


def test_the_hosts_own_lists_are_left_alone(comfy_host, files, folder):
    (folder / "model.gguf").write_bytes(b"x")
    comfy_host.folder_paths.filename_list_cache.clear()
    assert "model.gguf" not in comfy_host.folder_paths.get_filename_list("diffusion_models")
    assert ".gguf" not in comfy_host.folder_paths.supported_pt_extensions


def test_a_file_that_is_gone_is_named(files):
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf"):
        files.full_path("gone.gguf")


def test_tensors_say_where_they_lie_when_dynamic_vram_reads_files(comfy_host, files, tmp_path, monkeypatch):
    """What the host reads straight from the file into the GPU's memory must be the tensor's own bytes."""
    from lowbit.loaders import open_checkpoint

    path = small.write_gguf(tmp_path / "m.gguf", small.ideogram4(), linear="Q4_K")
    monkeypatch.setattr(comfy_host.module("comfy.memory_management"), "aimdo_enabled", True)
    data = path.read_bytes()
    for stored in open_checkpoint(path, files.HostFile).tensors.values():
        loaded = stored.load()
        tensor = loaded.data if stored.ggml_type else loaded
        place = tensor.untyped_storage()._comfy_tensor_file_slice
        assert (place.offset, place.size) == (stored.offset, stored.size_bytes) and tensor.storage_offset() == 0
        assert data[place.offset : place.offset + place.size] == bytes(
            tensor.view(-1).view(dtype=tensor.dtype).numpy().tobytes()
        )


def test_files_that_change(comfy_host, files, tmp_path):
    """Written to: refused, and a loader that got its name through a link runs again. Replaced or gone: no harm."""
    from lowbit.nodes import inputs

    path = tmp_path / "model.gguf"
    path.write_bytes(b"1")
    states = [files.file_state(str(path))]
    files.check_not_written_to(states)
    files.check_still_the_same(states)
    linked, picked = inputs.fingerprint(None), inputs.fingerprint("same file", "none")
    path.write_bytes(b"12")
    with pytest.raises(RuntimeError, match=r"model\.gguf was written to after it was loaded.*Queue the prompt again"):
        files.check_not_written_to(states)
    assert inputs.fingerprint(None) != linked and inputs.fingerprint("same file", "none") == picked
    other = tmp_path / "other"
    other.write_bytes(b"123")
    other.replace(path)
    files.check_not_written_to(states)
    with pytest.raises(RuntimeError, match=r"model\.gguf was replaced or removed"):
        files.check_still_the_same(states)
    path.unlink()
    files.check_not_written_to(states)
    assert files.file_state(str(path)) is None


@pytest.mark.parametrize("when", ["before", "during", "during, and another error"])
def test_a_file_written_to_around_a_sampling(comfy_host, tmp_path, when):
    """A loaded model is not loaded again for the next sampling, which may read its weights all the same."""
    path, calls = quantized.write(tmp_path, "q4_k"), []

    def write() -> None:
        with open(path, "ab") as file:
            file.write(b"1")

    def wrapper(apply_model, arguments):
        calls.append(1)
        write()
        if when == "during, and another error":
            raise ZeroDivisionError
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = quantized.load(path)
    model.set_model_unet_function_wrapper(wrapper)
    comfy_host.comfy.model_management.load_models_gpu([model])
    if when == "before":
        write()
    other_error = when == "during, and another error"
    error, text = (ZeroDivisionError, None) if other_error else (RuntimeError, "was written to after it was loaded")
    with pytest.raises(error, match=text):
        comfy_host.sample(model, steps=1, width=128, height=128)
    assert bool(calls) is (when != "before")
    comfy_host.unload()


def test_a_refused_file_is_let_go(comfy_host, files, tmp_path, monkeypatch):
    from lowbit.loaders import CheckpointError, open_checkpoint

    monkeypatch.setattr(comfy_host.module("comfy.memory_management"), "aimdo_enabled", True)
    opened = []

    class Watched(files.HostFile):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "bad.gguf", Watched)
    assert opened[0]._file.closed


@pytest.mark.skipif(os.name == "nt", reason="Windows lets no open file be replaced")
def test_what_is_read_and_what_is_mapped_is_one_file(comfy_host, tmp_path, monkeypatch):
    """Also when another one takes its place while it is opened."""
    from lowbit.host.files import HostFile
    from lowbit.loaders import mapped_file

    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(b"one!")
    other.write_bytes(b"two!")
    map_private = mapped_file._map_private

    def replaced(*args):
        mapping = map_private(*args)
        os.replace(other, path)
        return mapping

    monkeypatch.setattr(comfy_host.module("comfy.memory_management"), "aimdo_enabled", True)
    monkeypatch.setattr(mapped_file, "_map_private", replaced)
    file = HostFile(path)
    place = file.tensor(0, 4, torch.uint8, (4,)).untyped_storage()._comfy_tensor_file_slice
    place.file_ref.seek(place.offset)
    assert place.file_ref.read(place.size) == file.read(0, 4) == b"one!"
    file.close()
    assert place.file_ref.closed
