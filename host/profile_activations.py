"""Profiling as nodes run it: recorders on a MODEL while samplers run it, then the ranking, its picture and its files.

The recorders hang on callbacks that the host makes before and after each sampling run of the very patcher that carries
them: clones of it, with a LoRA for instance, record too, the model that it was cloned from never does, and between runs
there is no hook on any module.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor
from PIL import Image

from ..convert.record import write_activation_record, write_fragility_report
from ..evaluation.activations import ActivationRecorder
from ..evaluation.fragility import MEASURES, PROTECT_COUNT, Fragility, panels, rank_layers, table
from ..evaluation.int8_error import output_sqnr_db
from ..evaluation.picture import draw
from ..formats import QuantizedWeight
from ..loaders.branches import CONDITIONAL, UNCONDITIONAL
from . import layouts

__all__ = ["MEASURES", "PROTECT_COUNT", "ReportRequest", "fragility_report", "profile_models"]

_KEY = "lowbit_profile_activations"
# What the float32 copies of some rows of a weight take on a GPU.
_DEVICE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class ProfiledBranch:
    """One weight set: what it is called in texts, the end of its files' names, the profiled patcher, its recorder."""

    title: str
    suffix: str
    patcher: ModelPatcher
    recorder: ActivationRecorder


@dataclasses.dataclass(frozen=True)
class Profile:
    """What travels from one node to the other: a growing record of each weight set."""

    branches: tuple[ProfiledBranch, ...]


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """measure: one of MEASURES, by which layers are ranked. filename_prefix: of the files, in the output folder."""

    protect_count: int
    measure: str
    filename_prefix: str


@dataclasses.dataclass(frozen=True)
class Report:
    """picture: float32 [1, H, W, 3]. records, reports: the files by their names in the output folder, by commas."""

    text: str
    picture: torch.Tensor
    records: str
    reports: str


def profile_models(
    model: ModelPatcher, model_negative: ModelPatcher | None = None
) -> tuple[ModelPatcher, ModelPatcher, Profile]:
    """Clones that record what their linear layers read whenever they are sampled, and the record.

    Without a negative model, or with one that has the same weights, there is one record.
    """
    conditional = _branch("model", "", model)
    if model_negative is None:
        return conditional.patcher, conditional.patcher, Profile((conditional,))
    if model_negative.model is model.model:
        patched = _recording(model_negative, conditional.recorder)
        return conditional.patcher, patched, Profile((conditional,))
    unconditional = _branch("model_negative", "_uncond", model_negative)
    return conditional.patcher, unconditional.patcher, Profile((conditional, unconditional))


def _branch(title: str, suffix: str, model: ModelPatcher) -> ProfiledBranch:
    recorder = ActivationRecorder()
    return ProfiledBranch(title, suffix, _recording(model, recorder), recorder)


def _recording(model: ModelPatcher, recorder: ActivationRecorder) -> ModelPatcher:
    clone = model.clone()
    # Both are given the patcher that runs, whose modules may be its own: for hooks, and for further GPUs.
    clone.add_callback_with_key(
        CallbacksMP.ON_PRE_RUN, _KEY, lambda patcher: recorder.attach(patcher.model.diffusion_model)
    )
    clone.add_callback_with_key(
        CallbacksMP.ON_CLEANUP, _KEY, lambda patcher: recorder.detach(patcher.model.diffusion_model)
    )
    return clone


def fragility_report(profile: Profile, request: ReportRequest) -> Report:
    """Rank, draw, and write the record and the report of each branch. Raises ValueError and RuntimeError."""
    paths = _Paths(request.filename_prefix)
    texts, pictures, records, reports = [], [], [], []
    # Nothing is written before all records are known to be whole.
    whole = [branch.recorder.activations(branch.title) for branch in profile.branches]
    for branch, record in zip(profile.branches, whole, strict=True):
        fragility = _rank(branch, record, request)
        layers = branch.recorder.layers.values()
        tokens, calls = (max(getattr(layer, name) for layer in layers) for name in ("rows", "calls"))
        details = {"model": type(branch.patcher.model).__name__, "calls": calls, "tokens": tokens}
        if len(profile.branches) > 1:
            details["branch"] = UNCONDITIONAL if branch.suffix else CONDITIONAL
        records.append(paths.of("record", branch.suffix, ".safetensors"))
        write_activation_record(paths.full(records[-1]), record, {name: str(value) for name, value in details.items()})
        reports.append(paths.of("report", branch.suffix, ".json"))
        write_fragility_report(paths.full(reports[-1]), fragility.layers, {**details, "measure": request.measure})
        texts.append(
            f"{branch.title}: {len(record)} linear layers, {calls:,} calls, {tokens:,} tokens\n\n{table(fragility)}\n\n"
            f"In the output folder, for Save as INT8 and Save as GGUF: {records[-1]} and {reports[-1]}"
        )
        pictures += panels(branch.title, fragility)
    return Report("\n\n\n".join(texts), image_tensor(draw(pictures)), ", ".join(records), ", ".join(reports))


def _rank(branch: ProfiledBranch, record: dict, request: ReportRequest) -> Fragility:
    shapes = {name: (layer.N, layer.K) for name, layer in branch.recorder.layers.items()}
    return rank_layers(record, shapes, dict(_output_errors(branch)), request.measure, request.protect_count)


def _output_errors(branch: ProfiledBranch) -> Iterator[tuple[str, float]]:
    """The second measure for every layer that has weights, in dB."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(_DEVICE_BYTES, device)
    model, layers = branch.patcher.model.diffusion_model, branch.recorder.layers
    bar = comfy.utils.ProgressBar(len(layers))
    for name, layer in layers.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is not None:
            yield name, output_sqnr_db(layer.sample, _floats(weight), device)
        bar.update(1)


def _floats(weight: torch.Tensor) -> torch.Tensor | QuantizedWeight:
    """A module's weight as something that can be read some rows at a time."""
    ours = layouts.from_host(weight)
    if ours is not None:
        return ours
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach()


def image_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as the host's IMAGE, float32 [1, H, W, 3] from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).unsqueeze(0)


class _Paths:
    """Numbered names in the output folder, as the host numbers pictures: no run overwrites another's files."""

    def __init__(self, filename_prefix: str):
        self._folder = folder_paths.get_output_directory()
        target = os.path.join(self._folder, os.path.normpath(filename_prefix))
        if not filename_prefix.strip() or not folder_paths.is_within_directory(self._folder, target):
            raise ValueError(f"filename_prefix: found {filename_prefix!r}, expected a name inside the output folder.")
        if "," in filename_prefix:
            raise ValueError(f"filename_prefix: found {filename_prefix!r}, expected a name without commas.")
        _, self._name, self._number, self._subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, self._folder
        )

    def of(self, what: str, suffix: str, ending: str) -> str:
        """The name of a file, from the output folder."""
        name = f"{self._name}_{self._number:05}_{what}{suffix}{ending}"
        return os.path.join(self._subfolder, name).replace(os.sep, "/")

    def full(self, name: str) -> str:
        return os.path.join(self._folder, name)
