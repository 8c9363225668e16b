"""What someone who converts should know and may well have meant: said in a sentence, never refused."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..loaders.branch import Branch
from ..loaders.branches import branch_of_name
from ..loaders.errors import counted
from ..loaders.policy import linears_worth_quantizing
from . import neighbours
from .recipe import branch_of_recipe
from .request import INT8_SUFFIX, Part

# Names that stand together under the diffusers library's names alone. ComfyUI renames such weights while loading: see
# `host/model.py`. Qwen-Image's own names have the first, but not the second.
_DIFFUSERS = (
    ("transformer_blocks.0.attn.add_q_proj.weight", "context_embedder.weight"),  # Flux, Stable Diffusion 3
    ("joint_transformer_blocks.0.attn.add_k_proj.weight",),  # AuraFlow
    ("noise_refiner.0.attention.to_k.weight",),  # Z-Image
    ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"),  # PixArt
)
# A U-Net's, which ComfyUI renames without joining.
_DIFFUSERS_UNET = "down_blocks.0.resnets.0.conv1.weight"
# With the byte that ends it, what GGML's own reader has room for.
_GGML_NAME_BYTES = 64


def remarks(parts: Sequence[Part]) -> list[str]:
    """Sentences about the branches to convert."""
    branches = [part.branch for part in parts]
    found = [_quantized(path, [each for each in branches if each.path == path]) for path in _paths(branches)]
    found += map(_diffusers, branches)
    found += map(_diffusers_unet, parts)
    found += map(_left_alone, parts)
    found.append(_long_name(parts))
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


def _diffusers_unet(part: Part) -> str | None:
    if _DIFFUSERS_UNET not in part.branch.weights or not _becomes_int8(part):
        return None
    return (
        f"{os.path.basename(part.branch.path)} has the names of the diffusers library, such as {_DIFFUSERS_UNET}: "
        "ComfyUI's own loader drops the scales of an INT8 file with such names and computes noise, without an error. "
        "Load the result with Load Diffusion Model (INT8), or convert the file with the names of the model's original "
        "release."
    )


def _left_alone(part: Part) -> str | None:
    worth_quantizing = frozenset(linears_worth_quantizing(part.branch.weights)) - part.protected
    found = neighbours.unknown(part.branch.weights, worth_quantizing) if _becomes_int8(part) else {}
    if not found:
        return None
    layers = f"{counted(len(found), 'layer')} {'stays' if len(found) == 1 else 'stay'} unquantized"
    key = next(iter(found.values()))
    return (
        f"{os.path.basename(part.branch.path)}: {layers}: nothing is known of what lies beside a weight, such as {key}."
    )


def _becomes_int8(part: Part) -> bool:
    return part.target.endswith(INT8_SUFFIX)


def _long_name(parts: Sequence[Part]) -> str | None:
    names = (part.prefix + key for part in parts if not _becomes_int8(part) for key in part.branch.weights)
    long = next((name for name in names if len(name.encode()) >= _GGML_NAME_BYTES), None)
    if long is None:
        return None
    return (
        f"{long}: GGML's own reader refuses a file with names of {_GGML_NAME_BYTES} bytes and more. ComfyUI's loaders "
        "read it."
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
