"""The one error of this folder: a file that cannot be loaded, told to the person who picked it."""

from __future__ import annotations

import os

# How a sentence about a file that cannot be mended ends.
TAKE_ANOTHER = "download the file again or take another quantization of the model."
TAKE_UNSPLIT = "Download the file that is not split, as ComfyUI itself needs it, or merge the parts."


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read: which file, what was found, what was expected, what to do.

    `found` and `expected` are phrases without a full stop, `todo` is a sentence.
    """

    def __init__(self, path: str | os.PathLike, *, found: str, expected: str, todo: str):
        self.path = printable(os.fspath(path))
        self.found, self.expected, self.todo = found, expected, todo
        name = os.path.basename(self.path.rstrip("/\\")) or self.path
        super().__init__(f"{name}: found {found}, expected {expected}. {todo} (File: {self.path})")


def printable(text: str | bytes) -> str:
    """`text` as something that every log and web page can show: undecodable parts become question marks."""
    text = os.fsdecode(text) if isinstance(text, bytes) else text
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def quoted(value: object, limit: int = 80) -> str:
    """A value from the file, quoted and cut: nothing a file holds can flood or break an error box."""
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return f"{value[:limit]!r}…"
    try:
        is_long = isinstance(value, int) and abs(value) >= 2**64
        text = f"a number of {value.bit_length()} bits" if is_long else repr(value)
    except (RecursionError, ValueError):  # nested without end, or with numbers of thousands of digits inside
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit + 2 else text[:limit] + "…"


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
