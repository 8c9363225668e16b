"""A whole conversion: open and check everything, find out what the options ask for, then write tensor by tensor.

The same input and options give the same bytes on the same machine and device; elsewhere sums may take another order,
and a code of rotated INT8 or a scale of Q4_K fall to its neighbour.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Mapping

from ..loaders.errors import counted
from . import gguf, int8
from .file_layout import FileLayout
from .gguf_header import gguf_layout
from .policy import PLAIN, PROTECT_COUNT
from .progress import Report, Stage, size_text
from .recipe import gguf_metadata, recipe_text, safetensors_metadata
from .request import INT8_SUFFIX, Part, Request, open_request
from .safetensors_header import safetensors_layout
from .smoothing import DEFAULT_ALPHA, Factors, smoothing_factors
from .source import Sources, file_hash
from .tensor_plan import TensorPlan
from .write_files import FilePlan, check_room, write_files

Plans = list[TensorPlan]
# Hears of the opened branches once everything is checked, before time is spent; what it raises refuses them.
OnChecked = Callable[[list[Part]], None]


@dataclasses.dataclass(frozen=True)
class Written:
    """A file that was written. quantized: linear layers that were; protected: those that someone asked to keep;
    smoothed: of the quantized ones, None where nobody asked for smoothing. types: how many of the quantized layers have
    which type, for GGUF. stand_ins: how many did not get the type that was asked for, by `gguf.stand_in`."""

    path: str
    size_bytes: int
    quantized: int
    protected: int
    smoothed: int | None = None
    types: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stand_ins: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        kept = f", {counted(self.protected, 'layer')} protected" if self.protected else ""
        smoothed = "" if self.smoothed is None else f" ({self.smoothed:,} of them smoothed)"
        quantized = f"{counted(self.quantized, 'linear layer')} quantized{smoothed}"
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        others = "".join(f"; {count} {text}" for text, count in self.stand_ins.items())
        return f"{self.path}: {size_text(self.size_bytes)}, {quantized}{f' ({types})' if types else ''}{kept}{others}"


def convert_to_int8(
    request: Request,
    options: int8.Int8Options,
    report: Report = lambda progress: None,
    on_checked: OnChecked = lambda parts: None,
) -> list[Written]:
    """Write INT8 safetensors. Raises ValueError and RuntimeError with a sentence for the person who asked."""
    sources, parts = open_request(request, INT8_SUFFIX, int8.BRANCH_PREFIXES)
    options.check(parts)
    check_room(request.target, [each for part in parts for each in int8.plan_int8(part, options, {})])
    on_checked(parts)
    alpha = DEFAULT_ALPHA if options.alpha is None else options.alpha
    plans, smoothed = [], []
    for part in parts:
        factors = _smoothing(part, request, alpha, sources, report)
        plans.append(int8.plan_int8(part, options, factors, request.device))
        smoothed.append(_smoothed(part, factors))
    settings = {"format": int8.FORMAT, "rotate": options.rotate} | ({"alpha": alpha} if request.records else {})
    recipe_of = _recipes(request, settings, sources, report)

    def lay_out(inside: list[Part], plans: Plans) -> FileLayout:
        metadata = safetensors_metadata(inside[0].branch.metadata, recipe_of(inside))
        return safetensors_layout([tensor for plan in plans for tensor in plan.tensors], metadata)

    return _write(request, parts, plans, lay_out, sources, report, smoothed if request.records else None)


def convert_to_gguf(
    request: Request,
    options: gguf.GgufOptions,
    report: Report = lambda progress: None,
    on_checked: OnChecked = lambda parts: None,
) -> list[Written]:
    """Write GGUF. Raises ValueError and RuntimeError with a sentence for the person who asked."""
    sources, parts = open_request(request, ".gguf", gguf.BRANCH_PREFIXES)
    gguf.check_policy(parts, options.policy)
    plans = [gguf.plan_gguf(part, options.policy, request.device) for part in parts]
    gguf.check_records(parts, plans)
    check_room(request.target, [each for found in plans for each in found])
    on_checked(parts)
    recipe_of = _recipes(request, {"format": "gguf", **dataclasses.asdict(options)}, sources, report)

    def lay_out(inside: list[Part], plans: Plans) -> FileLayout:
        head = inside[0].branch
        architecture = options.architecture or gguf.architecture_of(head)
        metadata = gguf_metadata(head.metadata, recipe_of(inside), architecture, gguf.most_common_type(plans))
        return gguf_layout([tensor for plan in plans for tensor in plan.tensors], metadata)

    return _write(request, parts, plans, lay_out, sources, report)


def _recipes(request: Request, settings: dict, sources: Sources, report: Report) -> Callable[[list[Part]], str]:
    """What gives the recipe of a file with some branches, once all that was read is hashed: by branch, `only` for a
    model without any."""
    paths = [file.path for file in sources.files]
    advance = Stage("reading", sum(os.path.getsize(path) for path in paths), report).advance
    hashes = {path: file_hash(path, advance) for path in paths}
    hashes |= {path: file_hash(path) for path in {*request.records, *request.reports}}
    settings = settings | {"protected": list(request.protected)}
    if request.reports:
        settings["protect_count"] = PROTECT_COUNT if request.protect_count is None else request.protect_count

    def recipe_of(inside: list[Part]) -> str:
        read = {
            "source_sha256": {part.branch.name: hashes[part.branch.path] for part in inside},
            "activation_record_sha256": {p.branch.name: hashes[p.record_path] for p in inside if p.record_path},
            "fragility_report_sha256": {p.branch.name: hashes[p.report_path] for p in inside if p.report_path},
        }
        return recipe_text(settings | {name: found for name, found in read.items() if found})

    return recipe_of


def _smoothing(part: Part, request: Request, alpha: float, sources: Sources, report: Report) -> dict[str, Factors]:
    """The factors of a branch with an activation record."""
    if not part.record:
        return {}
    weights, layers = part.branch.weights, part.quantized | part.protected
    stage = Stage("smoothing", sum(math.prod(weights[f"{name}.weight"].shape) for name in layers), report)

    def advance(elements: int) -> None:
        stage.advance(elements)
        sources.release()

    return smoothing_factors(weights, part.quantized, part.record, alpha, request.device, advance)


def _smoothed(part: Part, factors: dict[str, Factors]) -> int:
    """How many of the layers to quantize have their input smoothed."""
    found = (factors.get(f"{name}.weight") for name in part.quantized)
    return sum(factor is not None and factor.columns is not None for factor in found)


def _write(
    request: Request,
    parts: list[Part],
    plans: list[Plans],
    lay_out: Callable[[list[Part], Plans], FileLayout],
    sources: Sources,
    report: Report,
    smoothed: list[int] | None = None,
) -> list[Written]:
    """Write the plans of each part to its target; the first branch of a file speaks for it. smoothed: layers, by
    part."""
    files, written = [], []
    for target in dict.fromkeys(part.target for part in parts):
        inside = [part for part in parts if part.target == target]
        tensors = [each for part, found in zip(parts, plans, strict=True) if part.target == target for each in found]
        layout = lay_out(inside, tensors)
        files.append(FilePlan(target, inside[0].branch.path, tensors, layout))
        protected = sum(len(part.protected) for part in inside)
        smooth = None
        if smoothed is not None:
            smooth = sum(count for part, count in zip(parts, smoothed, strict=True) if part.target == target)
        stored = [plan.tensors[0].stored for plan in tensors if plan.quantized_as]
        types = collections.Counter(name for name in stored if name not in PLAIN)
        stand_ins = collections.Counter(filter(None, map(gguf.stand_in, tensors)))
        shown = types if set(types) != {"I8"} else {}
        written.append(Written(target, layout.size_bytes, types.total(), protected, smooth, shown, stand_ins))
    if request.make_folder:
        _make_folder(request.target)
    write_files(files, request.overwrite, sources, report)
    return written


def _make_folder(target: str) -> None:
    folder = os.path.dirname(os.path.abspath(target))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{folder}: cannot be made ({error.strerror}). Pick another folder.") from error
