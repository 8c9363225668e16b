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
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evaluation" / "results"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.stderr.write(f"{sys.executable} has no torch. Run this by the Python that runs ComfyUI.\n")
        return 2
    register_package()
    try:
        return verify(options) if options.command == "verify" else ablation(options)
    except KeyboardInterrupt:
        sys.stderr.write("\nCancelled.\n")
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def verify(options: argparse.Namespace) -> int:
    from lowbit.evaluation import picture, verify_report
    from lowbit.evaluation.pairs import Files
    from lowbit.evaluation.verify import verify

    files = Files(options.quantized, options.source, options.unconditional, options.source_unconditional)
    try:
        checks = verify(files, options.device, _show_progress)
    finally:
        _show_progress(0, 0)
    sys.stdout.write(verify_report.text(checks, options.most) + "\n")
    if options.picture and (panels := verify_report.panels(checks)):
        picture.draw(panels).save(options.picture)
    return 1 if any(check.broken for check in checks) else 0


def ablation(options: argparse.Namespace) -> int:
    from lowbit.evaluation import ablation

    found = ablation.run(options.seed)
    sys.stdout.write(ablation.as_text(found.rows) + "\n\n")
    first = "the first" if found.planted_rank_first else "NOT the first"
    sys.stdout.write(f"The {len(found.planted)} layers with planted outliers are {first} of the fragility report.\n")
    if options.out:
        ablation.write_csv(options.out, found.rows)
    return 0


def _show_progress(done_bytes: int, total_bytes: int) -> None:
    """One line of a terminal, written over; emptied at the end."""
    if sys.stderr.isatty():
        line = f"comparing: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB" if total_bytes else ""
        sys.stderr.write(f"\r{line:<50}\r")


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
    to_verify.add_argument("--most", type=int, default=24, metavar="N", help="tensors listed of each branch (24)")
    to_verify.add_argument("--picture", metavar="FILE", help="write a picture of the errors, such as errors.png")
    of_recipe = commands.add_parser("ablation", help="what recipes are worth on a model with known outliers")
    of_recipe.add_argument("--seed", type=int, default=0)
    of_recipe.add_argument("--out", metavar="FILE", default=str(RESULTS / "ablation.csv"), help="CSV file to write")
    return parser


def register_package() -> None:
    """The pack is a folder under any name, not an installed package: `lowbit` is what its modules are imported by."""
    # Python puts the folder of a script on the path, where our modules would hide packages of the same names.
    folder = str(pathlib.Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if not entry or str(pathlib.Path(entry).resolve()) != folder]
    if "lowbit" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "lowbit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
