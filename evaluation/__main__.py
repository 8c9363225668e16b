#!/usr/bin/env python3
"""Compare a quantized file with its source, or measure what a recipe is worth, without ComfyUI running.

    python evaluation verify model_int8.safetensors model_fp8.safetensors --picture errors.png
    python evaluation verify both-Q4_K.gguf model.safetensors --source-unconditional model_uncond.safetensors
    python evaluation ablation

`python evaluation` is this folder, wherever it lies: `python custom_nodes/lowbit/evaluation`, in ComfyUI's environment.
`verify` ends with 0 if nothing looks broken, 1 if something does, 2 if the files cannot be compared.
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
    # As stderr does: a name that the terminal cannot show is no failure.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(f"{sys.executable} has no torch. Run this by the Python that runs ComfyUI.\n")
        return 2
    runpy.run_path(str(ROOT / "convert" / "register_package.py"))
    try:
        return verify(options) if options.command == "verify" else ablation(options)
    except KeyboardInterrupt:
        sys.stderr.write("\nCancelled.\n")
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def verify(options: argparse.Namespace) -> int:
    from lowbit.convert.output_file import check_targets
    from lowbit.convert.request import check_device
    from lowbit.convert.terminal import TerminalLine
    from lowbit.evaluation import picture, verify_report
    from lowbit.evaluation.pairs import Files
    from lowbit.evaluation.verify import verify

    files = Files(options.quantized, options.source, options.unconditional, options.source_unconditional)
    check_device(options.device)
    if options.overwrite and not options.picture:
        raise ValueError("--overwrite: found no --picture whose file it could replace. Leave it out.")
    if options.picture:
        check_targets([options.picture], filter(None, vars(files).values()), options.overwrite)
        picture.check_ending(options.picture)
    line = TerminalLine()
    try:
        checks = verify(files, options.device, line)
    finally:
        line.end()
    sys.stdout.write(verify_report.text(checks, options.most) + "\n")
    if options.picture:
        if panels := verify_report.panels(checks):
            picture.draw(panels).save(options.picture)
        else:
            sys.stdout.write("\nNo picture was written: no weight is quantized.\n")
    return 1 if any(check.broken for check in checks) else 0


def ablation(options: argparse.Namespace) -> int:
    from lowbit.convert.output_file import check_targets
    from lowbit.evaluation import ablation

    if options.overwrite and not options.out:
        raise ValueError("--overwrite: found no --out whose file it could replace. Leave it out.")
    if options.out:
        check_targets([options.out], [], options.overwrite)
    found = ablation.run(options.seed)
    sys.stdout.write(ablation.as_text(found.rows) + "\n\n")
    first = "the first" if found.planted_rank_first else "NOT the first"
    sys.stdout.write(f"The {len(found.planted)} layers with planted outliers are {first} of the fragility report.\n")
    if options.out:
        ablation.write_csv(options.out, found.rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_verify = commands.add_parser("verify", help="a quantized file against its source, tensor by tensor")
    to_verify.add_argument("quantized", help="quantized checkpoint; all branches in it are compared")
    to_verify.add_argument("source", help="what it was made from: BF16, FP16, FP8, ...")
    to_verify.add_argument(
        "--unconditional", metavar="FILE", help="the quantized unconditional branch, if in another file"
    )
    to_verify.add_argument("--source-unconditional", metavar="FILE", help="the source of that branch, likewise")
    to_verify.add_argument("--device", default="cpu", help="what computes: cpu (default), cuda, cuda:1")
    to_verify.add_argument(
        "--most", type=_count, default=24, metavar="N", help="tensors listed of each branch (24), 0 for none"
    )
    to_verify.add_argument("--picture", metavar="FILE", help="write a picture of the errors, such as errors.png")
    to_verify.add_argument("--overwrite", action="store_true", help="replace a picture that exists")
    of_recipe = commands.add_parser("ablation", help="what recipes are worth on a model with known outliers")
    of_recipe.add_argument("--seed", type=int, default=0)
    of_recipe.add_argument("--out", metavar="FILE", help="write the table to a CSV file, too")
    of_recipe.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of tensors, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
