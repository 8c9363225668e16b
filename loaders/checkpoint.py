"""What every container gives: named tensors with shape, type and place in a mapped file; `load` makes the view."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..formats.ggml import GgmlWeight, row_size_bytes
from .errors import CheckpointError, counted, quoted
from .mapped_file import MappedFile

# Bounds far above every known model: the objects built from a hostile header stay within a few times its size.
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 256
MAX_DIMS = 8
MAX_ELEMENTS = 2**60
METADATA_BUDGET_BYTES = 16 * 2**20
# A tensor beyond the end that starts this far behind its predecessor was not cut off: its offset is wrong.
_MAX_GAP_BYTES = 2**20

DAMAGED = "The file is damaged or was written by a faulty program: download it again, or ask who made it."


@dataclasses.dataclass(frozen=True)
class Omitted:
    """A metadata value left in the file because of its size (a tokenizer, a preview picture): its kind and length."""

    kind: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: where its bytes are and what they mean.

    shape: logical shape, `(N, K)` for the weight of a linear layer.
    dtype: of a plain tensor, None for a quantized one.
    ggml_type: name of the storage type of a quantized tensor (`Q4_K`), None for a plain one.
    stored_shape: of its rows in the file. It differs from `shape` only where a converter cut rows that are no whole
        blocks (the kernel of a convolution) differently.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    ggml_type: str | None
    size_bytes: int
    offset: int
    stored_shape: tuple[int, ...] = dataclasses.field(repr=False)
    file: MappedFile = dataclasses.field(repr=False, compare=False)

    def load(self) -> torch.Tensor | GgmlWeight:
        """The tensor, or the quantized weight, as a view on the mapped file.

        Logical rows that are no whole blocks fit no quantized weight: such a tensor comes unpacked, as float16.
        """
        if self.ggml_type is None:
            return self.file.tensor(self.offset, self.size_bytes, self.dtype, self.shape)
        view_shape = (*self.stored_shape[:-1], row_size_bytes(self.ggml_type, self.stored_shape[-1]))
        data = self.file.tensor(self.offset, self.size_bytes, torch.uint8, view_shape)
        weight = GgmlWeight(data, self.stored_shape, self.ggml_type)
        return weight if self.stored_shape == self.shape else weight.dequantize(torch.float16).view(self.shape)


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """An opened checkpoint: its metadata, and its tensors in the order of the header.

    container: `safetensors` or `gguf`.
    """

    path: str
    container: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class MetadataBudget:
    """How much memory metadata may still take; a value that does not fit is left in the file."""

    def __init__(self) -> None:
        self._left_bytes = METADATA_BUDGET_BYTES

    def take(self, size_bytes: int) -> bool:
        if size_bytes > self._left_bytes:
            return False
        self._left_bytes -= size_bytes
        return True


def damaged(file: MappedFile, found: str, expected: str) -> CheckpointError:
    """The error for content that no correct program writes."""
    return CheckpointError(file.path, found=found, expected=expected, todo=DAMAGED)


def check_tensor_count(file: MappedFile, count: int) -> None:
    if count == 0:
        raise CheckpointError(
            file.path, found="no tensors", expected="the weights of a model", todo="Pick the file that holds the model."
        )
    if count > MAX_TENSORS:
        raise damaged(file, counted(count, "tensor"), f"at most {MAX_TENSORS:,}")


def check_name(file: MappedFile, name: str) -> None:
    if not name:
        raise damaged(file, "a tensor without a name", "a name for each tensor")
    if len(name) > MAX_NAME_BYTES:
        raise damaged(file, f"a tensor name of {len(name):,} characters", f"names of at most {MAX_NAME_BYTES}")


def element_count(file: MappedFile, name: str, shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape, refusing shapes that no tensor can have."""
    if len(shape) > MAX_DIMS:
        raise damaged(file, f"{len(shape)} dimensions in the tensor {quoted(name)}", f"at most {MAX_DIMS}")
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise damaged(file, f"the impossible shape {quoted(list(shape))} in the tensor {quoted(name)}", "a real shape")
    return math.prod(shape)


def check_ranges(file: MappedFile, data_start: int, tensors: dict[str, StoredTensor]) -> None:
    """Refuse tensors that overlap or reach beyond the end of the file."""
    end, previous = data_start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.size_bytes and tensor.offset < end:
            raise damaged(
                file,
                f"that the tensors {quoted(previous)} and {quoted(tensor.name)} overlap",
                "bytes of its own for each tensor",
            )
        tensor_end = tensor.offset + tensor.size_bytes
        if tensor_end > file.size_bytes and tensor.offset > end + _MAX_GAP_BYTES:
            raise damaged(
                file,
                f"that the tensor {quoted(tensor.name)} starts at byte {tensor.offset:,}",
                f"all tensors within the {counted(file.size_bytes, 'byte')} of the file",
            )
        if tensor_end > end:
            end, previous = tensor_end, tensor.name
    if end > file.size_bytes:
        raise incomplete(file, end)


def incomplete(file: MappedFile, needed_bytes: int) -> CheckpointError:
    """The error for a file that ends before what its header announces."""
    return CheckpointError(
        file.path,
        found=f"{file.size_bytes:,} of {needed_bytes:,} bytes",
        expected="the whole file",
        todo="The download is incomplete: download the file again.",
    )
