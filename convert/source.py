"""The checkpoints that a conversion reads: opened by the loaders, read a few rows at a time, named by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping

import torch

from ..formats import QuantizedWeight
from ..loaders import CheckpointError, MappedFile
from ..loaders.branch import Branch, BranchedCheckpoint, open_branches
from ..loaders.branches import CONDITIONAL, UNCONDITIONAL
from ..loaders.file_state import file_state

# Elements that are in memory as float32 at a time, with a handful of temporaries.
CHUNK_ELEMENTS = 2**24
_HASHED_BYTES = 2**23


class SourceFile(MappedFile):
    """A mapped file that can be told that what was read so far is not needed any more."""

    def __init__(self, path: str | os.PathLike):
        self._state = file_state(path)
        super().__init__(path)

    def check_unchanged(self) -> None:
        """Raises RuntimeError when the file was written to or replaced since it was opened."""
        if file_state(self.path) != self._state:
            raise RuntimeError(
                f"{self.path} changed while it was converted: nothing was written. Convert it once it is complete."
            )

    def release(self) -> None:
        """Let the pages go that were read. Nothing writes to the mapping: they come back from the file if needed."""
        if sys.platform == "linux":
            self._mapping.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class Sources:
    """The branches to convert, one or two, and the files that they lie in, in the same order where there are two."""

    branches: tuple[Branch, ...]
    files: tuple[SourceFile, ...]

    def release(self) -> None:
        for file in self.files:
            file.release()

    def check_unchanged(self) -> None:
        """Raises RuntimeError when one of the files changed since it was opened: a result would be of neither."""
        for file in self.files:
            file.check_unchanged()


def open_sources(path: str, unconditional_path: str | None = None) -> Sources:
    """All branches of a file; with a second file the conditional branch of the first and the unconditional one of it.

    Raises CheckpointError for what cannot be read, and for a file of linear layers alone.
    """
    files: list[SourceFile] = []

    def open_file(path) -> SourceFile:
        files.append(SourceFile(path))
        return files[-1]

    checkpoint = open_branches(path, open_file)
    if unconditional_path is None:
        branches = tuple(_load(checkpoint, name) for name in checkpoint.names)
    else:
        if os.path.realpath(path) == os.path.realpath(unconditional_path):
            raise ValueError(
                f"unconditional: found {os.path.basename(path)} itself, expected the file of the other branch. Leave "
                "it out: all branches that a file holds are converted."
            )
        second = open_branches(unconditional_path, open_file)
        branches = (_load(checkpoint, CONDITIONAL), _load(second, UNCONDITIONAL))
        _check_pair(*branches)
    return Sources(branches, tuple(files))


def shared_count(weights: Mapping[str, object], others: Mapping[str, object]) -> int:
    """How many weights have the name and shape of one of the others."""
    return sum(name in others and tuple(w.shape) == tuple(others[name].shape) for name, w in weights.items())


def _check_pair(conditional: Branch, unconditional: Branch) -> None:
    """The second branch has the weights of the first, but for what only text needs."""
    shared = shared_count(unconditional.weights, conditional.weights)
    if 2 * shared < len(unconditional.weights):
        raise CheckpointError(
            unconditional.path,
            found=f"{shared} of {len(unconditional.weights)} weights as in {os.path.basename(conditional.path)}",
            expected="the unconditional branch of the same model",
            todo="Pick the other branch's file.",
        )


def _load(checkpoint: BranchedCheckpoint, branch: str) -> Branch:
    if checkpoint.needs_base(branch):
        raise CheckpointError(
            checkpoint.path,
            found="only linear layers, without norms and embeddings",
            expected="a whole model",
            todo="Convert the FP8 or BF16 release that the file was made from.",
        )
    return checkpoint.load(branch)


def file_hash(path: str, advance: Callable[[int], None] = lambda size_bytes: None) -> str:
    """The file's SHA-256, as `sha256sum` and model sites show it. `advance` hears of every part read, in bytes.

    Of the whole file: header and sizes alone are the same for every fine-tune of a model. It takes about a second a
    gigabyte, a small part of the conversion.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(_HASHED_BYTES):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and elements a row of a tensor of any shape: rows are along its last dimension."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def row_slices(shape: tuple[int, ...], elements: int | None = None) -> Iterator[slice]:
    """Slices that cover the rows, of at most so many elements each, and of CHUNK_ELEMENTS, or of one row."""
    rows, K = matrix_shape(shape)
    step = max(1, min(elements or CHUNK_ELEMENTS, CHUNK_ELEMENTS) // max(1, K))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def part_of(weight: torch.Tensor | QuantizedWeight, rows: slice, device: torch.device | str = "cpu"):
    """Some rows of a tensor or quantized weight as a matrix of the same kind, on a device."""
    count, K = matrix_shape(tuple(weight.shape))
    if isinstance(weight, torch.Tensor):
        return weight.reshape(count, K)[rows].to(device)
    fields = {name: tensor.to(device) for name, tensor in weight.tensors().items() if name != "data"}
    data = weight.data.reshape(count, -1)[rows]
    if getattr(weight, "per_channel", False):
        fields["scale"] = weight.scale[rows].to(device)
    return dataclasses.replace(weight, data=data.to(device), shape=(data.shape[0], K), **fields)


def floats_of(weight: torch.Tensor | QuantizedWeight, rows: slice, device: torch.device | str = "cpu") -> torch.Tensor:
    """Some rows as float32 [rows, K], a new tensor."""
    part = part_of(weight, rows, device)
    return part.dequantize() if isinstance(part, QuantizedWeight) else part.to(torch.float32, copy=True)
