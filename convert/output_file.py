"""A file that is there under its name only when it is whole: written under a temporary name beside it, then renamed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence

import torch

from .progress import size_text

logger = logging.getLogger(__name__)

# The ending of a file that waits whether it is needed again.
_PREVIOUS = "previous"
FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
WINDOWS = os.name == "nt"
NOT_IN_NAMES_ON_WINDOWS = frozenset('<>:"|?*')
# The second is what Windows answers to a path of more than 260 characters, in a folder that is there.
LONG_NAME = (errno.ENAMETOOLONG, errno.ENOENT)


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
        if WINDOWS and (wrong := NOT_IN_NAMES_ON_WINDOWS & set(os.path.basename(target))):
            # A colon would name a part of another file, which can be written but not renamed.
            raise ValueError(f"{target}: found {' '.join(sorted(wrong))} in the name, which Windows does not take.")
        _check_writable(target, existing)
        if not os.path.lexists(target):
            continue
        # Not by their names: some file systems know a file by many spellings. A link may lead to nothing.
        if os.path.exists(target) and any(os.path.samefile(target, source) for source in sources):
            raise ValueError(f"{target}: is read itself and cannot be the result: pick another name.")
        if not overwrite:
            raise _exists(target)
        if WINDOWS:
            try:
                os.rename(target, target)  # refused for a file that a program has open, as replacing it would be
            except OSError as error:
                raise _in_use(target, error) from error


def check_space(folder: str, size_bytes: int) -> None:
    """Refuse what the disk has no room for. A file that will be replaced still takes its room until the end."""
    free_bytes = shutil.disk_usage(_existing(folder)).free
    if free_bytes < size_bytes:
        raise RuntimeError(
            f"{folder}: found {size_text(free_bytes)} of free disk space, expected {size_text(size_bytes)} for what "
            "would be written. Free some space, or write to another disk."
        )


def _check_writable(target: str, folder: str) -> None:
    """By writing: rights, read-only disks, network folders and limits on names answer nothing else truthfully."""
    probe = _beside(os.path.join(folder, os.path.basename(target)), _PREVIOUS)  # the longest name that is needed
    try:
        open(probe, "xb").close()
        os.unlink(probe)
    except OSError as error:
        if error.errno in LONG_NAME:
            raise ValueError(
                f"{target}: the name is too long for the endings that it has while the file is written. Pick a shorter "
                "name."
            ) from error
        raise _not_writable(target, error) from error


def _beside(path: str, ending: str) -> str:
    """A name in the folder of a file that nothing has yet, and that nobody takes for a model."""
    return f"{path}.{secrets.token_hex(4)}.{ending}"


def _existing(folder: str) -> str:
    """The folder, or what of its path there is."""
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return folder


class OutputFile:
    """A file being written: `finish` completes it, `commit` puts it under its name. A `with` block that is left by an
    error, or without `commit`, leaves what was there before.

    Only a process that is killed leaves its temporary file, `<name>.<random>.partial`, which nobody takes for a model.
    """

    def __init__(self, path: str, overwrite: bool = False):
        self.path, self._overwrite = path, overwrite
        self._temporary = _beside(path, "partial")
        # Where the file that was under the name is, as long as it may have to come back.
        self._previous: str | None = None
        self._file, self._is_renamed, self._is_committed = None, False, False

    def __enter__(self) -> OutputFile:
        try:
            # Not tempfile: its files are readable by their owner alone.
            self._file = open(self._temporary, "xb", buffering=0)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        return self

    def __exit__(self, *exception) -> None:
        if self._is_committed:
            return
        # The file is thrown away, so what closing it could not write is of no interest; the error on its way is.
        with contextlib.suppress(OSError):
            self._file.close()
        has_previous = self._previous is not None and os.path.lexists(self._previous)
        if not self._is_renamed:
            _delete(self._temporary)
        elif not has_previous:
            _delete(self.path)
        if has_previous:
            try:
                os.replace(self._previous, self.path)
            except OSError as error:
                logger.warning(
                    "Lowbit: what was %s is now %s and could not be put back (%s). Rename it.",
                    self.path, self._previous, error.strerror,
                )  # fmt: skip

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
        if os.path.lexists(self.path) and not self._overwrite:
            raise _exists(self.path)

    def commit(self) -> None:
        """Put the finished file under its name, in one step: at any moment the old file or the new one is there."""
        commit_together([self])

    def rename(self, keep_previous: bool = False) -> None:
        """Give the finished file its name. keep_previous: what had the name is there under another one, until
        `settle`."""
        try:
            if keep_previous and os.path.lexists(self.path):
                self._previous = _beside(self.path, _PREVIOUS)
                os.rename(self.path, self._previous)
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._failed(error) from error
        self._is_renamed = True

    def settle(self) -> None:
        """Nothing takes the file back any more."""
        self._is_committed = True

    def forget_previous(self) -> None:
        """Delete what the file replaced."""
        if self._previous is not None:
            _delete(self._previous)

    def _failed(self, error: OSError) -> RuntimeError:
        if error.errno in FULL_DISK:
            return RuntimeError(
                f"{self.path}: the disk is full, or does not take files of this size ({error.strerror}). Nothing was "
                "kept: free some space, or write to another disk."
            )
        return _in_use(self.path, error)


def commit_together(files: Sequence[OutputFile]) -> None:
    """Put finished files under their names. Where this raises, their `with` blocks put back what was there before.

    The last file needs no way back: once it has its name, all have. So a single file replaces an older one in one
    step. A process that is killed between the steps leaves of two files, in this order:

    - the first under no name, the old one as `<name>.<random>.previous`, both new ones as `.partial`
    - the first new, the second old: the old first one as `.previous`, the new second one as `.partial`
    - both new, and the old first one as `.previous`

    so that by renaming either pair can be had.
    """
    for file in files[:-1]:
        file.rename(keep_previous=True)
    files[-1].rename()
    for file in files:  # before what takes time: whoever interrupts that finds both files new
        file.settle()
    for folder in dict.fromkeys(os.path.dirname(os.path.abspath(file.path)) for file in files):
        _sync_folder(folder)
    for file in files:
        file.forget_previous()


def _delete(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        logger.warning("Lowbit: %s stays behind (%s). Delete it.", path, error.strerror)


def _not_writable(path: str, error: OSError) -> RuntimeError:
    return RuntimeError(f"{path}: cannot be written ({error.strerror}). Pick a folder that you may write to.")


def _in_use(path: str, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"{path}: cannot be written ({error.strerror}). If the file is in use, let go of it with Unload Models and "
        "Execution Cache, or pick another name."
    )


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
