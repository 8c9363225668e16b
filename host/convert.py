"""Conversions as nodes run them: files from the host's folders, its progress bar, its interrupt, its device."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..convert.gguf import GgufOptions
from ..convert.int8 import Int8Options
from ..convert.job import Written, convert_to_gguf, convert_to_int8
from ..convert.policy import PRESETS, PROTECT_COUNT, read_policy
from ..convert.progress import Progress
from ..convert.remarks import remarks
from ..convert.request import Part, Request
from ..convert.smoothing import DEFAULT_ALPHA
from ..loaders.branch import Branch
from ..loaders.errors import CheckpointError
from ..loaders.file_state import file_states
from . import files, model

logger = logging.getLogger(__name__)

POLICIES = PRESETS
DEVICES = ("default", "cpu")
BRANCH_FILES = ("one file each", "one file for both")
# In the output folder: the host looks for diffusion models there too.
TARGET_FOLDER = files.MODEL_FOLDER
# By which a file's name says that it holds a model.
_MODEL_ENDINGS = {".gguf", *folder_paths.supported_pt_extensions}
# What the temporaries of a few rows take on a GPU.
_DEVICE_BYTES = 2 * 2**30
_LOG_INTERVAL_S = 10.0


@dataclasses.dataclass(frozen=True)
class SaveRequest:
    """What the save nodes share.

    checkpoint: a picked file. unconditional: another one, or `same file`. filename: of the result, with or without its
    ending, in the output folder's TARGET_FOLDER. branches: one of BRANCH_FILES. protected, reports, records: texts of
    names, separated by commas; files are named from the output folder. device: one of DEVICES.
    """

    checkpoint: str
    unconditional: str
    filename: str
    branches: str
    overwrite: bool
    protected: str = ""
    reports: str = ""
    protect_count: int = PROTECT_COUNT
    records: str = ""
    device: str = DEVICES[0]


def save_as_int8(request: SaveRequest, convrot: bool, smoothing_alpha: float) -> str:
    """Write INT8 safetensors; returns what was written, for the page. Raises ValueError and RuntimeError."""
    # A widget always has a value: only a changed one was asked for.
    alpha = None if smoothing_alpha == DEFAULT_ALPHA else smoothing_alpha
    return _run(request, ".safetensors", convert_to_int8, Int8Options(convrot, alpha))


def save_as_gguf(request: SaveRequest, policy: str, policy_file: str = "", architecture: str = "") -> str:
    """Write GGUF; returns what was written, for the page. policy_file: replaces the policy. architecture: empty to have
    it found. Raises as above."""
    chosen = read_policy(_in_output_folder(policy_file) if policy_file.strip() else policy)
    return _run(request, ".gguf", convert_to_gguf, GgufOptions(chosen, architecture.strip() or None))


class ChosenDevice:
    """What computes, of one of DEVICES, and its memory."""

    def __init__(self, choice: str):
        device = comfy.model_management.get_torch_device()
        # Of the host's other kinds (Intel, Apple, DirectML) none computes what conversions need.
        self._is_the_hosts = choice == DEVICES[0] and device.type in ("cpu", "cuda")
        self.device = device if self._is_the_hosts else torch.device("cpu")

    def make_room(self) -> None:
        """Move models off it: once nothing is refused any more."""
        if self._is_the_hosts:
            comfy.model_management.free_memory(_DEVICE_BYTES, self.device)


def _run(request: SaveRequest, suffix: str, convert: Callable[..., list[Written]], options) -> str:
    chosen, remarked = ChosenDevice(request.device), []

    def on_checked(parts: list[Part]) -> None:
        for part in parts:
            _refuse_diffusers(part.branch)
        for remark in remarks(parts):
            remarked.append(remark)
            logger.warning("Lowbit: %s", remark)
        chosen.make_room()

    with files.errors_for_the_page():
        asked = _request(request, suffix, chosen.device)
        start = time.monotonic()
        written = convert(asked, options, HostProgress(), on_checked)
    return "\n".join([*remarked, *map(str, written), f"{time.monotonic() - start:.0f} s"])


def _request(request: SaveRequest, suffix: str, device: torch.device) -> Request:
    target = _in_output_folder(os.path.join(TARGET_FOLDER, _without_ending(request.filename.strip(), suffix) + suffix))
    return Request(
        source=files.full_path(request.checkpoint),
        target=target,
        unconditional=None if request.unconditional == model.SAME_FILE else files.full_path(request.unconditional),
        one_file=request.branches == BRANCH_FILES[1],
        overwrite=request.overwrite,
        protected=_names(request.protected),
        reports=tuple(map(_in_output_folder, _names(request.reports))),
        protect_count=None if request.protect_count == PROTECT_COUNT else request.protect_count,
        records=tuple(map(_in_output_folder, _names(request.records))),
        device=str(device),
        make_folder=True,
    )


def _without_ending(filename: str, suffix: str) -> str:
    """A name without the ending that the file will get. Raises ValueError for no name and for one of another kind."""
    ending = os.path.splitext(filename)[1].lower()
    if ending != suffix and ending in _MODEL_ENDINGS:
        raise ValueError(f"filename: found the ending {ending} in {filename}, expected {suffix}, or no ending at all.")
    while filename.lower().endswith(suffix):
        filename = filename[: -len(suffix)]
    if not os.path.basename(filename):
        raise ValueError("filename: found none, expected a name for the file to write.")
    return filename


def states_in_output_folder(*texts: str | None) -> list[str]:
    """The states of the files that texts of names, as in SaveRequest, name in the output folder; None names none."""
    names = [name for text in texts if text is not None for name in _names(text)]
    return [repr(state) for state in file_states(*map(_in_output_folder, names))]


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _in_output_folder(name: str) -> str:
    """The path of a name in the host's output folder. Raises ValueError for one outside it."""
    folder = folder_paths.get_output_directory()
    path = os.path.normpath(os.path.join(folder, name.strip()))
    if not folder_paths.is_within_directory(folder, path):
        raise ValueError(f"{name}: lies outside ComfyUI's output folder {folder}. Name a file inside it.")
    return path


def _refuse_diffusers(branch: Branch) -> None:
    """ComfyUI renames and joins such weights while loading, which quantized ones do not allow: see `host/model.py`."""
    if model.is_diffusers(model.host_state_dict(branch, torch.bfloat16)):
        raise CheckpointError(
            branch.path,
            found=f"the names of the diffusers library, such as {next(iter(branch.weights))}",
            expected="the names of the model's original release",
            todo="Load the file with Load Diffusion Model (INT8), which quantizes it, and save it with Save Model.",
        )


class HostProgress:
    """A `progress.Report` for the host's bar and log; stops where the user pressed Cancel."""

    def __init__(self) -> None:
        self._stage, self._bar, self._next_s = None, None, 0.0

    def __call__(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if progress.stage != self._stage:
            self._stage, self._bar = progress.stage, comfy.utils.ProgressBar(progress.total_bytes)
        self._bar.update_absolute(progress.done_bytes)
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + _LOG_INTERVAL_S
            logger.info("Lowbit: %s", progress)
