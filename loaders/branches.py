"""Which weight sets a file holds: one branch, or a conditional and an unconditional one under prefixes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TypeVar

from .errors import CheckpointError, counted
from .ideogram4 import TEXT_ONLY_MODULES

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
ONLY = "only"
BRANCHES = (CONDITIONAL, UNCONDITIONAL)

# The prefixes that two-branch files use, conditional first.
BRANCH_PREFIXES = (("conditional.", "unconditional."), ("cond.", "uncond."))

# Prefixes that exporters put before every key of a diffusion model. The host strips some of them itself; they are
# stripped here because a file is compared with its base checkpoint key by key.
MODEL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")

T = TypeVar("T")


def split_branches(path: str | os.PathLike, tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors by branch: under `conditional` and `unconditional`, or `only` when the file names no branches.

    Keys come without branch and model prefixes. Raises CheckpointError when a file with both branches has tensors
    outside them, or when one of them lacks modules that the other has.
    """
    found = {}
    for prefixes in BRANCH_PREFIXES:
        for branch, prefix in zip(BRANCHES, prefixes, strict=True):
            keys = [key for key in tensors if key.startswith(prefix)]
            if keys:
                found[branch] = {key[len(prefix) :]: tensors[key] for key in keys}
        if found:
            break
    if not found:
        return {ONLY: strip_model_prefix(tensors)}
    outside = len(tensors) - sum(len(branch) for branch in found.values())
    if outside and len(found) == 1:
        return {ONLY: strip_model_prefix(tensors)}  # a model with a module that happens to be called `cond`
    if outside:
        raise CheckpointError(
            path,
            found=f"two branches and {counted(outside, 'tensor')} that belong to neither",
            expected="every tensor under a branch prefix such as `conditional.` and `unconditional.`",
            todo="The file was put together wrongly; download it again or get it from another place.",
        )
    found = {name: strip_model_prefix(branch) for name, branch in found.items()}
    if len(found) == 2:
        _check_same_modules(path, found)
    return found


def strip_model_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors without a prefix that all keys share; keys are left alone when only some have it."""
    for prefix in MODEL_PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            return {key[len(prefix) :]: value for key, value in tensors.items()}
    return dict(tensors)


def branch_of_name(path: str | os.PathLike) -> str | None:
    """The branch that a one-branch file's name says it holds, or None when the name says nothing."""
    stem = os.path.splitext(os.path.basename(os.fspath(path)))[0].lower()
    if re.search(r"(^|[^a-z])uncond", stem):
        return UNCONDITIONAL
    return CONDITIONAL if re.search(r"(^|[^a-z])cond", stem) else None


def _check_same_modules(path: str | os.PathLike, branches: dict[str, dict[str, T]]) -> None:
    modules = {name: {key.rpartition(".")[0] for key in branch} for name, branch in branches.items()}
    for name, other in (BRANCHES, reversed(BRANCHES)):
        missing = sorted(modules[other] - modules[name])
        missing = [module for module in missing if name == CONDITIONAL or not module.startswith(TEXT_ONLY_MODULES)]
        if missing:
            raise CheckpointError(
                path,
                found=f"half a branch: the {name} one lacks {counted(len(missing), 'module')} of the {other} one, such "
                f"as {missing[0]}",
                expected="two branches with the same modules",
                todo="The file is incomplete; download it again or get it from another place.",
            )
