"""A quantized file against its source, as a node runs it: the host's files, progress bar, interrupt and device."""

from __future__ import annotations

import dataclasses

import torch

from ..evaluation import verify_report
from ..evaluation.pairs import Files
from ..evaluation.picture import draw
from ..evaluation.verify import verify
from . import files, model
from .convert import DEVICES, ChosenDevice, HostProgress
from .profile_activations import image_tensor


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
    chosen = ChosenDevice(request.device)
    compared = Files(
        files.full_path(request.checkpoint),
        files.full_path(request.source),
        _second(request.unconditional),
        _second(request.source_unconditional),
    )
    with files.errors_for_the_page():
        checks = verify(compared, chosen.device, HostProgress(), chosen.make_room)
    panels = verify_report.panels(checks)
    picture = image_tensor(draw(panels)) if panels else torch.ones((1, 64, 64, 3))
    return verify_report.text(checks), picture


def _second(name: str) -> str | None:
    return None if name == model.SAME_FILE else files.full_path(name)
