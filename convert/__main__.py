#!/usr/bin/env python3
"""Make INT8 safetensors or GGUF files from a BF16, FP16, FP32, FP8, INT8 or GGUF checkpoint, without ComfyUI running.

    python convert int8 model_fp8.safetensors model_int8.safetensors
    python convert int8 model.safetensors out.safetensors --unconditional model_uncond.safetensors \\
        --record activations.safetensors activations_uncond.safetensors --report fragility.json --protect-top 17
    python convert gguf model_fp8.safetensors model-Q4_K.gguf --policy q4_k --device cuda

`python convert` is this folder, wherever it lies: `python custom_nodes/lowbit/convert`, in ComfyUI's environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(f"{sys.executable} has no torch. Run this by the Python that runs ComfyUI.\n")
        return 1
    register_package()
    line = TerminalLine()
    try:
        for written in convert(options, line):
            line.end()
            sys.stdout.write(f"{written}\n")
    except KeyboardInterrupt:
        line.end()
        sys.stderr.write("Cancelled: nothing was written.\n")
        return 130
    except (ValueError, RuntimeError) as error:
        line.end()
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def convert(options: argparse.Namespace, report) -> list:
    from lowbit.convert.gguf import GgufOptions
    from lowbit.convert.int8 import Int8Options
    from lowbit.convert.job import convert_to_gguf, convert_to_int8
    from lowbit.convert.policy import read_policy
    from lowbit.convert.request import Request

    request = Request(
        source=options.source,
        target=options.target,
        unconditional=options.unconditional,
        one_file=options.one_file,
        overwrite=options.overwrite,
        protected=tuple(options.protect),
        reports=tuple(options.report),
        protect_count=options.protect_top,
        records=tuple(options.record),
        device=options.device,
    )
    if options.container == "int8":
        return convert_to_int8(request, Int8Options(options.convrot, options.smooth_alpha), report)
    return convert_to_gguf(request, GgufOptions(read_policy(options.policy), options.architecture), report)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("source", help="the checkpoint; all branches in it are converted")
    shared.add_argument("target", help="the file to write")
    shared.add_argument("--unconditional", metavar="FILE", help="the unconditional branch, if it is a file of its own")
    shared.add_argument(
        "--one-file",
        action="store_true",
        help="write two branches into one file, which Lowbit reads; without it a file each, the second called "
        "<target>_uncond, which other programs read too",
    )
    shared.add_argument(
        "--record",
        nargs="+",
        default=[],
        metavar="FILE",
        help="activation record, one or one for each branch: switches SmoothQuant on for int8, and tells q4_k which "
        "input channels matter",
    )
    shared.add_argument(
        "--protect",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers that stay unquantized: names, parts of names, or patterns such as 'layers.*.feed_forward.w2'",
    )
    shared.add_argument(
        "--report", nargs="+", default=[], metavar="FILE", help="fragility report, one or one for each branch"
    )
    shared.add_argument(
        "--protect-top", type=_count, default=17, metavar="N", help="of the report's layers that stay unquantized (17)"
    )
    shared.add_argument("--device", default="cpu", help="what computes: cpu (default), cuda, cuda:1")
    shared.add_argument("--overwrite", action="store_true", help="replace files that exist")

    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="container", required=True)
    to_int8 = commands.add_parser("int8", parents=[shared], help="INT8 safetensors in ComfyUI's own format")
    to_int8.add_argument("--convrot", action="store_true", help="rotate input features in groups (ConvRot)")
    to_int8.add_argument(
        "--smooth-alpha", type=float, default=0.5, metavar="A", help="of SmoothQuant, with --record (0.5)"
    )
    to_gguf = commands.add_parser("gguf", parents=[shared], help="GGUF")
    to_gguf.add_argument(
        "--policy", default="q4_k", help="q4_k (default), q8_0, q4_0, q4_1, q5_0, q5_1, or a policy file (JSON)"
    )
    to_gguf.add_argument(
        "--architecture", metavar="NAME", help="for general.architecture; found by itself for known models"
    )
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"a number of layers, found {text}")
    return count


def register_package() -> None:
    """The pack is a folder under any name, not an installed package: `lowbit` is what its modules are imported by."""
    # Python puts the folder of a script on the path, where our `gguf.py` and others would hide packages of that name.
    folder = str(pathlib.Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if not entry or str(pathlib.Path(entry).resolve()) != folder]
    if "lowbit" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "lowbit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


class TerminalLine:
    """Progress in one line that is written over; in a log file, a line each ten seconds."""

    def __init__(self, stream=sys.stderr):
        self._stream, self._stage, self._next_s = stream, None, 0.0
        self._interval_s = 0.2 if stream.isatty() else 10.0

    def __call__(self, progress) -> None:
        now = time.monotonic()
        is_last = progress.done_bytes >= progress.total_bytes
        if progress.stage != self._stage:
            self.end()
        elif now < self._next_s and not is_last:
            return
        self._stage, self._next_s = progress.stage, now + self._interval_s
        if self._stream.isatty():
            self._stream.write(f"\r{progress!s:<78}")
        else:
            self._stream.write(f"{progress}\n")
        self._stream.flush()

    def end(self) -> None:
        if self._stage is not None and self._stream.isatty():
            self._stream.write("\n")
        self._stage = None


if __name__ == "__main__":
    sys.exit(main())
