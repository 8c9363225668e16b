"""A file that is there under its name only when it is whole: written under a temporary name beside it, then renamed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable

import torch

from .progress import size_text

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


def check_targets(targets: Iterable[str], sources: Iterable[str], overwrite: bool, make_folder: bool = False) -> None:
    """Refuse, before anything takes time, targets that exist, are read from, or lie in no folder that takes files.

    make_folder: a folder that can be made is as good as one that is there. Raises ValueError, and RuntimeError where
    nothing may be written.
    """
    sources = [source for source in sources if os.path.exists(source)]
    for target in targets:
        folder = os.path.dirname(os.path.abspath(target))
        existing = _existing(folder) if make_folder else folder
        if not os.path.isdir(existing):
            raise ValueError(f"{target}: there is no folder {folder}. Make it, or pick another one.")
        if os.path.isdir(target):
            raise ValueError(f"{target}: found a folder, expected the name of a file to write.")
        _check_writable(target, existing)
        if not os.path.exists(target):
            continue
        # Not by their names: some file systems know a file by many spellings.
        if any(os.path.samefile(target, source) for source in sources):
            raise ValueError(f"{target}: is read itself and cannot be the result: pick another name.")
        if not overwrite:
            raise _exists(target)


def check_space(folder: str, size_bytes: int) -> None:
    """Refuse what the disk has no room for. A file that will be replaced still takes its room until the end."""
    free_bytes = shutil.disk_usage(_existing(folder)).free
    if free_bytes < size_bytes:
        raise RuntimeError(
            f"{folder}: found {size_text(free_bytes)} of free disk space, expected {size_text(size_bytes)} for what "
            "would be written. Free some space, or write to another disk."
        )


def _check_writable(target: str, folder: str) -> None:
    """By writing: rights, read-only disks and network folders answer nothing else truthfully."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(target, error) from error


def _existing(folder: str) -> str:
    """The folder, or what of its path there is."""
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return folder


class OutputFile:
    """A file being written: `finish` completes it, `commit` puts it under its name. A `with` block that is left by an
    error, or without `commit`, leaves nothing.

    Only a process that is killed leaves its temporary file, `<name>.<random>.partial`, which nobody takes for a model.
    """

    def __init__(self, path: str, overwrite: bool = False):
        self.path, self._overwrite = path, overwrite
        self._temporary = f"{path}.{secrets.token_hex(4)}.partial"
        self._file, self._is_committed = None, False

    def __enter__(self) -> OutputFile:
        try:
            # Not tempfile: its files are readable by their owner alone.
            self._file = open(self._temporary, "xb", buffering=0)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        return self

    def __exit__(self, exception_type, *exception) -> None:
        if self._is_committed and exception_type is None:
            return
        # The file is thrown away, so what closing it could not write is of no interest; the error on its way is.
        with contextlib.suppress(OSError):
            self._file.close()
        left = self.path if self._is_committed else self._temporary
        try:
            os.unlink(left)
        except OSError as error:
            logger.warning("Lowbit: %s stays behind (%s). Delete it.", left, error.strerror)

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

    def finish(self, size_bytes: int) -> None:
        """Give the file its size, wait until the disk has it, and refuse a name that was taken meanwhile."""
        try:
            self._file.truncate(size_bytes)
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error
        if os.path.exists(self.path) and not self._overwrite:
            raise _exists(self.path)

    def commit(self) -> None:
        """Put the finished file under its name."""
        try:
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._failed(error) from error
        self._is_committed = True
        _sync_folder(os.path.dirname(os.path.abspath(self.path)))

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


def _not_writable(path: str, error: OSError) -> RuntimeError:
    return RuntimeError(f"{path}: cannot be written ({error.strerror}). Pick a folder that you may write to.")


def _exists(path: str) -> ValueError:
    return ValueError(f"{path}: exists already. Pick another name, or allow overwriting (--overwrite).")


def _sync_folder(folder: str) -> None:
    """Without it a power failure can undo a rename. Windows and some network folders have no such call; the file is
    whole and under its name either way."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.info("Lowbit: %s: the folder cannot be synchronized with the disk (%s)", folder, error.strerror)
