"""One branch of a checkpoint as a state dict of plain and quantized tensors: all that a model needs, or an error."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable

from . import ideogram4, open_checkpoint
from .branches import CONDITIONAL, ONLY, UNCONDITIONAL, branch_of_name, split_branches
from .checkpoint import CheckpointFile
from .errors import CheckpointError
from .mapped_file import MappedFile
from .safetensors_int8 import Weights, merge_base, needs_base, read_weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Branch:
    """The weights of one branch by state-dict key, without prefixes; metadata is the file's."""

    path: str
    name: str
    weights: Weights
    metadata: dict[str, object]


def load_branch(
    path: str | os.PathLike,
    branch: str = CONDITIONAL,
    base_path: str | os.PathLike | None = None,
    open_file: Callable[..., MappedFile] = MappedFile,
) -> Branch:
    """Read one branch. The tensors are views on the mapped file.

    branch: `conditional` or `unconditional`; a one-branch file gives its only branch for either. base_path: the
    checkpoint that supplies what an incomplete INT8 layout lacks. Raises CheckpointError.
    """
    path = os.fspath(path)
    weights, metadata, incomplete = _read(open_checkpoint(path, open_file), branch)
    if incomplete:
        if base_path is None:
            raise CheckpointError(
                path,
                found="only linear layers, without norms and embeddings",
                expected=f"a base checkpoint that supplies them for the {branch} branch",
                todo=f"Pick the FP8 or BF16 release of this branch as {_base_input(branch)}.",
            )
        base_path = os.fspath(base_path)
        base, base_metadata, _ = _read(open_checkpoint(base_path, open_file), branch)
        weights, note = merge_base(path, weights, base_path, base)
        metadata = base_metadata | metadata
        logger.info("Lowbit: %s (%s): %s", os.path.basename(path), branch, note)
    return Branch(path, branch, weights, metadata)


def unconditional_source(path: str | os.PathLike, open_file: Callable[..., MappedFile] = MappedFile) -> str | None:
    """Where `same file` takes the negative model from: the unconditional branch, or None for a model with one weight
    set.

    Raises CheckpointError for a one-branch Ideogram 4, whose two weight sets lie in two files.
    """
    branches = split_branches(path, open_checkpoint(path, open_file).tensors)
    if UNCONDITIONAL in branches:
        return UNCONDITIONAL
    if ONLY in branches and not ideogram4.is_ideogram4(branches[ONLY]):
        return None
    named = branch_of_name(path) if ONLY in branches else CONDITIONAL
    raise CheckpointError(
        path,
        found="one branch alone" + (f" (going by the names, the {named} one)" if named else ""),
        expected="both branches in the same file",
        todo="Pick the file of the unconditional branch, or `none` to use this one for both.",
    )


def _base_input(branch: str) -> str:
    """The loader node's input for the base checkpoint of a branch."""
    return "base_checkpoint" if branch == CONDITIONAL else f"base_checkpoint_{branch}"


def _read(checkpoint: CheckpointFile, branch: str) -> tuple[Weights, dict[str, object], bool]:
    """The weights of a branch, the file's metadata, and whether a base checkpoint has to supply the rest."""
    branches = split_branches(checkpoint.path, checkpoint.tensors)
    stored = branches.get(branch, branches.get(ONLY))
    if stored is None:
        raise CheckpointError(
            checkpoint.path,
            found=f"only the {next(iter(branches))} branch",
            expected=f"the {branch} branch",
            todo=f"Pick a file that holds the {branch} branch.",
        )
    tensors = {key: entry.load() for key, entry in stored.items()}
    metadata = dict(checkpoint.metadata)
    if checkpoint.container == "gguf":
        return tensors, metadata, False
    return read_weights(checkpoint.path, tensors, metadata), metadata, needs_base(tensors)
