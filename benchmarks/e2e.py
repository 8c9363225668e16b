#!/usr/bin/env python3
"""Measure Ideogram 4 at full size in the real ComfyUI on this machine's GPU: Lowbit's loaders beside the stock ones.

    python benchmarks/e2e.py                                            the default variants at 1024
    python benchmarks/e2e.py --size 1024,2048 --variants stock_bf16,lowbit_int8,lowbit_int8_lora
    python benchmarks/e2e.py --free-vram-gb all,24,12 --variants stock_int8,lowbit_int8,lowbit_q4_k --alternate 4
    python benchmarks/e2e.py --variants lowbit_int8,lowbit_int8_two_gpus
    python benchmarks/e2e.py --profile stock_int8,lowbit_int8

Random weights, both branches, the stock sampler through the stock guider of two models. Rows are added to OUT/e2e.csv,
every number goes to OUT/e2e.json, and OUT/e2e.png shows each size's run of the most variants. GB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time

FOLDER = pathlib.Path(__file__).resolve().parent
SIZE, SMALL_SIZE, SIZE_STEP = 1024, 256, 16


def main(arguments: list[str] | None = None) -> int:
    from . import e2e_host

    started, options = time.perf_counter(), parse(arguments)
    try:
        host = e2e_host.start(options.workdir.resolve(), options.tiny, options.fast_disk)
        print(", ".join(f"{key} {value}" for key, value in host.describe().items()), flush=True)
        for free_vram_gb in options.free_vram_gb:  # what cannot be left free is said before anything takes time
            host.leave_free(free_vram_gb)
    except e2e_host.CannotRunError as error:
        print(error, file=sys.stderr)
        return 2

    import torch  # not before ComfyUI has chosen its allocator

    from .e2e_run import Run

    with torch.inference_mode():  # as ComfyUI runs every node
        return Run(options, host, started).measure_all()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from . import e2e_variants

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variants", type=names, default=e2e_variants.DEFAULT, metavar="NAME,...", help=e2e_variants.NAMES)
    add("--size", type=sizes, metavar="PIXELS,...", help=f"of the square image ({SIZE})")
    add(
        "--steps",
        type=at_least(2),
        default=12,
        metavar="N",
        help="of each sampling; the first one is counted by itself (12)",
    )
    add(
        "--free-vram-gb",
        type=amounts,
        default=(None,),
        metavar="GB,...",
        help="take device memory until only so much is free; several amounts, and `all`, are measured in turn",
    )
    add("--cold", action="store_true", help="load each file once more, from the disk")
    add("--fast-disk", action="store_true", help="start ComfyUI with this option; results to e2e_fast_disk.*")
    add(
        "--profile",
        type=names,
        default=(),
        metavar="NAME,...",
        help="where a conditional call of these spends its time",
    )
    add(
        "--alternate", type=at_least(1), metavar="N", help="time each branch's call N times in turn, count copied bytes"
    )
    add("--budget", type=float, metavar="SECONDS", help="start nothing that probably ends later")
    add(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / "lowbit_e2e",
        metavar="DIR",
        help="for the models' files, 38 GB at most, and ComfyUI's base directory",
    )
    add("--out", type=pathlib.Path, default=FOLDER / "results", metavar="DIR", help="of the results")
    add("--layers", type=at_least(1), metavar="N", help="fewer layers than the model has, results to e2e_<N>_layers.*")
    add("--tiny", action="store_true", help="a small model on the CPU, to try this program; results to e2e_tiny.*")
    options = parser.parse_args(arguments)
    options.size = options.size or (SMALL_SIZE if options.tiny else SIZE,)
    options.variants = e2e_variants.in_order(options.variants)
    if unknown := set(options.profile) - {variant.name for variant in options.variants}:
        parser.error(f"--profile: {', '.join(sorted(unknown))} not among --variants")
    if options.tiny and options.free_vram_gb != (None,):
        parser.error("--free-vram-gb needs a CUDA device, --tiny runs on the CPU")
    return options


def names(text: str) -> tuple[str, ...]:
    from . import e2e_variants

    try:
        return tuple(e2e_variants.variant(name).name for name in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sizes(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    if any(number < SMALL_SIZE or number % SIZE_STEP for number in numbers):
        raise argparse.ArgumentTypeError(f"sizes are multiples of {SIZE_STEP} from {SMALL_SIZE} on, found {text}")
    return numbers


def amounts(text: str) -> tuple[float | None, ...]:
    return tuple(None if amount == "all" else float(amount) for amount in text.split(","))


def at_least(smallest: int):
    def count(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"at least {smallest}, found {text}")
        return int(text)

    return count


if __name__ == "__main__":
    from run import register_packages  # a script finds its neighbours; from here on they are modules of the pack

    register_packages()
    from lowbit.benchmarks import e2e

    code = e2e.main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's shutdown: threads of ComfyUI and tens of GB of page-locked memory would go with it.
    os._exit(code)
