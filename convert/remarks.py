"""What someone who converts should know and may well have meant: said in a sentence, never refused."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..loaders.branch import Branch
from ..loaders.branches import branch_of_name
from .recipe import branch_of_recipe
from .request import Part

# Names that stand together under the diffusers library's names alone. ComfyUI renames such weights while loading: see
# `host/model.py`. Qwen-Image's own names have the first, but not the second.
_DIFFUSERS = (
    ("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),  # Flux, Stable Diffusion 3
    ("joint_transformer_blocks.0.attn.add_k_proj.weight",),  # AuraFlow
    ("noise_refiner.0.attention.to_k.weight",),  # Z-Image
    ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"),  # PixArt
)


def remarks(parts: Sequence[Part]) -> list[str]:
    """Sentences about the branches to convert."""
    branches = [part.branch for part in parts]
    found = [_quantized(path, [each for each in branches if each.path == path]) for path in _paths(branches)]
    found += map(_diffusers, branches)
    if len(_paths(branches)) == 2:
        found += map(_swapped, branches)
    return [remark for remark in found if remark is not None]


def _paths(branches: Sequence[Branch]) -> list[str]:
    return list(dict.fromkeys(branch.path for branch in branches))


def _quantized(path: str, branches: Sequence[Branch]) -> str | None:
    formats = set().union(*(branch.quantized_formats() for branch in branches))
    if not formats:
        return None
    return (
        f"{os.path.basename(path)} is quantized already ({', '.join(sorted(formats))}): its errors stay, and a change "
        "of format adds to them. Convert the BF16, FP16 or FP8 original if you have it."
    )


def _diffusers(branch: Branch) -> str | None:
    names = next((names for names in _DIFFUSERS if all(name in branch.weights for name in names)), None)
    if names is None:
        return None
    return (
        f"{os.path.basename(branch.path)} has the names of the diffusers library, such as {names[0]}: ComfyUI renames "
        "and joins such weights while loading, which quantized ones do not allow, so it will not load what becomes of "
        "them. Convert the file with the names of the model's original release."
    )


def _swapped(branch: Branch) -> str | None:
    """What its own metadata says goes before its name."""
    said_by_metadata = branch_of_recipe(branch.metadata)
    said = said_by_metadata or branch_of_name(branch.path)
    if said in (None, branch.name):
        return None
    return (
        f"{os.path.basename(branch.path)} is converted as the {branch.name} branch, but its "
        f"{'metadata' if said_by_metadata else 'name'} says that it is the {said} one. Are the two files swapped?"
    )
