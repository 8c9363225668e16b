#!/usr/bin/env python3
"""Measure Lowbit's kernels beside other projects' on this machine's GPU: tests first, then timing.

    python benchmarks/run.py                                  everything
    python benchmarks/run.py --only quantize --M 4352         a part

Rows are added to OUT/<benchmark>.csv, and the README's picture OUT/int8_linear.png is drawn from the newest. After red
tests nothing is timed; what --skip-tests measures goes to OUT/<benchmark>_untested.csv.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import pathlib
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = {"lowbit": ROOT, "host_harness": ROOT / "tests" / "host_harness"}

# In this order: importing ComfyUI, as the last one does, changes settings of the whole process.
BENCHMARKS = ("int8_linear", "quantize", "gguf_linear", "gguf_unpack", "block")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=benchmark_names, default=BENCHMARKS, metavar="NAME,...", help=", ".join(BENCHMARKS)
    )
    parser.add_argument(
        "--M", type=token_counts, metavar="M,...", help="tokens of the layers that see the whole image (4352,16640)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="of the CSV files and the picture",
    )
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="of which the median counts (12)")
    parser.add_argument("--quick", action="store_true", help="few rounds, and M=4352 alone unless --M says otherwise")
    parser.add_argument("--skip-tests", action="store_true", help="time without the tests; the files' names say so")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("The benchmarks need a CUDA device, and torch finds none on this machine.", file=sys.stderr)
        return 2
    if options.skip_tests:
        print("Tests skipped: what follows is measured on kernels that may be wrong.")
    elif not tests_pass():
        print("The kernels' tests fail (above): nothing is timed. --skip-tests times all the same.", file=sys.stderr)
        return 1
    register_packages()
    with torch.inference_mode():  # as ComfyUI runs every node
        return measure(options)


def benchmark_names(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    if unknown := set(wanted) - set(BENCHMARKS):
        raise argparse.ArgumentTypeError(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    return tuple(name for name in BENCHMARKS if name in wanted)


def token_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(number) for number in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"M counts tokens, found {text}")
    return counts


def register_packages() -> None:
    """The pack is a folder, not an installed package: its name, and that of the tests' ComfyUI, as in the tests."""
    for name, folder in PACKAGES.items():
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


def tests_pass() -> bool:
    """The kernels' tests, in a process of their own. Not from the root, which `-m` would put on `sys.path`."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "kernels"), "-q"]
    return subprocess.run(command, cwd=ROOT / "tests").returncode == 0


def measure(options: argparse.Namespace) -> int:
    """Every benchmark asked for, each row into its file as soon as it is there. Returns 1 if one of them broke off."""
    import torch
    from lowbit.benchmarks import peers, results, shapes, timing

    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowbit").setLevel(logging.INFO)  # says once which implementation computes an op
    modules = {name: importlib.import_module(f"lowbit.benchmarks.bench_{name}") for name in options.only}
    files = {name: options.out / csv_name(module.CSV_NAME, options.skip_tests) for name, module in modules.items()}
    for name, module in modules.items():  # before anything takes time
        results.check_columns(files[name], module.COLUMNS)

    environment = results.environment()
    print(", ".join(f"{key} {value}" for key, value in environment.items()), end="")
    print(f", comfy-kitchen {peers.comfy_kitchen_version()}")
    clock = timing.CudaClock()
    asked = timing.Options(
        measure=timing.Measure(clock, rounds=3, warmup_ms=200.0)
        if options.quick
        else timing.Measure(clock, rounds=options.rounds),
        device=torch.device("cuda"),
        tokens=options.M or (shapes.TOKENS[:1] if options.quick else None),
    )
    demands, broken = [], []
    for name, module in modules.items():
        print(f"\n{name}")
        rows = []
        try:
            for row in module.rows(asked):
                rows.append(row)
                results.append(files[name], module.COLUMNS, [environment | row])
                print("  ".join(f"{key} {results.written(value)}" for key, value in row.items()), flush=True)
        except Exception:  # the other benchmarks are worth their time all the same
            traceback.print_exc()
            broken.append(name)
        demands += module.demands(rows) if hasattr(module, "demands") else []

    if demands:
        print(f"\n{results.table(demands)}")
    if "int8_linear" in modules and "int8_linear" not in broken and not options.skip_tests:
        picture = files["int8_linear"].with_suffix(".png")
        try:
            results.draw(files["int8_linear"], picture)
            print(f"\ndrawn: {picture}")
        except ImportError as error:
            print(f"\nnot drawn: {picture}: {error}")
    if broken:
        print(f"\nBroke off (above): {', '.join(broken)}")
    if options.skip_tests:
        print("Tests skipped: these numbers are of kernels that may be wrong.")
    return 1 if broken else 0


def csv_name(name: str, untested: bool) -> str:
    return name.replace(".csv", "_untested.csv") if untested else name


if __name__ == "__main__":
    sys.exit(main())
