"""A branch -> the tensors of a GGUF file. Two branches in one file lie under `cond.` and `uncond.`, as published."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import torch

from ..formats import GgmlWeight, ggml
from ..formats.ggml.rows import USES_IMPORTANCE
from ..loaders.branch import Branch
from ..loaders.errors import quoted
from ..loaders.ideogram4 import is_ideogram4
from .file_layout import OutputTensor
from .gguf_header import INTEGERS, tensor_size_bytes
from .pieces import in_pieces
from .policy import PLAIN, GgufPolicy, module_of
from .record import LayerActivations
from .request import Part
from .source import matrix_shape, part_of
from .tensor_plan import Pieces, TensorPlan, finite_floats_of, is_float, kept_dtype

BRANCH_PREFIXES = {"conditional": "cond.", "unconditional": "uncond."}
# What a layer becomes whose rows are no whole blocks of the type it should have, before the rest's type.
FALLBACK = "Q8_0"
_STORED = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
# Up to so many elements F32 costs nothing. HiDream's gates of experts have 4 x 2560 and are read by no linear layer.
_SMALL = 2**14
# Names by which files in circulation call an architecture, and a tensor that only it has.
_ARCHITECTURES = {
    "aura": "double_layers.0.modX.1.weight",
    "cosmos": "blocks.0.adaln_modulation_cross_attn.1.weight",
    "hyvid": "txt_in.individual_token_refiner.blocks.0.norm1.weight",  # before flux, whose name it may have
    "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
    "hidream": "caption_projection.0.linear.weight",
    "ltxv": "patchify_proj.weight",
    "lumina2": "cap_embedder.1.weight",
    "qwen_image": "transformer_blocks.0.img_mod.1.weight",
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
    "sdxl": "output_blocks.2.2.conv.weight",
    "wan": "blocks.0.self_attn.norm_q.weight",
}


@dataclasses.dataclass(frozen=True)
class GgufOptions:
    """architecture: for `general.architecture`; None finds it, or leaves it out as many files do. Raises ValueError for
    one that other programs would not take as a name."""

    policy: GgufPolicy
    architecture: str | None = None

    def __post_init__(self):
        if self.architecture is not None and not re.fullmatch(r"[a-z0-9_.-]+", self.architecture):
            raise ValueError(
                f"architecture: found {quoted(self.architecture)}, expected a name of small letters, digits, _, - and "
                "dots, such as flux. Leave it out to have it found."
            )


def plan_gguf(part: Part, policy: GgufPolicy, device: torch.device | str = "cpu") -> list[TensorPlan]:
    """What each weight of a branch becomes. Raises ValueError for a type that GGUF cannot hold.

    A layer of `part.quantized` takes the policy's type, one of `part.protected` that of the rest, whatever rule names
    it; any other tensor of floats takes the type of a rule that names it.
    """
    plans = []
    for key, weight in part.branch.weights.items():
        module = module_of(key)
        is_kept = module in part.protected or not is_float(weight) or 0 in weight.shape
        wanted = None if is_kept else policy.wanted(key, weight, module in part.quantized)
        stored = _stored_type(key, weight, wanted, policy)
        quantized_as = None if wanted in PLAIN else wanted
        plans.append(_plan(key, weight, stored, quantized_as, part.record.get(module), part.prefix, device))
    return plans


def check_policy(parts: Sequence[Part], policy: GgufPolicy) -> None:
    """Raises ValueError for a rule that has no effect on any branch; one of them may lack modules, those for text."""
    weights = {key: weight for part in parts for key, weight in part.branch.weights.items()}
    protected = frozenset.intersection(*(frozenset(part.protected) for part in parts))
    policy.check_patterns({key: weight for key, weight in weights.items() if is_float(weight)}, protected)


def stand_in(plan: TensorPlan) -> str | None:
    """What became of a weight instead of the type that was asked for, and why; None where it has that type."""
    stored = plan.tensors[0].stored
    if plan.quantized_as in (None, stored):
        return None
    if stored in PLAIN:
        return f"left as {stored}: rows are no multiple of {ggml.TYPES[FALLBACK].block_size}"
    block_size = ggml.TYPES[plan.quantized_as].block_size
    return f"{stored} in place of {plan.quantized_as}: rows are no multiple of {block_size}"


def check_records(parts: Sequence[Part], plans: Sequence[list[TensorPlan]]) -> None:
    """Raises ValueError for an activation record that would have no effect. plans: of each branch."""
    for part, found in zip(parts, plans, strict=True):
        keys = {plan.key.removesuffix(".weight") for plan in found if plan.tensors[0].stored in USES_IMPORTANCE}
        if part.record and not keys & part.record.keys():
            raise ValueError(
                f"{os.path.basename(part.record_path)}: found no layer in this activation record that becomes "
                f"{' or '.join(USES_IMPORTANCE)}, which alone use it. Leave the record out, or pick another type."
            )


def architecture_of(branch: Branch) -> str | None:
    """The name by which its file, or files in circulation, call a model; None for an unknown one."""
    named = branch.metadata.get("general.architecture")
    if isinstance(named, str) and named:
        return named
    if is_ideogram4(branch.weights):
        return "ideogram4"
    return next((name for name, key in _ARCHITECTURES.items() if key in branch.weights), None)


def _stored_type(key: str, weight, wanted: str | None, policy: GgufPolicy) -> str:
    if not is_float(weight):
        if weight.dtype not in _STORED:
            raise ValueError(f"{key}: found {weight.dtype}, which GGUF does not hold. Convert to INT8 safetensors.")
        return _STORED[weight.dtype]
    if 0 in weight.shape:
        return "F32"  # gguf-py reads no empty tensor of another type of floats
    K = matrix_shape(tuple(weight.shape))[1]
    for name in (wanted, FALLBACK) if wanted else ():
        if K % ggml.TYPES[name].block_size == 0:
            return name
    if policy.rest is not None:
        return policy.rest
    stored = _STORED[kept_dtype(weight)]
    return "F32" if stored == "BF16" and not _takes_bf16(key, tuple(weight.shape)) else stored


def _takes_bf16(key: str, shape: tuple[int, ...]) -> bool:
    """Whether other programs read a tensor as BF16. ComfyUI-GGUF does in linear layers, embeddings and convolutions of
    images; bare parameters, other convolutions and gates it loads as F32 or F16 alone."""
    return key.endswith(".weight") and len(shape) in (2, 4) and math.prod(shape) > _SMALL


def _plan(
    key, weight, stored: str, quantized_as: str | None, activations: LayerActivations | None, prefix: str, device
) -> TensorPlan:
    shape = tuple(weight.shape)
    element_bytes = weight.dtype.itemsize if stored in INTEGERS else 0
    output = OutputTensor(prefix + key, shape, stored, tensor_size_bytes(stored, shape, element_bytes))
    rows_count = matrix_shape(shape)[0]

    def stored_rows(rows: slice) -> torch.Tensor:
        return _stored_rows(weight, rows, stored, activations, device)

    def compute() -> Pieces:
        for rows, part in in_pieces(stored_rows, shape, device):
            yield output.name, rows.start * (output.size_bytes // max(1, rows_count)), part

    return TensorPlan(key, (output,), compute, quantized_as)


def _stored_rows(weight, rows: slice, stored: str, activations: LayerActivations | None, device) -> torch.Tensor:
    if stored in INTEGERS:
        return part_of(weight, rows)
    values = finite_floats_of(weight, rows, device)
    if isinstance(weight, GgmlWeight) and weight.ggml_type == stored:
        return part_of(weight, rows).data  # already what is asked for: nothing is lost twice
    importance = None if activations is None else activations.mean_square
    return ggml.quantize(values, stored, importance)


def most_common_type(plans: list[TensorPlan]) -> str:
    """The type that holds most elements: what `general.file_type` speaks of."""
    elements: dict[str, int] = {}
    for plan in plans:
        for tensor in plan.tensors:
            elements[tensor.stored] = elements.get(tensor.stored, 0) + math.prod(tensor.shape)
    return max(elements, key=elements.__getitem__)
