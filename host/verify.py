"""A quantized file against its source, as a node runs it: the host's files, progress bar, interrupt and device."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import comfy.utils
import torch

from ..evaluation import verify_report
from ..evaluation.pairs import Files
from ..evaluation.picture import draw
from ..evaluation.verify import verify
from . import files, model
from .convert import DEVICES
from .profile_activations import image_tensor

_DEVICE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class VerifyRequest:
    """Picked files, by name; the unconditional ones may be `same file`. device: one of `convert.DEVICES`."""

    checkpoint: str
    source: str
    unconditional: str = model.SAME_FILE
    source_unconditional: str = model.SAME_FILE
    device: str = DEVICES[0]


def verify_files(request: VerifyRequest) -> tuple[str, torch.Tensor]:
    """The report and its picture, float32 [1, H, W, 3]. Raises ValueError with a sentence for the page."""
    device = torch.device("cpu")
    if request.device == DEVICES[0]:
        device = comfy.model_management.get_torch_device()
        comfy.model_management.free_memory(_DEVICE_BYTES, device)
    compared = Files(
        files.full_path(request.checkpoint),
        files.full_path(request.source),
        _second(request.unconditional),
        _second(request.source_unconditional),
    )
    with files.errors_for_the_page():
        checks = verify(compared, device, _Progress())
    panels = verify_report.panels(checks)
    picture = image_tensor(draw(panels)) if panels else torch.ones((1, 64, 64, 3))
    return verify_report.text(checks), picture


def _second(name: str) -> str | None:
    return None if name == model.SAME_FILE else files.full_path(name)


class _Progress:
    """For the host's bar; stops where the user pressed Cancel."""

    def __init__(self) -> None:
        self._bar = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar = self._bar or comfy.utils.ProgressBar(total_bytes)
        self._bar.update_absolute(done_bytes)
