"""Which file a path leads to, and whether it is still the same one."""

from __future__ import annotations

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class FileState:
    """Which file a path led to, and what the system says of it: enough to notice that it was replaced or written to."""

    path: str
    inode: int
    size_bytes: int
    modified_ns: int


def file_state(path: str | os.PathLike) -> FileState | None:
    """The state of a file, or None where there is none to be looked at: loading it will say why."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileState(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns)


def file_states(*paths: str | os.PathLike | None) -> tuple[FileState, ...]:
    """The states of the files that there are; None stands for no file."""
    states = (file_state(path) for path in paths if path is not None)
    return tuple(state for state in states if state is not None)
