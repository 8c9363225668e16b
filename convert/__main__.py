#!/usr/bin/env python3
"""Make INT8 safetensors or GGUF files from a BF16, FP16, FP32, FP8, INT8 or GGUF checkpoint, without ComfyUI running.

    python convert int8 model_fp8.safetensors model_int8.safetensors
    python convert int8 model.safetensors out.safetensors --unconditional model_uncond.safetensors \\
        --record activations.safetensors activations_uncond.safetensors
    python convert int8 model.safetensors out.safetensors --report fragility.json --protect-top 17
    python convert gguf model_fp8.safetensors model-Q4_K.gguf --policy q4_k --device cuda

`python convert` is this folder, wherever it lies: `python custom_nodes/lowbit/convert`, in ComfyUI's environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a path may have letters it lacks
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(f"{sys.executable} has no torch. Run this by the Python that runs ComfyUI.\n")
        return 1
    runpy.run_path(str(ROOT / "convert" / "register_package.py"))
    from lowbit.convert.terminal import TerminalLine

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
        return convert_to_int8(request, Int8Options(options.convrot, options.smooth_alpha), report, _remark)
    return convert_to_gguf(request, GgufOptions(read_policy(options.policy), options.architecture), report, _remark)


def _remark(parts: list) -> None:
    from lowbit.convert.remarks import remarks

    for remark in remarks(parts):
        sys.stderr.write(f"{remark}\n")


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
        help="activation record, one for each branch, the conditional one first: switches SmoothQuant on for int8, and "
        "tells q4_k, q5_k and q6_k which input channels matter",
    )
    shared.add_argument(
        "--protect",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers that stay unquantized: names, parts of names, or patterns such as 'layers.*.feed_forward.w2'",
    )
    shared.add_argument(
        "--report", nargs="+", default=[], metavar="FILE", help="fragility report, one for each branch, likewise"
    )
    shared.add_argument(
        "--protect-top", type=_count, metavar="N", help="of the report's layers that stay unquantized (17)"
    )
    shared.add_argument("--device", default="cpu", help="what computes: cpu (default), cuda, cuda:1")
    shared.add_argument("--overwrite", action="store_true", help="replace files that exist")

    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="container", required=True)
    to_int8 = commands.add_parser("int8", parents=[shared], help="INT8 safetensors in ComfyUI's own format")
    to_int8.add_argument("--convrot", action="store_true", help="rotate input features in groups (ConvRot)")
    to_int8.add_argument("--smooth-alpha", type=float, metavar="A", help="of SmoothQuant, with --record (0.5)")
    to_gguf = commands.add_parser("gguf", parents=[shared], help="GGUF")
    to_gguf.add_argument(
        "--policy",
        default="q4_k",
        help="q4_k (default), q5_k, q6_k, q8_0, q4_0, q4_1, q5_0, q5_1, or a policy file (JSON)",
    )
    to_gguf.add_argument(
        "--architecture", metavar="NAME", help="for general.architecture; found by itself for known models"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of layers, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
