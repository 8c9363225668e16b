"""What `verify` found, for people: a table, worst first, and a picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from ..loaders.branches import ONLY
from .metrics import EXACT_DB
from .names import kind_and_depth
from .picture import Panel
from .tensor_check import QUANTIZED, TensorCheck
from .verify import BranchCheck

SHOWN = 24
# In the picture: what is exact is no better than this.
LARGEST_DB = 60.0


def text(checks: Sequence[BranchCheck], most: int = SHOWN) -> str:
    """All branches. most: tensors listed of each; 0 for none."""
    verdicts = [_foreign_text(check) for check in checks if check.foreign]
    others = [check for check in checks if not check.foreign]
    broken = sum(len(check.broken) for check in others)
    if broken:
        verdicts.append(f"LOOKS BROKEN: {broken} of {_count(others)} tensors.")
    verdicts = verdicts or ["Nothing looks broken."]
    return "\n".join([*verdicts, *(line for check in checks for line in ["", *_branch_lines(check, most)])])


def _foreign_text(check: BranchCheck) -> str:
    median = statistics.median(tensor.sqnr_db for tensor in check.foreign)
    quantized, source = os.path.basename(check.quantized_path), os.path.basename(check.source_path)
    weights = "quantized weights" if check.foreign[0].format.startswith(QUANTIZED) else "weights"
    return (
        f"NOT MADE FROM THIS SOURCE: {len(check.foreign)} {weights} of {quantized}{_branch_text(check)} are not those "
        f"of {source} (median {median:.1f} dB). The files seem to belong to different models or branches: compare it "
        "with the file that it was made from. If this is that file, it is damaged throughout."
    )


def panels(checks: Sequence[BranchCheck]) -> list[Panel]:
    """The quantized weights of each branch by kind of layer and depth; broken ones framed."""
    found = []
    for check in checks:
        values, framed = {}, set()
        for tensor in check.tensors:
            place = kind_and_depth(tensor.name.removesuffix(".weight"))
            if tensor.problems or tensor.format.startswith(QUANTIZED):
                # What cannot be compared is as dark as the worst.
                values[place] = 0.0 if tensor.sqnr_db is None else min(max(tensor.sqnr_db, 0.0), LARGEST_DB)
            if tensor.problems:
                framed.add(place)
        if values:
            title = f"{os.path.basename(check.quantized_path)}{_branch_text(check)}: SQNR of the weights, dB"
            found.append(Panel(f"{title} (framed: broken)", values, framed, low_is_bad=True))
    return found


def _branch_lines(check: BranchCheck, most: int) -> list[str]:
    names = os.path.basename(check.quantized_path), os.path.basename(check.source_path)
    lines = [f"{names[0]} against {names[1]}{_branch_text(check)}, {len(check.tensors)} tensors"]
    if check.linears_only:
        lines.append("  The file holds linear layers alone; norms and embeddings are the source's own.")
    if check.smoothed:
        lines.append(
            f"  Smoothing is folded into {check.smoothed} weights: they are compared with the source smoothed."
        )
    lines += ["", *_formats(check.tensors), ""]
    if check.foreign:
        return lines[:-1]
    worth_showing = [tensor for tensor in check.tensors if tensor.problems or _is_inexact(tensor)]
    if not worth_showing:
        return [*lines, "All tensors are those of the source."]
    shown = worth_showing[:most]
    if not shown:
        return lines[:-1]
    width = max(len(tensor.name) for tensor in shown)
    lines.append(f"{'worst first':<{width}}  {'format':<14}{'SQNR, dB':>9}")
    for tensor in shown:
        sqnr = "-" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f}"
        problems = f"  <- {'; '.join(tensor.problems)}" if tensor.problems else ""
        lines.append(f"{tensor.name:<{width}}  {tensor.format:<14}{sqnr:>9}{problems}")
    return lines


def _branch_text(check: BranchCheck) -> str:
    return "" if check.name == ONLY else f", {check.name} branch"


def _formats(tensors: list[TensorCheck]) -> list[str]:
    by_format: dict[str, list[TensorCheck]] = {}
    for tensor in tensors:
        by_format.setdefault(tensor.format, []).append(tensor)
    lines = [f"{'format':<20}{'tensors':>8}{'worst, dB':>11}{'median, dB':>12}"]
    for name, group in sorted(by_format.items(), key=lambda item: -len(item[1])):
        found = [tensor.sqnr_db for tensor in group if tensor.sqnr_db is not None]
        numbers = (_db_text(min(found)), _db_text(statistics.median(found))) if found else ("-", "-")
        lines.append(f"{name:<20}{len(group):>8}{numbers[0]:>11}{numbers[1]:>12}")
    return lines


def _is_inexact(tensor: TensorCheck) -> bool:
    return tensor.sqnr_db is not None and tensor.sqnr_db < EXACT_DB


def _db_text(value: float) -> str:
    return "exact" if value == EXACT_DB else f"{value:.1f}"


def _count(checks: Sequence[BranchCheck]) -> int:
    return sum(len(check.tensors) for check in checks)
