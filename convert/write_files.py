"""Files from their plans: a few rows of one tensor at a time, and all of the files or none."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from ..loaders import CheckpointError
from ..loaders.errors import TAKE_ANOTHER, quoted
from .file_layout import FileLayout
from .output_file import OutputFile, check_space, commit_together
from .progress import Report, Stage
from .source import Sources
from .tensor_plan import NotFiniteError, Pieces, SmoothedRangeError, TensorPlan

# More than header and padding ever take beside the tensors.
_HEADER_ROOM_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """A file to write: its tensors, and where they go. source: path of what it is made from, for error texts."""

    target: str
    source: str
    plans: Sequence[TensorPlan]
    layout: FileLayout


def size_bytes(plans: Sequence[TensorPlan]) -> int:
    return sum(tensor.size_bytes for plan in plans for tensor in plan.tensors)


def check_room(target: str, plans: Sequence[TensorPlan]) -> None:
    """Refuse what the disk has no room for; plans: of all files that go to the folder of `target`."""
    check_space(os.path.dirname(os.path.abspath(target)), size_bytes(plans) + _HEADER_ROOM_BYTES)


def write_files(files: Sequence[FilePlan], overwrite: bool, sources: Sources, report: Report) -> None:
    """Write the files. Whatever is raised, by `report` too, leaves none of them behind."""
    stage = Stage("writing", sum(size_bytes(file.plans) for file in files), report)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(OutputFile(file.target, overwrite)) for file in files]
        for file, output in zip(files, opened, strict=True):
            output.write(0, file.layout.header)
            for plan in file.plans:
                _write_tensors(file, plan, output, stage, sources)
        for file, output in zip(files, opened, strict=True):
            output.finish(file.layout.size_bytes)
        sources.check_unchanged()
        # Only renaming is left, once nothing else can fail: two branches belong together.
        commit_together(opened)


def _write_tensors(file: FilePlan, plan: TensorPlan, output: OutputFile, stage: Stage, sources: Sources) -> None:
    with contextlib.closing(_explained(file.source, plan)) as pieces:  # so that no worker goes on after an error
        for name, start, data in pieces:
            output.write(file.layout.offsets[name] + start, data)
            stage.advance(data.nbytes)
            sources.release()


def _explained(source: str, plan: TensorPlan) -> Iterator[tuple]:
    """The pieces of a plan; what its values do not allow is said of the file that they come from."""
    pieces: Pieces = plan.compute()
    while True:
        try:
            piece = next(pieces, None)
        except NotFiniteError as error:
            raise CheckpointError(
                source,
                found=f"{quoted(plan.key)} with values that are not finite ({error})",
                expected="a sound weight",
                todo=f"The file is damaged or was made by a faulty program: {TAKE_ANOTHER}",
            ) from error
        except SmoothedRangeError as error:
            stored = plan.tensors[0].stored
            raise CheckpointError(
                source,
                found=f"{quoted(plan.key)} with values that {stored} cannot hold once they are smoothed ({error})",
                expected=f"values in the range of {stored}",
                todo="Lower the alpha of smoothing (--smooth-alpha), or leave the activation record out.",
            ) from error
        except ValueError as error:
            stored = plan.tensors[0].stored
            raise CheckpointError(
                source,
                found=f"{quoted(plan.key)} with finite values that {stored} cannot hold ({error})",
                expected=f"values in the range of {stored}",
                todo="Protect the layer, which then stays unquantized, or write GGUF by a policy file that gives it "
                "a type of wider range, such as BF16 or F32.",
            ) from error
        if piece is None:
            return
        yield piece
