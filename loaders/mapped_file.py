"""A file mapped into memory: tensors are views on it, so opening 20 GB reads nothing but the header.

Pages come from disk when touched, and the file never changes. On Linux and macOS the mapping is private and
copy-on-write. On Windows it is read-only, because a copy-on-write mapping counts as a whole against memory and paging
file there: a tensor must not be written to in place, which would end the process. Copy it first.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import sys
import warnings

import torch

from .errors import CheckpointError, counted, printable

# Linux counts a writable private mapping against memory and swap, and refuses a file larger than both, unless this flag
# says otherwise. The mmap module names it only since Python 3.13.
_LINUX_NORESERVE = 0x4000
_FILE = "a readable file"
_PICK = "Pick an existing file, or refresh the list if it was moved."


class MappedFile:
    """A read-only file as memory. `tensor` is the only place where views are made: subclasses extend it there."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.size_bytes = self._checked_size()
        try:
            with open(self.path, "rb") as file:
                self._mapping = _map_private(file.fileno(), self.size_bytes)
                self._opened(file.fileno())
        except PermissionError as error:
            raise self._denied() from error
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(
                self.path,
                found=f"that the system cannot map its {self.size_bytes:,} bytes ({_reason(error)})",
                expected="a file that can be mapped into memory",
                todo="Close other programs or enlarge the paging file; copy a file on a network to a local disk.",
            ) from error
        self._view = memoryview(self._mapping)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of some bytes: for headers."""
        return bytes(self._slice(offset, size_bytes))

    def tensor(self, offset: int, size_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A view on the file with a storage of its own, which keeps the mapping alive.

        Nothing is copied, except where the bytes are not aligned for the dtype. A tensor without elements is a new one.
        Not to be written to in place: see above.
        """
        data = self._slice(offset, size_bytes)
        if size_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # the mapping starts on a page, so the offset decides
            data = bytearray(data)
        # frombuffer keeps the slice alive, and a live slice keeps the mapping from being closed. Handing it the mapping
        # itself would keep only the object: a closed mapping under a live tensor crashes the process.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        """Let the file go. While a view lives, the mapping stays and goes with the last one."""
        self._view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def _opened(self, file_number: int) -> None:
        """For subclasses that also read the file: the number is of the very file that is mapped, and soon closed."""

    def _slice(self, offset: int, size_bytes: int) -> memoryview:
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise CheckpointError(
                self.path,
                found=f"a file of {counted(self.size_bytes, 'byte')}",
                expected=f"{counted(size_bytes, 'byte')} at position {offset:,}",
                todo="The file is damaged or its download is incomplete: download it again.",
            )
        return self._view[offset : offset + size_bytes]

    def _checked_size(self) -> int:
        try:
            status = os.stat(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(self.path, found="no such file", expected=_FILE, todo=_PICK) from error
        except PermissionError as error:
            raise self._denied() from error
        except (OSError, ValueError) as error:  # a name too long, or with a zero byte
            raise CheckpointError(
                self.path, found=f"a path the system refuses ({_reason(error)})", expected=_FILE, todo=_PICK
            ) from error
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(self.path, found="a folder", expected=_FILE, todo="Pick a file inside the folder.")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise CheckpointError(self.path, found="a device or pipe", expected="an ordinary file", todo=_PICK)
        if status.st_size == 0:
            raise CheckpointError(
                self.path,
                found="an empty file (0 bytes)",
                expected="a checkpoint",
                todo="The download did not start or was cut off: download it again.",
            )
        return status.st_size

    def _denied(self) -> CheckpointError:
        return CheckpointError(
            self.path,
            found="that the system denies reading it (permission denied)",
            expected=_FILE,
            todo="Give the user that runs ComfyUI the right to read it, or close the program that holds it.",
        )


def _map_private(file_number: int, size_bytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(file_number, size_bytes, access=mmap.ACCESS_READ)
    if sys.platform == "linux":
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", _LINUX_NORESERVE)
        return mmap.mmap(file_number, size_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file_number, size_bytes, access=mmap.ACCESS_COPY)


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or str(error))
