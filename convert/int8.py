"""A branch -> INT8 safetensors in the host's own format, `int8_tensorwise` with a scale for each channel.

    <module>.weight        int8 [N, K]
    <module>.weight_scale  float32 [N, 1]
    <module>.comfy_quant   the host's marker, JSON as bytes

so stock ComfyUI loads a file of one branch. Two branches in one file lie under `conditional.` and `unconditional.`,
which Lowbit's loader reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import torch

from ..formats import Int8Weight, int8
from .file_layout import OutputTensor
from .neighbours import leftovers
from .pieces import in_pieces
from .request import Part
from .safetensors_header import NAMES
from .smoothing import Factors
from .source import part_of
from .tensor_plan import NotFiniteError, Pieces, TensorPlan, finite_floats_of, kept_dtype, plain_pieces

FORMAT = "int8_tensorwise"
BRANCH_PREFIXES = {"conditional": "conditional.", "unconditional": "unconditional."}
# The group sizes of ComfyUI's ConvRot, best first: a larger group spreads an outlier further.
ROTATION_GROUPS = (256, 64, 16)


@dataclasses.dataclass(frozen=True)
class Int8Options:
    """rotate: by ConvRot. alpha: of SmoothQuant, which an activation record switches on; None is DEFAULT_ALPHA."""

    rotate: bool = False
    alpha: float | None = None

    def check(self, parts: Sequence[Part]) -> None:
        """Raises ValueError for an option that would have no effect on these branches."""
        if self.alpha is not None and not any(part.record for part in parts):
            raise ValueError(
                f"alpha of smoothing: found {self.alpha:g} without an activation record, which switches smoothing on. "
                "Name a record, or leave alpha out."
            )
        rows = {part.branch.weights[f"{name}.weight"].shape[1] for part in parts for name in part.quantized}
        if self.rotate and not any(map(rotation_group, rows)):
            raise ValueError(
                f"rotation: found no layer whose rows are a multiple of {ROTATION_GROUPS[-1]} long. Leave it out."
            )


def plan_int8(
    part: Part, options: Int8Options, factors: Mapping[str, Factors], device: torch.device | str = "cpu"
) -> list[TensorPlan]:
    """What each weight of a branch becomes: the layers of `part.quantized` INT8, and `leftovers` beside them nothing.
    factors: of smoothing, by key."""
    plans, dropped = [], set(leftovers(part.branch.weights, part.quantized))
    for key, weight in part.branch.weights.items():
        if key in dropped:
            continue
        make = _linear_plan if key.removesuffix(".weight") in part.quantized else _plain_plan
        plans.append(make(key, weight, options, factors.get(key), part.prefix, device))
    return plans


def rotation_group(K: int) -> int:
    """The largest group that divides K, 0 for none."""
    return next((size for size in ROTATION_GROUPS if K % size == 0), 0)


def _plain_plan(key, weight, options, factors, prefix, device) -> TensorPlan:
    dtype, shape = kept_dtype(weight), tuple(weight.shape)
    size_bytes = dtype.itemsize * torch.Size(shape).numel()
    output = OutputTensor(prefix + key, shape, NAMES[dtype], size_bytes)
    return TensorPlan(key, (output,), lambda: plain_pieces(output.name, weight, dtype, factors, device))


def _linear_plan(key, weight, options, factors, prefix, device) -> TensorPlan:
    N, K = weight.shape
    group = rotation_group(K) if options.rotate else 0
    marker = {"format": FORMAT} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    marker_bytes = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)
    name = prefix + key
    marker_name = name.removesuffix("weight") + "comfy_quant"
    outputs = (
        OutputTensor(name, (N, K), "I8", N * K),
        OutputTensor(f"{name}_scale", (N, 1), "F32", 4 * N),
        OutputTensor(marker_name, (marker_bytes.numel(),), "U8", marker_bytes.numel()),
    )

    def quantized_rows(rows: slice) -> Int8Weight:
        return _quantized_rows(weight, rows, group, factors, device)

    def compute() -> Pieces:
        for rows, part in in_pieces(quantized_rows, (N, K), device):
            yield name, rows.start * K, part.data
            yield f"{name}_scale", rows.start * 4, part.scale.expand(part.data.shape[0], 1)
        yield marker_name, 0, marker_bytes

    return TensorPlan(key, outputs, compute, quantized_as="I8")


def _quantized_rows(weight, rows, group, factors, device) -> Int8Weight:
    if isinstance(weight, Int8Weight) and weight.rotation_group == group and weight.smooth is None and factors is None:
        part = part_of(weight, rows)  # already what is asked for: nothing is lost twice
        if not bool(torch.isfinite(part.scale).all()):
            raise NotFiniteError("found NaN or infinity in its scales")
        return part
    values = finite_floats_of(weight, rows, device)
    if factors is not None:
        values = factors.apply(values, rows)
    return int8.quantize_weight(values, rotation_group=group)
