"""Checkpoint files as the host's memory management wants them, and the lists that the nodes offer."""

from __future__ import annotations

import threading

import comfy.memory_management
import folder_paths

from ..loaders.mapped_file import MappedFile

MODEL_FOLDER = "diffusion_models"
GGUF_FOLDER = "lowbit_gguf"


class HostFile(MappedFile):
    """A mapped file whose tensors also say where in the file they lie: dynamic VRAM reads those bytes straight to the
    GPU."""

    def __init__(self, path):
        super().__init__(path)
        self._lock = threading.Lock()
        self._file = open(self.path, "rb", buffering=0) if comfy.memory_management.aimdo_enabled else None  # noqa: SIM115

    def tensor(self, offset, size_bytes, dtype, shape):
        tensor = super().tensor(offset, size_bytes, dtype, shape)
        if self._file is not None and size_bytes:
            place = comfy.memory_management.TensorFileSlice(self._file, self._lock, offset, size_bytes)
            tensor.untyped_storage()._comfy_tensor_file_slice = place
        return tensor

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()


def register_gguf_folder() -> None:
    """Offer `.gguf` files of the diffusion model folders, those that users add later included, without touching other
    lists.

    The folder list is the host's own object; only the suffixes are ours.
    """
    paths = folder_paths.folder_names_and_paths[MODEL_FOLDER][0]
    folder_paths.folder_names_and_paths[GGUF_FOLDER] = (paths, {".gguf"})


def list_gguf() -> list[str]:
    """GGUF files to pick from, as the host names them."""
    return folder_paths.get_filename_list(GGUF_FOLDER)


def list_safetensors() -> list[str]:
    """Safetensors files to pick from, as the host names them."""
    names = folder_paths.get_filename_list(MODEL_FOLDER)
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def full_path(name: str) -> str:
    """The path of a picked file. Raises FileNotFoundError, with the name, when it is gone."""
    folder = GGUF_FOLDER if name.lower().endswith(".gguf") else MODEL_FOLDER
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in models/{MODEL_FOLDER} any more: press R to refresh the lists and pick another file."
        )
    return path
