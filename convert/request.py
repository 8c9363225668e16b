"""What someone asks for, opened and checked: everything that can be refused before time is spent is refused here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

import torch

from ..loaders import CheckpointError
from ..loaders.branch import Branch
from ..loaders.branches import branch_of_name
from ..loaders.errors import TAKE_UNSPLIT
from ..loaders.policy import linears_worth_quantizing
from . import neighbours
from .output_file import check_targets
from .policy import PROTECT_COUNT, protected_layers
from .record import (
    LayerActivations,
    branch_of_record,
    branch_of_report,
    check_record,
    read_activation_record,
    read_fragility_report,
)
from .source import Sources, open_sources

INT8_SUFFIX = ".safetensors"
# `model-00001-of-00002.safetensors`: a part of a release in several files. GGUF says so in its metadata.
_SHARD = re.compile(r"\d{5}-of-(\d{5})\.(.+\.)?safetensors$")
_OF_LORA = re.compile(r"\.(lora_(A|B|up|down)|hada_w1_a|lokr_w1|lokr_w1_a)(\.|$)")
# Both stand in a text encoder as it is published; llama.cpp's names are refused by the loaders.
_OF_TEXT_ENCODER = (re.compile(r"(^|\.)embed_tokens\.weight$"), re.compile(r"\.self_attn\.q_proj\.weight$"))


@dataclasses.dataclass(frozen=True)
class Request:
    """What to convert, for both kinds of result.

    source: the checkpoint, with all branches that it holds. unconditional: the file of the unconditional branch, beside
    which `source` gives the conditional one. target: the file to write. one_file: both branches in it, instead of the
    second in `<target>_uncond`. protected, protect_count: see `policy.protected_layers`; a count of None is
    PROTECT_COUNT. reports, records: paths, one for each branch: what its layers read, the other's do not. device: what
    computes. make_folder: make the target's folder before writing.
    """

    source: str
    target: str
    unconditional: str | None = None
    one_file: bool = False
    overwrite: bool = False
    protected: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    protect_count: int | None = None
    records: tuple[str, ...] = ()
    device: str = "cpu"
    make_folder: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A branch to convert: the file it goes to, the prefix of its tensors there, and what was decided about its linear
    layers. record: empty without one. record_path, report_path: what was read for it, None for nothing."""

    branch: Branch
    target: str
    prefix: str
    quantized: frozenset[str]
    protected: frozenset[str]
    record: Mapping[str, LayerActivations]
    record_path: str | None = None
    report_path: str | None = None


def open_request(request: Request, suffix: str, prefixes: Mapping[str, str]) -> tuple[Sources, list[Part]]:
    """The opened sources and what becomes of each branch. prefixes: of two branches in one file.

    Raises ValueError with a sentence for the person who asked.
    """
    if not request.target.endswith(suffix):
        raise ValueError(f"{request.target}: found another ending, expected {suffix}. Rename the file to write.")
    _check_count(request)
    check_device(request.device)
    for path in filter(None, (request.source, request.unconditional)):
        _refuse_shard(path)
    sources = open_sources(request.source, request.unconditional)
    targets = _targets(request, len(sources.branches))
    read = [file.path for file in sources.files]
    check_targets(targets, [*read, *request.records, *request.reports], request.overwrite, request.make_folder)
    if request.one_file and len(sources.branches) == 1:
        raise ValueError(
            f"one file for both branches: found one branch in {os.path.basename(request.source)}. Name the file of the "
            "unconditional branch too, or leave this option out."
        )
    for what, paths in (("activation records", request.records), ("fragility reports", request.reports)):
        if paths and len(paths) != len(targets):
            raise ValueError(
                f"{what}: found {len(paths)}, expected {len(targets)}: one for each branch to convert, the conditional "
                "one first. What is measured on one branch says nothing about the other."
            )
    parts = []
    for index, (branch, target) in enumerate(zip(sources.branches, targets, strict=True)):
        prefix = prefixes[branch.name] if targets.count(target) > 1 else ""
        parts.append(_part(request, index, branch, target, prefix))
    for part in parts:
        # A file of one branch says at most by its name which it is.
        name = part.branch.name if len(parts) == 2 else branch_of_name(part.branch.path)
        _check_branch(part.record_path, branch_of_record, name)
        _check_branch(part.report_path, branch_of_report, name)
    return sources, parts


def _refuse_shard(path: str) -> None:
    """Nothing in such a file says so but its name."""
    found = _SHARD.search(os.path.basename(path))
    if found is not None and int(found[1]) > 1:
        raise CheckpointError(
            path,
            found=f"one part of a model split into {int(found[1])} files",
            expected="a whole model in one file",
            todo=TAKE_UNSPLIT,
        )


def _check_branch(path: str | None, branch_of: Callable[[str], str | None], expected: str | None) -> None:
    found = None if path is None or expected is None else branch_of(path)
    if found not in (None, expected):
        raise CheckpointError(
            path,
            found=f"that it was made on the {found} branch",
            expected=f"one of the {expected} branch",
            todo="Name the other branch's, or, of two, the conditional one's first.",
        )


def _check_count(request: Request) -> None:
    if request.protect_count is not None and not request.reports:
        raise ValueError(
            f"number of layers to protect: found {request.protect_count} without a fragility report, whose first "
            "layers it counts. Name a report, or leave the number out."
        )
    if request.protect_count == 0:
        raise ValueError(
            "number of layers to protect: found 0, with which a fragility report has no effect. Leave the report out, "
            "or protect some layers."
        )


def check_device(device: str) -> None:
    """Raises ValueError for a device that there is not, and for kinds on which nothing was ever computed."""
    try:
        kind = torch.device(device).type
    except RuntimeError:  # torch's own sentence names dozens of kinds
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: found {device!r}, expected cpu, cuda or a certain GPU such as cuda:1.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found no CUDA device on this machine. Leave it out, or say cpu.")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: found {device}, expected cuda:0 to cuda:{torch.cuda.device_count() - 1}.")


def _targets(request: Request, branches: int) -> list[str]:
    """The file of each branch."""
    if branches == 1 or request.one_file:
        return [request.target] * branches
    root, suffix = os.path.splitext(request.target)
    return [request.target, f"{root}_uncond{suffix}"]


def _other_kind(weights: Mapping[str, object]) -> str | None:
    """What a file is that is no diffusion transformer, as far as its names say."""
    if any(_OF_LORA.search(name) for name in weights):
        return "a LoRA"
    is_text_encoder = all(any(pattern.search(name) for name in weights) for pattern in _OF_TEXT_ENCODER)
    return "a text encoder" if is_text_encoder else None


def _part(request: Request, index: int, branch: Branch, target: str, prefix: str) -> Part:
    linears = linears_worth_quantizing(branch.weights)
    other = _other_kind(branch.weights)
    if not linears or other:
        raise CheckpointError(
            branch.path,
            found=other or "no linear layer that is worth quantizing",
            expected="a diffusion transformer",
            todo="Text encoders, VAEs, LoRAs and small models stay as they are.",
        )
    report_path = request.reports[index] if request.reports else None
    report = read_fragility_report(report_path) if report_path else ()
    count = PROTECT_COUNT if request.protect_count is None else request.protect_count
    protected = protected_layers(branch.path, linears, request.protected, report, count)
    if not set(linears) - protected:
        raise ValueError(
            f"protected layers: found all {len(linears)} linear layers of {os.path.basename(branch.path)} protected, "
            "expected some to quantize. Protect fewer."
        )
    record, record_path = {}, request.records[index] if request.records else None
    if record_path:
        record = read_activation_record(record_path)
        check_record(record_path, record, branch.weights)
    quantized = frozenset(linears) - protected
    if target.endswith(INT8_SUFFIX):
        quantized -= neighbours.unknown(branch.weights, quantized).keys()
    return Part(branch, target, prefix, quantized, frozenset(protected), record, record_path, report_path)
