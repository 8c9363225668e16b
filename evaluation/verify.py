"""A quantized file against its source, tensor by tensor and as a whole: see `tensor_check.py` for one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..convert.neighbours import leftovers
from ..convert.progress import Report, Stage
from ..formats import Int8Weight, QuantizedWeight
from ..loaders.ideogram4 import TEXT_ONLY_MODULES
from .folded import folded_smoothing
from .metrics import EXACT_DB
from .pairs import Files, Pair, open_pairs
from .tensor_check import QUANTIZED, TensorCheck, check_tensor, format_name

# A damaged file has some weights that are off, one that was made from something else all of them.
FOREIGN_SHARE, FOREIGN_COUNT = 0.9, 4

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class BranchCheck:
    """smoothed: how many weights carry folded smoothing, as their source then does too. linears_only: see `Pair`.
    foreign: the matrices that are not the source's, where nearly all are not: the file was made from another one. Only
    quantized ones, if there are any. Empty otherwise."""

    quantized_path: str
    source_path: str
    name: str
    tensors: list[TensorCheck]
    smoothed: int
    linears_only: bool
    foreign: list[TensorCheck]

    @property
    def broken(self) -> list[TensorCheck]:
        return [check for check in self.tensors if check.problems]


@torch.inference_mode()
def verify(
    files: Files,
    device: torch.device | str = "cpu",
    report: Report = lambda progress: None,
    on_checked: Callable[[], None] = lambda: None,
) -> list[BranchCheck]:
    """Compare every branch. report: hears of the bytes read of the quantized files; what it raises ends the comparison.
    on_checked: called once the files are known to be comparable, before time is spent.

    In memory are some rows at a time, and 24 bytes for each row or GGUF block of a weight. Raises ValueError for files
    that cannot be compared.
    """
    pairs, opened = open_pairs(files)
    on_checked()
    total = sum(_size_bytes(weight) for pair in pairs for weight in pair.quantized.weights.values())
    stage = Stage("comparing", total, report)

    def advance(size_bytes: int) -> None:
        stage.advance(size_bytes)
        for file in opened:
            file.release()

    return [_check_branch(pair, device, advance) for pair in pairs]


def _check_branch(pair: Pair, device, advance: Advance) -> BranchCheck:
    quantized, source = pair.quantized.weights, pair.source.weights
    factors = folded_smoothing(quantized, source, device)
    checks = []
    int8_modules = {key.removesuffix(".weight") for key, weight in quantized.items() if isinstance(weight, Int8Weight)}
    dropped = set(leftovers(source, int8_modules))
    for key, expected in source.items():
        if key in quantized:
            checks.append(check_tensor(key, quantized[key], expected, factors.get(key), device))
            advance(_size_bytes(quantized[key]))
        elif key not in dropped and not (pair.name == "unconditional" and key.startswith(TEXT_ONLY_MODULES)):
            checks.append(TensorCheck(key, "-", None, ("missing in the quantized file",)))
    for key in quantized.keys() - source.keys():
        checks.append(TensorCheck(key, format_name(quantized[key]), None, ("not in the source",)))
        advance(_size_bytes(quantized[key]))
    foreign = _foreign([check for check in checks if check.name in source and len(source[check.name].shape) == 2])
    # What looks like smoothing between weights that have nothing to do with each other is none.
    smoothed = 0 if foreign else len(factors)
    paths = pair.quantized.path, pair.source.path
    return BranchCheck(*paths, pair.name, _worst_first(checks), smoothed, pair.linears_only, foreign)


def _foreign(matrices: list[TensorCheck]) -> list[TensorCheck]:
    """Those of another model's, see `BranchCheck`. Norms do not count: they are alike in all models."""
    compared = [check for check in matrices if check.sqnr_db is not None]
    compared = [check for check in compared if check.format.startswith(QUANTIZED)] or compared
    off = [check for check in compared if check.below_floor]
    return off if len(off) >= max(FOREIGN_COUNT, FOREIGN_SHARE * len(compared)) else []


def _worst_first(checks: list[TensorCheck]) -> list[TensorCheck]:
    return sorted(checks, key=lambda check: (not check.problems, EXACT_DB if check.sqnr_db is None else check.sqnr_db))


def _size_bytes(weight: torch.Tensor | QuantizedWeight) -> int:
    return weight.size_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
