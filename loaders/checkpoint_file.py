"""Open a checkpoint: which container it is, whether its extension says so, and the reader for it."""

from __future__ import annotations

import os
from collections.abc import Callable

from .checkpoint import CheckpointFile, StoredTensor
from .errors import TAKE_UNSPLIT, CheckpointError
from .file_kind import HEAD_BYTES, container_of, describe_other
from .gguf import read_gguf
from .mapped_file import MappedFile
from .safetensors_file import read_safetensors

__all__ = ["CheckpointFile", "StoredTensor", "open_checkpoint"]

_CONTAINERS = {".safetensors": "safetensors", ".sft": "safetensors", ".gguf": "gguf"}
_SUFFIXES = {"safetensors": ".safetensors", "gguf": ".gguf"}
_NAMES = {"safetensors": "a safetensors file", "gguf": "a GGUF file"}
_READERS = {"safetensors": read_safetensors, "gguf": read_gguf}


def open_checkpoint(path: str | os.PathLike, open_file: Callable[..., MappedFile] = MappedFile) -> CheckpointFile:
    """Read the header of a safetensors or GGUF file; tensors are read when they are used.

    Raises CheckpointError, with a text for the person who picked the file, for anything that cannot be loaded.
    """
    file = open_file(path)
    try:
        head = file.read(0, min(HEAD_BYTES, file.size_bytes))
        return _READERS[_checked_container(file.path, head)](file)
    except BaseException:
        file.close()  # an error box may keep the traceback for long, and Windows cannot replace a mapped file
        raise


def _checked_container(path: str, head: bytes) -> str:
    if path.lower().endswith(".index.json"):
        raise CheckpointError(
            path,
            found="the index of a model split into several files",
            expected="a whole model in one file",
            todo=TAKE_UNSPLIT,
        )
    suffix = os.path.splitext(path)[1].lower()
    expected, found = _CONTAINERS.get(suffix), container_of(head)
    if expected is not None and found == expected:
        return found
    if found is not None:
        raise CheckpointError(
            path,
            found=f"{_NAMES[found]} behind the extension {suffix or '(none)'}",
            expected=_NAMES[expected] if expected else f"the extension {_SUFFIXES[found]}",
            todo=f"Rename the file so that it ends in {_SUFFIXES[found]} and pick it in a node that loads such files.",
        )
    other = describe_other(head)
    if expected is None:
        raise CheckpointError(
            path,
            found=other or f"a file with the extension {suffix or '(none)'}",
            expected="a .safetensors or .gguf file",
            todo="Other files cannot be loaded here: look for a safetensors or GGUF version of the model.",
        )
    if other is not None:
        raise CheckpointError(
            path,
            found=f"{other} behind the extension {suffix}",
            expected=_NAMES[expected],
            todo="Download the model file itself again, with the download button of its page.",
        )
    return expected  # the reader says what is wrong with its first bytes
