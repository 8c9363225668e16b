"""A file that is there under its name only when it is whole: written under a temporary name beside it, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable

import torch

FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
GB = 1e9


def check_targets(targets: Iterable[str], sources: Iterable[str], overwrite: bool) -> None:
    """Refuse, before anything takes time, targets that exist, are read from, or lie in no folder."""
    sources = [os.path.realpath(source) for source in sources]
    for target in targets:
        folder = os.path.dirname(os.path.abspath(target))
        if not os.path.isdir(folder):
            raise ValueError(f"{target}: there is no folder {folder}. Make it, or pick another one.")
        if os.path.isdir(target):
            raise ValueError(f"{target}: found a folder, expected the name of a file to write.")
        if os.path.realpath(target) in sources:
            raise ValueError(f"{target}: is read by this conversion and cannot be its result: pick another name.")
        if os.path.exists(target) and not overwrite:
            raise _exists(target)


def check_space(folder: str, size_bytes: int) -> None:
    """Refuse what the disk has no room for. A file that will be replaced still takes its room until the end."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise RuntimeError(
            f"{folder}: found {free_bytes / GB:.1f} GB of free disk space, expected {size_bytes / GB:.1f} GB for what "
            "would be written. Free some space, or write to another disk."
        )


class OutputFile:
    """A file being written; `commit` puts it under its name, leaving the `with` block without it leaves nothing.

    Only a process that is killed leaves its temporary file, `<name>.<random>.partial`, which nobody takes for a model.
    """

    def __init__(self, path: str, overwrite: bool = False):
        self.path, self._overwrite = path, overwrite
        self._temporary = f"{path}.{secrets.token_hex(4)}.partial"
        self._file = None

    def __enter__(self) -> OutputFile:
        try:
            # Not tempfile: its files are readable by their owner alone.
            self._file = open(self._temporary, "xb", buffering=0)
        except OSError as error:
            raise RuntimeError(
                f"{self.path}: cannot be written ({error.strerror}). Pick a folder that you may write to."
            ) from error
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)

    def write(self, offset: int, data: bytes | torch.Tensor) -> None:
        """Put bytes, or the bytes of a tensor, at a place in the file."""
        if isinstance(data, torch.Tensor):
            if data.numel() == 0:
                return
            data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(data)
        try:
            self._file.seek(offset)
            while len(view):  # an unbuffered file may take less than it is given
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failed(error) from error

    def commit(self, size_bytes: int) -> None:
        """Give the file its size, wait until the disk has it, and put it under its name."""
        try:
            self._file.truncate(size_bytes)
            os.fsync(self._file.fileno())
            self._file.close()
            if os.path.exists(self.path) and not self._overwrite:
                raise _exists(self.path)
            os.replace(self._temporary, self.path)
            _sync_folder(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RuntimeError:
        if error.errno in FULL_DISK:
            return RuntimeError(
                f"{self.path}: the disk is full, or does not take files of this size ({error.strerror}). Nothing was "
                "kept: free some space, or write to another disk."
            )
        return RuntimeError(
            f"{self.path}: cannot be written ({error.strerror}). If the file is in use, unload the model or pick "
            "another name."
        )


def _exists(path: str) -> ValueError:
    return ValueError(f"{path}: exists already. Pick another name, or switch overwriting on.")


def _sync_folder(folder: str) -> None:
    """Without it a power failure can undo a rename. Windows and some network folders have no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
