"""One tensor of a quantized file against its source: the error of what the bytes mean, and what looks broken.

The error of a smoothed weight is counted as activations meet it, smoothed: that is where it was made to be small.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from ..convert.pieces import in_pieces
from ..convert.smoothing import Factors
from ..convert.source import floats_of, part_of
from ..formats import Int8Weight, QuantizedWeight, ggml, int8
from .metrics import EXACT_DB, sqnr_db

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
    # A quantized source is no nearer to the original than its own format allows.
    floor = min(floor_db(name), floor_db(format_name(expected)))
    found = _measured(actual, expected, factors, device)
    if not math.isfinite(found.largest):
        return TensorCheck(key, name, None, ("NaN or infinity",))
    if not math.isfinite(found.signal):
        return TensorCheck(key, name, None, ("the source has NaN or infinity",))
    found_db = sqnr_db(found.signal, found.noise)
    if found.largest == 0 and found.signal > 0:
        return TensorCheck(key, name, found_db, (ALL_ZERO,))
    problems = [f"{found_db:.1f} dB, expected at least {floor:.0f} for {name}"] if found_db < floor else []
    problems += _problems_of_units(found, floor, max(_step(weight) for weight in (actual, expected)))
    if found.wrong_codes and not problems and found.unrounded < UNROUNDED_SHARE * found.nonzero:
        verb = "is" if found.wrong_codes == 1 else "are"
        problems.append(f"{found.wrong_codes} of {math.prod(shape)} codes {verb} wrong")
    same_type = _are_floats(actual, expected) and actual.dtype == expected.dtype
    if found.noise and not problems and factors is None and same_type:
        problems.append("other values than the source, which has the same type")
    return TensorCheck(key, name, found_db, tuple(problems), below_floor=found_db < floor)


class _Measured(NamedTuple):
    """signals, noises, sizes: by unit the energies of the source and of the error and the largest magnitude of the
    values, float64 [units]: squares of float32 may overflow. unit, units: see `_unit`. Others: see `_count_codes`.
    signal, noise, largest: of the whole tensor, NaN if any value is."""

    signals: torch.Tensor
    noises: torch.Tensor
    sizes: torch.Tensor
    unit: int
    units: str
    wrong_codes: int
    unrounded: int
    nonzero: int

    @property
    def signal(self) -> float:
        return float(self.signals.sum())

    @property
    def noise(self) -> float:
        return float(self.noises.sum())

    @property
    def largest(self) -> float:
        return float(self.sizes.max())


def _measured(actual, expected, factors: Factors | None, device: torch.device | str) -> _Measured:
    """One tensor against the other, some rows at a time."""
    shape, is_int8 = tuple(expected.shape), isinstance(actual, Int8Weight)
    smooth = actual.smooth.to(device) if is_int8 and actual.smooth is not None else None
    # A norm or bias that is stored as floats keeps every single value.
    unit, units = _unit(actual, by_element=len(shape) == 1 and _are_floats(actual, expected))

    def compare(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        values, reference = (floats_of(weight, rows, device).double() for weight in (actual, expected))
        if factors is not None:
            reference = factors.apply(reference, rows)
        if smooth is not None:
            values, reference = values / smooth, reference / smooth
        error = values - reference
        energies = (x.square().reshape(-1, unit).sum(dim=1) for x in (reference, error))
        largest = values.abs().reshape(-1, unit).amax(dim=1)
        counts = _count_codes(part_of(actual, rows, device), error) if is_int8 else torch.zeros(3)
        return torch.stack([*energies, largest]).cpu(), counts.cpu()

    by_unit, counts = zip(*(piece for _, piece in in_pieces(compare, shape, device)), strict=True)
    counted = (int(count) for count in torch.stack(counts).sum(dim=0))
    return _Measured(*torch.cat(by_unit, dim=1), unit, units, *counted)


def _problems_of_units(found: _Measured, floor: float, step: float) -> list[str]:
    """What is said of single rows or blocks that are damaged. step: see `_step`."""
    broken = _broken_units(found.signals, found.noises, floor, step**2 * found.unit)
    zeros = int((broken & (found.sizes == 0)).sum())
    others = int((broken & (found.sizes > 0)).sum()) if floor > FLOORS_DB["gguf_q2"] else 0
    problems = []
    if zeros:
        problems.append(f"{zeros} of {len(broken)} {found.units} {'is zero' if zeros == 1 else 'are zeros'}")
    if others:
        problems.append(f"{others} of {len(broken)} {found.units} {'holds' if others == 1 else 'hold'} other values")
    return problems


def _are_floats(*weights: torch.Tensor | QuantizedWeight) -> bool:
    return all(isinstance(weight, torch.Tensor) and weight.dtype in _DTYPE_NAMES for weight in weights)


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
