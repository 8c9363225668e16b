"""What a calibration run leaves behind: the activation record, and the fragility report made from it.

An activation record is a safetensors file about one branch. For each linear layer, by module name:

    <module>.absmax        float32 [K]   largest magnitude of each input channel
    <module>.mean_square   float32 [K]   mean square of each input channel
    <module>.spikiness     float32 [1]   how far outliers stand out of the layer's input

Where a model has two weight sets, the metadata's `branch` says whose it is, as `branch` of a report does.

A fragility report is JSON, most fragile layer first; `sqnr_db` is null where it was not measured:

    {"format": "lowbit_fragility_report", "version": 1,
     "layers": [{"name": "layers.3.feed_forward.w2", "spikiness": 41.5, "sqnr_db": 24.1}, ...]}
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping

import torch

from ..loaders import CheckpointError, open_checkpoint
from ..loaders.branches import CONDITIONAL, UNCONDITIONAL
from ..loaders.errors import quoted
from .file_layout import OutputTensor
from .output_file import OutputFile, check_targets
from .safetensors_header import NAMES, safetensors_layout

RECORD_FORMAT, RECORD_VERSION = "lowbit_activation_record", "1"
REPORT_FORMAT, REPORT_VERSION = "lowbit_fragility_report", 1
LEAVES = ("absmax", "mean_square", "spikiness")
MAX_REPORT_BYTES = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class LayerActivations:
    """absmax, mean_square: float32 [K], of each input channel of a linear layer, >= 0 and finite."""

    absmax: torch.Tensor
    mean_square: torch.Tensor
    spikiness: float


@dataclasses.dataclass(frozen=True)
class FragileLayer:
    """A line of the fragility report."""

    name: str
    spikiness: float
    sqnr_db: float | None = None


def read_activation_record(path: str | os.PathLike) -> dict[str, LayerActivations]:
    """The record by module name. Raises CheckpointError for anything that is no whole record."""
    file = open_checkpoint(path)
    if file.container != "safetensors" or file.metadata.get("format") != RECORD_FORMAT:
        raise CheckpointError(
            file.path,
            found=f"a {file.container} file of the format {quoted(file.metadata.get('format'))}",
            expected=f"an activation record ({RECORD_FORMAT})",
            todo="Pick the file that the calibration run wrote, not a model.",
        )
    if file.metadata.get("version") != RECORD_VERSION:
        raise _damaged_record(file.path, f"version {quoted(file.metadata.get('version'))}", f"version {RECORD_VERSION}")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, stored in file.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES or not module or stored.dtype != torch.float32 or len(stored.shape) != 1:
            found = f"the tensor {quoted(name)} of {stored.dtype} {list(stored.shape)}"
            raise _damaged_record(file.path, found, f"<module>.<{'|'.join(LEAVES)}>, float32 with one dimension")
        modules.setdefault(module, {})[leaf] = stored.load().clone()
    return {module: _layer(file.path, module, leaves) for module, leaves in modules.items()}


def branch_of_record(path: str | os.PathLike) -> str | None:
    """`conditional` or `unconditional`, or None where the record does not say. Raises CheckpointError."""
    return _known_branch(open_checkpoint(path).metadata.get("branch"))


def branch_of_report(path: str | os.PathLike) -> str | None:
    """The same of a report that `read_fragility_report` has read."""
    with open(path, "rb") as file:
        return _known_branch(json.loads(file.read(MAX_REPORT_BYTES)).get("branch"))


def _known_branch(name: object) -> str | None:
    return name if name in (CONDITIONAL, UNCONDITIONAL) else None


def check_record(path: str, record: Mapping[str, LayerActivations], weights: Mapping[str, object]) -> None:
    """Refuse the record of another model. weights: of the model, by state-dict key. Raises CheckpointError."""
    expected, todo = "the layers of the model to convert", "Pick the activation record of this model and branch."
    known = [name for name in record if f"{name}.weight" in weights]
    if not known:
        found = f"only layers that the model does not have, such as {quoted(next(iter(record)))}"
        raise CheckpointError(path, found=found, expected=expected, todo=todo)
    for name in known:
        channels, K = record[name].absmax.shape[0], weights[f"{name}.weight"].shape[-1]
        if channels != K:
            found = f"{channels:,} input channels for {quoted(name)}, which has {K:,} in the model"
            raise CheckpointError(path, found=found, expected=expected, todo=todo)


def write_activation_record(
    path: str | os.PathLike,
    layers: Mapping[str, LayerActivations],
    details: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a record; `details` go into its metadata beside format and version. Raises ValueError and RuntimeError."""
    path = os.fspath(path)
    check_targets([path], [], overwrite)
    if not layers:
        raise ValueError(f"{path}: an activation record has at least one layer, found none.")
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in layers.items():
        leaves = {
            "absmax": layer.absmax.detach().float().cpu(),
            "mean_square": layer.mean_square.detach().float().cpu(),
            "spikiness": torch.tensor([layer.spikiness], dtype=torch.float32),
        }
        _layer(path, module, leaves)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()}
    outputs = [OutputTensor(name, tuple(t.shape), NAMES[t.dtype], t.nbytes) for name, t in tensors.items()]
    metadata = {**(details or {}), "format": RECORD_FORMAT, "version": RECORD_VERSION}
    layout = safetensors_layout(outputs, metadata)
    with OutputFile(path, overwrite) as file:
        file.write(0, layout.header)
        for name, tensor in tensors.items():
            file.write(layout.offsets[name], tensor)
        file.finish(layout.size_bytes)
        file.commit()


def read_fragility_report(path: str | os.PathLike) -> list[FragileLayer]:
    """The layers, most fragile first. Raises ValueError for anything that is no whole report."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise _not_a_report(path, f"that it cannot be read ({error.strerror})") from error
    if len(text) > MAX_REPORT_BYTES:
        raise _not_a_report(path, f"more than {MAX_REPORT_BYTES:,} bytes")
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_report(path, f"no JSON ({quoted(str(error))})") from error
    if not isinstance(report, dict) or report.get("format") != REPORT_FORMAT:
        found = report.get("format") if isinstance(report, dict) else report
        raise _not_a_report(path, f"the format {quoted(found)}")
    if report.get("version") != REPORT_VERSION:
        raise _not_a_report(path, f"version {quoted(report.get('version'))} instead of {REPORT_VERSION}")
    entries = report.get("layers")
    if not isinstance(entries, list) or not entries:
        raise _not_a_report(path, f"{quoted(entries)} as `layers`")
    layers = [_fragile_layer(path, entry) for entry in entries]
    if len({layer.name for layer in layers}) < len(layers):
        raise _not_a_report(path, "a layer that is listed twice")
    return layers


def write_fragility_report(
    path: str | os.PathLike, layers: Iterable[FragileLayer], details: Mapping[str, object] | None = None
) -> None:
    """Write a report; `layers` come most fragile first, `details` are further entries. An older report is replaced."""
    path, entries = os.fspath(path), [dataclasses.asdict(layer) for layer in layers]
    for entry in entries:
        _fragile_layer(path, entry)
    report = {**(details or {}), "format": REPORT_FORMAT, "version": REPORT_VERSION, "layers": entries}
    check_targets([path], [], overwrite=True)
    raw = (json.dumps(report, indent=1) + "\n").encode()
    with OutputFile(path, overwrite=True) as file:
        file.write(0, raw)
        file.finish(len(raw))
        file.commit()


def _layer(path: str, module: str, leaves: dict[str, torch.Tensor]) -> LayerActivations:
    """The checked layer: all three tensors, of matching shapes, finite and not negative."""
    if missing := [leaf for leaf in LEAVES if leaf not in leaves]:
        raise _damaged_record(path, f"no {quoted(f'{module}.{missing[0]}')}", ", ".join(LEAVES) + " of each layer")
    shapes = {leaf: tuple(leaves[leaf].shape) for leaf in LEAVES}
    K = shapes["absmax"]
    if len(K) != 1 or K[0] == 0 or shapes["mean_square"] != K or shapes["spikiness"] != (1,):
        raise _damaged_record(path, f"the shapes {shapes} for {quoted(module)}", "[K], [K] and [1]")
    for leaf, tensor in leaves.items():
        if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            found = f"a value in {quoted(f'{module}.{leaf}')} that is negative or not finite"
            raise _damaged_record(path, found, "finite numbers, none negative")
    return LayerActivations(leaves["absmax"], leaves["mean_square"], leaves["spikiness"].item())


def _damaged_record(path: str, found: str, expected: str) -> CheckpointError:
    todo = "The activation record is damaged or of another version of Lowbit: record the activations again."
    return CheckpointError(path, found=found, expected=expected, todo=todo)


def _fragile_layer(path: str, entry: object) -> FragileLayer:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise _not_a_report(path, f"the layer {quoted(entry)}")
    spikiness, sqnr_db = entry.get("spikiness"), entry.get("sqnr_db")
    if not _is_number(spikiness) or spikiness < 0 or not (sqnr_db is None or _is_number(sqnr_db)):
        raise _not_a_report(path, f"the numbers {quoted(spikiness)} and {quoted(sqnr_db)} for {quoted(entry['name'])}")
    return FragileLayer(entry["name"], float(spikiness), None if sqnr_db is None else float(sqnr_db))


def _is_number(value: object) -> bool:
    # A whole number of hundreds of digits is one to JSON, and too large for a float.
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _not_a_report(path: str, found: str) -> CheckpointError:
    expected = f"a fragility report (JSON, {REPORT_FORMAT} version {REPORT_VERSION}: names with spikiness and sqnr_db)"
    return CheckpointError(path, found=found, expected=expected, todo="Pick the report of this model, or make it anew.")
