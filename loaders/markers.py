"""Quantization markers: JSON about one module, as bytes in a tensor `comfy_quant` or by name in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch

from .branches import strip_prefix_of_name
from .errors import TAKE_ANOTHER, CheckpointError, quoted

METADATA_KEY = "_quantization_metadata"
GGUF_KEY = "comfy.gguf.quant."
# Real markers have some fifty bytes; parsed JSON takes many times its size in memory.
MAX_MARKER_BYTES = 2**16


def parse_marker(tensor: torch.Tensor) -> dict:
    """The marker in a `comfy_quant` tensor. Raises ValueError with what was found."""
    if tensor.dtype not in (torch.uint8, torch.int8) or tensor.dim() != 1 or tensor.numel() > MAX_MARKER_BYTES:
        shape = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"a quantization marker of {shape} instead of at most {MAX_MARKER_BYTES:,} bytes")
    try:
        marker = json.loads(tensor.view(torch.uint8).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a quantization marker that is no JSON ({quoted(str(error))})") from error
    if not isinstance(marker, dict):
        raise ValueError(f"the quantization marker {quoted(marker)}")
    return marker


def markers_of_metadata(
    path: str, metadata: Mapping[str, object], keys: Mapping[str, str], stored: Iterable[str]
) -> dict[str, dict]:
    """The markers in the file's metadata that belong to one branch, by the module's name without prefixes.

    keys: of the branch, without prefixes -> as stored. stored: all keys of the file. Markers are named like the stored
    modules; names without prefixes, or with another model prefix, are understood too. Markers that belong to no module
    at all are an error when no other fits this branch: its weights would be read as something that they are not.
    """
    layers = _layers(path, metadata)
    if not layers:
        return {}
    modules = {_module(key): _module(bare) for bare, key in keys.items()}
    names, stored_modules = set(modules.values()), {_module(key) for key in stored}
    exact, by_bare_name, stray = {}, {}, []
    for name, marker in layers.items():
        if name in modules:
            exact[modules[name]] = marker
        elif name in stored_modules:
            continue  # of the other branch, or of another model in the same file
        elif strip_prefix_of_name(name) in names:
            by_bare_name[strip_prefix_of_name(name)] = marker
        else:
            stray.append(name)
    found = by_bare_name | exact
    if stray and not found:
        raise CheckpointError(
            path,
            found=f"quantization metadata for modules such as {quoted(stray[0])}, which the file does not hold",
            expected="the names of its modules",
            todo=f"The file was put together wrongly: {TAKE_ANOTHER}",
        )
    if wrong := [name for name, marker in found.items() if not isinstance(marker, dict)]:
        raise _unreadable(path, f"{quoted(found[wrong[0]])} for {wrong[0]}")
    return found


def markers_of_gguf(
    path: str, metadata: Mapping[str, object], keys: Mapping[str, str], tensors: Mapping[str, object]
) -> dict[str, dict]:
    """The markers of one branch of a GGUF file, by the module's name without prefixes.

    ComfyUI-GGUF's converter keeps one as JSON under GGUF_KEY and the stored key of the weight. Its Q8_CR weights are
    rotated where the marker says both `convrot` and `weight_rotated`, and the group divides their rows. keys: without
    prefixes -> as stored. tensors: of this branch, by key without prefixes.
    """
    markers = {}
    for bare, stored in keys.items():
        text = metadata.get(GGUF_KEY + stored)
        if text is None:
            continue
        weight = tensors[bare]
        try:
            marker = json.loads(text) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            marker = None
        if not isinstance(marker, dict) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise CheckpointError(
                path,
                found=f"the quantization marker {quoted(text)} for the tensor {stored} of shape {list(weight.shape)}",
                expected="a JSON object, for a matrix of type I8",
                todo=f"The file is damaged: {TAKE_ANOTHER}",
            )
        if marker.get("convrot") and not (marker.get("weight_rotated") and _has_whole_groups(weight, marker)):
            marker["convrot"] = False
        markers[_module(bare)] = marker
    return markers


def _has_whole_groups(weight: torch.Tensor, marker: dict) -> bool:
    size = marker.get("convrot_groupsize", 256)
    return type(size) is not int or size < 1 or weight.shape[1] % size == 0  # what is no size is refused as such


def _layers(path: str, metadata: Mapping[str, object]) -> dict[str, object]:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    if not isinstance(text, str):
        raise _unreadable(path, "too long")
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise _unreadable(path, quoted(str(error))) from error
    if not isinstance(layers, dict):
        raise _unreadable(path, f"{quoted(layers)} as `layers`")
    return layers


def _unreadable(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        path,
        found=f"quantization metadata that cannot be read ({reason})",
        expected="a JSON object with `layers`, an object for each",
        todo=f"The file is damaged: {TAKE_ANOTHER}",
    )


def _module(key: str) -> str:
    return key.rpartition(".")[0]
