"""One branch of a checkpoint as a state dict of plain and quantized tensors: all that a model needs, or an error."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable

from ..formats import Fp8Weight, QuantizedWeight
from . import ideogram4, open_checkpoint
from .base_checkpoint import merge_base, needs_base
from .branches import CONDITIONAL, ONLY, UNCONDITIONAL, branch_of_name, split_branches
from .checkpoint import CheckpointFile
from .errors import CheckpointError
from .flattened import restore_dimensions
from .mapped_file import MappedFile
from .markers import markers_of_gguf, markers_of_metadata
from .safetensors_int8 import Weights, read_weights

logger = logging.getLogger(__name__)

OpenFile = Callable[..., MappedFile]


@dataclasses.dataclass(frozen=True)
class Branch:
    """The weights of one branch by state-dict key, without prefixes; metadata is the file's."""

    path: str
    name: str
    weights: Weights
    metadata: dict[str, object]

    def quantized_formats(self) -> set[str]:
        """What the file itself quantized, by `format_name`. FP8 is a source to quantize from, as models are published
        in it."""
        quantized = (weight for weight in self.weights.values() if isinstance(weight, QuantizedWeight))
        return {weight.format_name for weight in quantized if not isinstance(weight, Fp8Weight)}


class BranchedCheckpoint:
    """An opened checkpoint and its branches. All that is loaded from it lies on one mapping of the file.

    names: of the branches, `conditional` and `unconditional`, or `only` for a file that names none.
    """

    def __init__(self, file: CheckpointFile, open_file: OpenFile = MappedFile):
        self.path = file.path
        self._file, self._open_file = file, open_file
        # By branch: the keys without prefixes, and the keys as the file stores them.
        self._keys = split_branches(file.path, {key: key for key in file.tensors})
        self.names = tuple(self._keys)

    @property
    def is_ideogram4(self) -> bool:
        return ideogram4.is_ideogram4(next(iter(self._keys.values())))

    def unconditional_source(self) -> str | None:
        """Where `same file` takes the negative model from: None for a model with one weight set.

        Raises CheckpointError for a one-branch Ideogram 4, whose two weight sets lie in two files.
        """
        if UNCONDITIONAL in self.names:
            return UNCONDITIONAL
        if ONLY in self.names and not self.is_ideogram4:
            return None
        named = branch_of_name(self.path) if ONLY in self.names else CONDITIONAL
        raise CheckpointError(
            self.path,
            found="one branch alone" + (f" (going by the names, the {named} one)" if named else ""),
            expected="both branches in the same file",
            todo="Pick the file of the unconditional branch, or `none` to use this one for both.",
        )

    def needs_base(self, branch: str) -> bool:
        """Whether a base checkpoint has to supply norms and embeddings of this branch. Reads the header alone."""
        tensors = {key: self._file.tensors[stored] for key, stored in self._keys_of(branch).items()}
        return self._file.container != "gguf" and needs_base(tensors)

    def load(self, branch: str = CONDITIONAL, base_path: str | os.PathLike | None = None) -> Branch:
        """Read one branch. The tensors are views on the mapped file.

        branch: `conditional` or `unconditional`; a one-branch file gives its only branch for either. base_path: the
        checkpoint that supplies what an incomplete INT8 layout lacks. Raises CheckpointError.
        """
        base = self._base(branch, base_path)
        weights, metadata = self._weights(branch), dict(self._file.metadata)
        if base is not None:
            weights, note = merge_base(self.path, weights, base.path, base._weights(branch))
            metadata = base._file.metadata | metadata
            logger.info("Lowbit: %s (%s): %s", os.path.basename(self.path), branch, note)
        restore_dimensions(weights)
        return Branch(self.path, branch, weights, metadata)

    def _base(self, branch: str, base_path: str | os.PathLike | None) -> BranchedCheckpoint | None:
        """The opened base checkpoint of a branch that needs one, else None."""
        incomplete = self.needs_base(branch)
        if base_path is None:
            if incomplete:
                raise CheckpointError(
                    self.path,
                    found="only linear layers, without norms and embeddings",
                    expected=f"a base checkpoint that supplies them for the {branch} branch",
                    todo=f"Pick the FP8 or BF16 release of this branch as {_base_input(branch)}.",
                )
            return None
        base = open_branches(base_path, self._open_file)
        if not incomplete:
            names = os.path.basename(self.path), os.path.basename(base.path)
            logger.warning("Lowbit: %s is complete: the base checkpoint %s is ignored.", *names)
            return None
        if base.needs_base(branch):
            raise CheckpointError(
                base.path,
                found="a base checkpoint of linear layers alone, without norms and embeddings, as in the file that "
                "needs them",
                expected=f"a whole model for the {branch} branch",
                todo=f"Pick the FP8 or BF16 release of this branch as {_base_input(branch)}.",
            )
        return base

    def _keys_of(self, branch: str) -> dict[str, str]:
        keys = self._keys.get(branch, self._keys.get(ONLY))
        if keys is None:
            raise CheckpointError(
                self.path,
                found=f"only the {self.names[0]} branch",
                expected=f"the {branch} branch",
                todo=f"Pick a file that holds the {branch} branch.",
            )
        return keys

    def _weights(self, branch: str) -> Weights:
        file, keys = self._file, self._keys_of(branch)
        tensors = {key: file.tensors[stored].load() for key, stored in keys.items()}
        if file.container == "gguf":
            markers = markers_of_gguf(file.path, file.metadata, keys, tensors)
        else:
            markers = markers_of_metadata(file.path, file.metadata, keys, file.tensors)
        return read_weights(file.path, tensors, markers)


def open_branches(path: str | os.PathLike, open_file: OpenFile = MappedFile) -> BranchedCheckpoint:
    """Open a checkpoint, reading its header, and tell its branches apart. Raises CheckpointError."""
    return BranchedCheckpoint(open_checkpoint(path, open_file), open_file)


def load_branch(
    path: str | os.PathLike,
    branch: str = CONDITIONAL,
    base_path: str | os.PathLike | None = None,
    open_file: OpenFile = MappedFile,
) -> Branch:
    """`open_branches(...).load(...)`, for one branch alone."""
    return open_branches(path, open_file).load(branch, base_path)


def _base_input(branch: str) -> str:
    """The loader node's input for the base checkpoint of a branch."""
    return "base_checkpoint" if branch == CONDITIONAL else f"base_checkpoint_{branch}"
