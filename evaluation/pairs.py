"""Which branch of a quantized file is compared with which branch of its source."""

from __future__ import annotations

import dataclasses
import os

from ..convert.source import SourceFile, shared_count
from ..loaders import CheckpointError
from ..loaders.branch import Branch, BranchedCheckpoint, open_branches
from ..loaders.branches import CONDITIONAL, ONLY, UNCONDITIONAL, branch_of_name


@dataclasses.dataclass(frozen=True)
class Files:
    """What to compare: a quantized file and its source, each with all branches that it holds or with a second file for
    the unconditional branch."""

    quantized: str
    source: str
    quantized_unconditional: str | None = None
    source_unconditional: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A branch of the quantized file and the same one of the source, as views on the mapped files.

    name: of the branch, `only` where nothing says which it is. linears_only: whether the quantized file holds nothing
    else: the rest is then the source's own, which also tells how its smoothing factors read.
    """

    name: str
    quantized: Branch
    source: Branch
    linears_only: bool


def open_pairs(files: Files) -> tuple[list[Pair], list[SourceFile]]:
    """The branches to compare, and the open files. Raises ValueError with a sentence for the person who asked."""
    opened: list[SourceFile] = []

    def open_file(path) -> SourceFile:
        opened.append(SourceFile(path))
        return opened[-1]

    quantized = _branches(files.quantized, files.quantized_unconditional, open_file)
    source = _branches(files.source, files.source_unconditional, open_file)
    # A file that names no branch: its own name may, and beside one that does it is the conditional one.
    if ONLY in quantized:
        name = branch_of_name(files.quantized) or (ONLY if ONLY in source else CONDITIONAL)
        quantized, source = {name: quantized[ONLY]}, {name: source[ONLY]} if ONLY in source else source
    elif ONLY in source:
        source = {branch_of_name(files.source) or CONDITIONAL: source[ONLY]}
    if files.source_unconditional is not None and UNCONDITIONAL not in quantized:
        raise ValueError(
            f"unconditional source: found no unconditional branch in {os.path.basename(files.quantized)} to compare it "
            "with. Leave it out, or name the quantized file of that branch too."
        )
    pairs = []
    for name, checkpoint in quantized.items():
        if name not in source:
            raise CheckpointError(
                files.source,
                found=f"no {name} branch",
                expected=f"the branches of {os.path.basename(files.quantized)}: {', '.join(quantized)}",
                todo="Give the source of the other branch too, as the unconditional source.",
            )
        pairs.append(_pair(name, checkpoint, source[name]))
    return pairs, opened


def _branches(path: str, unconditional: str | None, open_file) -> dict[str, BranchedCheckpoint]:
    checkpoint = open_branches(path, open_file)
    if unconditional is None:
        return dict.fromkeys(checkpoint.names, checkpoint)
    return {CONDITIONAL: checkpoint, UNCONDITIONAL: open_branches(unconditional, open_file)}


def _pair(name: str, quantized: BranchedCheckpoint, source: BranchedCheckpoint) -> Pair:
    branch = CONDITIONAL if name == ONLY else name
    linears_only = quantized.needs_base(branch)
    loaded = quantized.load(branch, source.path if linears_only else None)
    pair = Pair(name, loaded, source.load(branch), linears_only)
    _check_same_model(pair)
    return pair


def _check_same_model(pair: Pair) -> None:
    """Refuses files of which hardly a weight could be compared. One that lacks weights of its source is another case:
    those that it has are the source's."""
    weights, others = pair.quantized.weights, pair.source.weights
    shared = shared_count(weights, others)
    if 4 * shared < min(len(weights), len(others)):
        name = os.path.basename(pair.source.path)
        raise CheckpointError(
            pair.quantized.path,
            found=f"{shared} of {len(weights)} weights with a name and shape that {name} has too",
            expected="nearly all",
            todo="It belongs to another model, or to this one under other names: pick the file that it was made from.",
        )
