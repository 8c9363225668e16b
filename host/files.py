"""Checkpoint files as the host's memory management wants them, and the lists that the nodes offer."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator

import comfy.memory_management
import folder_paths
import torch

from ..loaders.errors import CheckpointError
from ..loaders.file_state import FileState, file_state
from ..loaders.mapped_file import MappedFile

MODEL_FOLDER = "diffusion_models"
GGUF_FOLDER = "lowbit_gguf"
TEXT_ENCODER_FOLDER = "text_encoders"
TEXT_ENCODER_GGUF_FOLDER = "lowbit_text_encoder_gguf"


@contextlib.contextmanager
def errors_for_the_page() -> Iterator[None]:
    """Raises a CheckpointError as a ValueError of the same text: the page puts an error's type before its text, and the
    type of a custom node is a path."""
    try:
        yield
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def name_source(state_dict: dict[str, torch.Tensor], path: str) -> None:
    """Let the host see which disk these weights are on, as its own loaders do (ComfyUI 0.37): those on a fast one it
    reads again instead of keeping a page-locked copy."""
    path = os.path.realpath(path)
    for tensor in state_dict.values():
        tensor.untyped_storage()._comfy_source_path = path


_refusals = 0


def refusals() -> int:
    """How often `check_not_written_to` has refused: a loader that does not know its file's name runs again after it."""
    return _refusals


def check_not_written_to(states: Iterable[FileState]) -> None:
    """Raise RuntimeError when a file, whose weights may still be read from the disk, was written to.

    Deleting it, or putting another one in its place, does no harm: whoever has it open keeps what it held.
    """
    global _refusals
    for state in states:
        now = file_state(state.path)
        if now is not None and now.inode == state.inode and now != state:
            _refusals += 1
            raise RuntimeError(
                f"{os.path.basename(state.path)} was written to after it was loaded, and its weights may be read from "
                "it until the last step. Queue the prompt again, once the file is complete: it is loaded anew."
            )


def check_still_the_same(states: Iterable[FileState]) -> None:
    """Raise RuntimeError when a path does not lead to the file that a model was loaded from: loaded once more, for
    another GPU or for hooks, it would be another model."""
    for state in states:
        if file_state(state.path) != state:
            raise RuntimeError(
                f"{os.path.basename(state.path)} was replaced or removed after it was loaded, and ComfyUI has to load "
                "it once more for this prompt. Queue the prompt again: the new file is loaded."
            )


class HostFile(MappedFile):
    """A mapped file whose tensors also say where in the file they lie: dynamic VRAM reads those bytes straight to the
    GPU, after on_read(path, offset, size_bytes)."""

    def __init__(self, path, on_read: Callable[[str, int, int], None] | None = None):
        self._lock = threading.Lock()
        self._file = None
        self._on_read = on_read
        super().__init__(path)

    def _opened(self, file_number):
        if comfy.memory_management.aimdo_enabled:
            self._file = os.fdopen(os.dup(file_number), "rb", buffering=0)

    def tensor(self, offset, size_bytes, dtype, shape):
        tensor = super().tensor(offset, size_bytes, dtype, shape)
        if self._file is not None and size_bytes:
            file = self._file
            if self._on_read is not None:
                file = _WatchedFile(file, functools.partial(self._on_read, self.path, offset, size_bytes))
            place = comfy.memory_management.TensorFileSlice(file, self._lock, offset, size_bytes)
            tensor.untyped_storage()._comfy_tensor_file_slice = place
        return tensor

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()


class _WatchedFile:
    """An open file as the host reads one tensor from it: it asks for the file's number, or seeks, each time."""

    def __init__(self, file: io.FileIO, on_read: Callable[[], None]):
        self._file, self._on_read = file, on_read
        self.readinto = file.readinto

    def fileno(self) -> int:
        self._on_read()
        return self._file.fileno()

    def seek(self, offset: int) -> int:
        self._on_read()
        return self._file.seek(offset)


def register_gguf_folder() -> None:
    """Offer `.gguf` files of the folders of diffusion models and text encoders, those that users add later included,
    without touching other lists.

    The folder lists are the host's own objects; only the suffixes are ours.
    """
    for folder, gguf_folder in ((MODEL_FOLDER, GGUF_FOLDER), (TEXT_ENCODER_FOLDER, TEXT_ENCODER_GGUF_FOLDER)):
        paths = folder_paths.folder_names_and_paths[folder][0]
        folder_paths.folder_names_and_paths[gguf_folder] = (paths, {".gguf"})


def list_gguf() -> list[str]:
    """GGUF files to pick from, as the host names them."""
    return folder_paths.get_filename_list(GGUF_FOLDER)


def list_text_encoder_gguf() -> list[str]:
    """GGUF text encoders to pick from, as the host names them."""
    return folder_paths.get_filename_list(TEXT_ENCODER_GGUF_FOLDER)


def list_text_encoders() -> list[str]:
    """GGUF and safetensors text encoders to pick from, as the host names them."""
    return sorted([*list_text_encoder_gguf(), *list_safetensors(TEXT_ENCODER_FOLDER)])


def list_safetensors(folder: str = MODEL_FOLDER) -> list[str]:
    """Safetensors files to pick from, as the host names them."""
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def full_path(name: str) -> str:
    """The path of a picked diffusion model. Raises FileNotFoundError, with the name, when it is gone."""
    folder = GGUF_FOLDER if name.lower().endswith(".gguf") else MODEL_FOLDER
    return _full_path(folder, name, MODEL_FOLDER)


def text_encoder_path(name: str) -> str:
    """The path of a picked text encoder. Raises FileNotFoundError, with the name, when it is gone."""
    folder = TEXT_ENCODER_GGUF_FOLDER if name.lower().endswith(".gguf") else TEXT_ENCODER_FOLDER
    return _full_path(folder, name, TEXT_ENCODER_FOLDER)


def _full_path(folder: str, name: str, shown_folder: str) -> str:
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in models/{shown_folder} any more: press R to refresh the lists and pick another file."
        )
    return path
