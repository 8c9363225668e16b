"""A quantized file against its source, tensor by tensor: the error of what the bytes mean, and what looks broken.

The error of a smoothed weight is counted as activations meet it, smoothed: that is where it was made to be small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from ..convert.neighbours import leftovers
from ..convert.pieces import in_pieces
from ..convert.progress import Report, Stage
from ..convert.smoothing import Factors
from ..convert.source import floats_of, part_of
from ..formats import Int8Weight, QuantizedWeight, ggml, int8
from ..loaders.ideogram4 import TEXT_ONLY_MODULES
from .folded import folded_smoothing
from .metrics import EXACT_DB, sqnr_db
from .pairs import Files, Pair, open_pairs

# SQNR in dB below which a weight does not look like a quantization of its source, by the beginning of its format's
# name, first match first. About 10 dB under what normally distributed weights give, a third of it for 2 and 3 bits; a
# scale off by a half or rows in another order come out at 6 dB and less.
FLOORS_DB = {
    "int8": 24.0,
    "fp8": 20.0,
    "gguf_q8_0": 34.0,
    "gguf_q6_k": 24.0,
    "gguf_q5": 20.0,
    "gguf_q4": 13.0,
    "gguf_iq4": 13.0,
    "gguf_q3": 9.0,
    "gguf_q2": 5.0,
    "": 34.0,  # bf16, fp16, fp32: 10 dB under bf16 with a few tiny weights
}
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# How the names of quantized formats begin. Others only carry the rounding of their dtype.
QUANTIZED = ("int8", "fp8", "gguf")
# A damaged file has some weights that are off, one that was made from something else all of them.
FOREIGN_SHARE, FOREIGN_COUNT = 0.9, 4
ALL_ZERO = "all zero"

# Damage in a few rows, or blocks of GGUF, hardly shows in a tensor's SQNR. One is broken if its error has at least half
# of its own energy in the source: zeros give all of it, other numbers twice that, rounding at most a fifth where it is
# worth storing. Rows much smaller than the others legitimately round to zeros where all share a scale. Hence the error
# also has to be larger than what the tensor's floor allows a usual row, than a usual row's error several times
# (rounding to zeros costs at most three times what rounding to many steps does), and than a step for each value, where
# hardly a row is larger than one of a shared INT8 scale, or a block than one of the smallest float16 scales. Q2_K
# misses sparse blocks by more than they hold: only zeros are damage.
BROKEN_SHARE, BROKEN_TIMES = 0.5, 4.0
# A single wrong INT8 code hardly shows in its row. Rounding is off by half a step; where the source is not what the
# file was made from but another quantization of it, by eight and more, and many codes by more than rounding explains.
# The last code of the range stands for anything beyond.
WRONG_CODE_STEPS, ROUNDING_STEPS, LAST_CODE = 16, 0.51, 127
UNROUNDED_SHARE = 0.01  # of the codes that are not zero

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """One tensor of a branch. format: as it is stored now. sqnr_db: None where nothing could be compared.

    problems: phrases for people, empty for a sound tensor. below_floor: whether the SQNR is one of them.
    """

    name: str
    format: str
    sqnr_db: float | None
    problems: tuple[str, ...] = ()
    below_floor: bool = False


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


def check_tensor(
    key: str,
    actual: torch.Tensor | QuantizedWeight,
    expected: torch.Tensor | QuantizedWeight,
    factors: Factors | None = None,
    device: torch.device | str = "cpu",
) -> TensorCheck:
    """factors: what the expected values were multiplied by before they were quantized."""
    name, shape = format_name(actual), tuple(expected.shape)
    if shape == () and tuple(actual.shape) == (1,):  # GGUF has no tensors of no dimensions
        return check_tensor(key, actual, expected.reshape(1), factors, device)
    if tuple(actual.shape) != shape:
        return TensorCheck(key, name, None, (f"shape {list(actual.shape)}, in the source {list(shape)}",))
    if not math.prod(shape):
        return TensorCheck(key, name, EXACT_DB)
    if isinstance(actual, torch.Tensor) and not actual.dtype.is_floating_point:
        same = isinstance(expected, torch.Tensor) and torch.equal(actual, expected)
        return TensorCheck(key, name, EXACT_DB if same else None, () if same else ("other numbers than the source",))
    smooth = actual.smooth.to(device) if isinstance(actual, Int8Weight) and actual.smooth is not None else None

    are_plain = all(isinstance(weight, torch.Tensor) and weight.dtype in _DTYPE_NAMES for weight in (actual, expected))
    by_element = are_plain and len(shape) == 1  # a norm or bias that is stored as floats keeps every single value

    # A quantized source is no nearer to the original than its own format allows.
    floor = min(floor_db(name), floor_db(format_name(expected)))
    unit, units = _unit(actual, by_element)

    def compare(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """By unit the energies of the source and of the error and the largest magnitude of the values, float64
        [3, units], squares of float32 may overflow; and the counts of INT8 codes, see `_count_codes`."""
        values, reference = (floats_of(weight, rows, device).double() for weight in (actual, expected))
        if factors is not None:
            reference = factors.apply(reference, rows)
        if smooth is not None:
            values, reference = values / smooth, reference / smooth
        error = values - reference
        energies = (x.square().reshape(-1, unit).sum(dim=1) for x in (reference, error))
        largest = values.abs().reshape(-1, unit).amax(dim=1)
        is_int8 = isinstance(actual, Int8Weight)
        counts = _count_codes(part_of(actual, rows, device), error) if is_int8 else torch.zeros(3)
        return torch.stack([*energies, largest]).cpu(), counts.cpu()

    by_unit, counts = zip(*(piece for _, piece in in_pieces(compare, shape, device)), strict=True)
    signals, noises, sizes = torch.cat(by_unit, dim=1)
    wrong_codes, unrounded, nonzero = (int(count) for count in torch.stack(counts).sum(dim=0))
    signal, noise, largest = float(signals.sum()), float(noises.sum()), float(sizes.max())  # NaN if any value is
    if not math.isfinite(largest):
        return TensorCheck(key, name, None, ("NaN or infinity",))
    if not math.isfinite(signal):
        return TensorCheck(key, name, None, ("the source has NaN or infinity",))
    found_db = sqnr_db(signal, noise)
    if largest == 0 and signal > 0:
        return TensorCheck(key, name, found_db, (ALL_ZERO,))
    problems = [f"{found_db:.1f} dB, expected at least {floor:.0f} for {name}"] if found_db < floor else []
    smallest = max(_step(weight) for weight in (actual, expected)) ** 2 * unit
    broken = _broken_units(signals, noises, floor, smallest)
    zeros = int((broken & (sizes == 0)).sum())
    others = int((broken & (sizes > 0)).sum()) if floor > FLOORS_DB["gguf_q2"] else 0
    if zeros:
        problems.append(f"{zeros} of {len(broken)} {units} {'is zero' if zeros == 1 else 'are zeros'}")
    if others:
        problems.append(f"{others} of {len(broken)} {units} {'holds' if others == 1 else 'hold'} other values")
    if wrong_codes and not problems and unrounded < UNROUNDED_SHARE * nonzero:
        problems.append(f"{wrong_codes} of {math.prod(shape)} codes {'is' if wrong_codes == 1 else 'are'} wrong")
    if noise and not problems and factors is None and are_plain and actual.dtype == expected.dtype:
        problems.append("other values than the source, which has the same type")
    return TensorCheck(key, name, found_db, tuple(problems), below_floor=found_db < floor)


def _unit(weight: torch.Tensor | QuantizedWeight, by_element: bool) -> tuple[int, str]:
    """How many elements in a row share a scale, or stand together where none do, and what a problem calls them."""
    if by_element:
        return 1, "elements"
    if isinstance(weight, ggml.GgmlWeight):
        return ggml.type_from_name(weight.ggml_type).block_size, "blocks"
    return weight.shape[-1] if len(weight.shape) else 1, "rows"


def _count_codes(weight: Int8Weight, error: torch.Tensor) -> torch.Tensor:
    """How many codes of a weight are wrong, how many are not just rounded and how many are not zero, int64 [3]: see
    WRONG_CODE_STEPS. error: [rows, K], of the values as activations meet them, smoothed but not rotated."""
    error = error.float()
    if weight.rotation_group:  # back to where the codes are: a Hadamard matrix is its own inverse
        error = int8.rotate(error, weight.rotation_group)
    steps, codes = error.abs() / weight.scale, weight.data
    is_clipped = ((codes >= LAST_CODE) & (error < 0)) | ((codes <= -LAST_CODE) & (error > 0))
    counted = (steps > WRONG_CODE_STEPS) & ~is_clipped, steps > ROUNDING_STEPS, codes != 0
    return torch.stack([each.sum() for each in counted])


def _broken_units(signals: torch.Tensor, noises: torch.Tensor, floor: float, smallest: float) -> torch.Tensor:
    """Which units are damaged, bool [units], by the energies of source and error [units]: see BROKEN_SHARE.

    smallest: an error up to this is none.
    """
    smallest = max(smallest, BROKEN_TIMES * float(noises.median()))
    if bool((signals > 0).any()):
        smallest = max(smallest, float(signals[signals > 0].median()) * 10 ** (-floor / 10))
    return (noises >= BROKEN_SHARE * signals) & (noises > smallest)


def _step(weight: torch.Tensor | QuantizedWeight) -> float:
    """What rounding costs a value however small it is: a step of an INT8 weight of which all rows share a scale; in
    GGUF 2^-25, the error of the smallest float16 scale, times the largest factor: 255 at most in blocks of 32, 128 x 32
    in a super-block (Q6_K)."""
    if isinstance(weight, Int8Weight):
        return 0.0 if weight.per_channel else float(weight.scale)
    if isinstance(weight, ggml.GgmlWeight):
        return 2.0**-13 if ggml.type_from_name(weight.ggml_type).block_size == 256 else 2.0**-17
    return 0.0


def floor_db(format: str) -> float:
    return next(floor for beginning, floor in FLOORS_DB.items() if format.startswith(beginning))


def format_name(weight: torch.Tensor | QuantizedWeight) -> str:
    if isinstance(weight, QuantizedWeight):
        return weight.format_name
    return _DTYPE_NAMES.get(weight.dtype, str(weight.dtype).removeprefix("torch."))


def _size_bytes(weight: torch.Tensor | QuantizedWeight) -> int:
    return weight.size_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
