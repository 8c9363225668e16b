"""Which weight sets a file holds: one branch, or a conditional and an unconditional one under prefixes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TypeVar

from .errors import TAKE_ANOTHER, CheckpointError, counted
from .ideogram4 import TEXT_ONLY_MODULES

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
ONLY = "only"
BRANCHES = (CONDITIONAL, UNCONDITIONAL)

# The prefixes that two-branch files use, conditional first.
BRANCH_PREFIXES = (("conditional.", "unconditional."), ("cond.", "uncond."))

# Prefixes that exporters put before every key of a diffusion model, and how many keys may begin so without meaning it.
# All but the second are the host's too (`unet_prefix_from_state_dict` of comfy.model_detection), where the prefix of
# most keys wins; here the first of these does, which is the same for every known file.
MODEL_PREFIXES = {"model.diffusion_model.": 0, "diffusion_model.": 0, "model.model.": 5, "net.": 5, "model.": 0}
# How a U-Net of SDXL's kind was trained: the host reads these beside the model, whose keys have the prefix.
SAMPLING_KEYS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

T = TypeVar("T")


def split_branches(path: str | os.PathLike, tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors by branch: under `conditional` and `unconditional`, or `only` when the file names no branches.

    Keys come without branch and model prefixes; what lies beside the diffusion model of an all-in-one checkpoint, a
    text encoder or a VAE, is left out. Raises CheckpointError when a file with both branches has tensors
    outside them, or when one of them lacks modules that the other has.
    """
    tensors, found = strip_model_prefix(tensors), {}
    for prefixes in BRANCH_PREFIXES:
        for branch, prefix in zip(BRANCHES, prefixes, strict=True):
            keys = [key for key in tensors if key.startswith(prefix)]
            if keys:
                found[branch] = {key[len(prefix) :]: tensors[key] for key in keys}
        if found:
            break
    if not found:
        return {ONLY: tensors}
    outside = len(tensors) - sum(len(branch) for branch in found.values())
    if outside and len(found) == 1:
        return {ONLY: tensors}  # a model with a module that happens to be called `cond`
    if outside:
        raise CheckpointError(
            path,
            found=f"two branches and {counted(outside, 'tensor')} that belong to neither",
            expected="every tensor under a branch prefix such as `conditional.` and `unconditional.`",
            todo=f"The file was put together wrongly: {TAKE_ANOTHER}",
        )
    found = {name: strip_model_prefix(branch) for name, branch in found.items()}
    if len(found) == 2:
        _check_same_modules(path, found)
    return found


def strip_model_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors under the first of MODEL_PREFIXES that enough keys have, without it, and those of SAMPLING_KEYS; all
    tensors when there is none.

    Beside such keys lie the other models of an all-in-one checkpoint.
    """
    for prefix, stray in MODEL_PREFIXES.items():
        stripped = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if len(stripped) > stray:
            return stripped | {key: tensors[key] for key in SAMPLING_KEYS if key in tensors}
    return dict(tensors)


def strip_prefix_of_name(name: str) -> str:
    """A module's name without the model prefix that it may have."""
    prefix = next((prefix for prefix in MODEL_PREFIXES if name.startswith(prefix)), "")
    return name[len(prefix) :]


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
                todo=f"The file is incomplete: {TAKE_ANOTHER}",
            )
