#!/usr/bin/env python3
"""Time `python convert` on a whole branch of Ideogram 4: random weights in FP8, to INT8 and to GGUF.

    python benchmarks/conversion.py                          all targets, on the GPU if there is one
    python benchmarks/conversion.py --layers 1 --device cpu  one layer of real width, as on a small machine

The converter runs as users run it, in a process of its own. Rows are added to OUT/conversion.csv: seconds from start to
end, of which reading the source and writing as many bytes as the result has take `disk_s` when nothing is computed
(after the file was read once, as right after a download); peak host memory (GB of 2^30 bytes), mapped pages of the
source included and without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

FOLDER = pathlib.Path(__file__).resolve().parent
TARGETS = {
    "int8": ("int8", "result.safetensors"),
    "int8_convrot": ("int8", "result.safetensors", "--convrot"),
    "q8_0": ("gguf", "result.gguf", "--policy", "q8_0"),
    "q4_k": ("gguf", "result.gguf", "--policy", "q4_k"),
}
# Beside disk time, for a branch of 9.3 B weights on a GPU, and for one layer of real width on two cores.
MOST_S, MOST_S_OF_ONE_LAYER = 180.0, 60.0
GB = 2**30
COPY_BYTES = 2**24
WATCH_INTERVAL_S = 0.02
COLUMNS = (
    *("date", "device", "torch", "triton", "target", "layers", "weights"),
    *("seconds", "disk_s", "source_gb", "result_gb", "peak_ram_gb", "peak_anonymous_ram_gb"),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    import torch  # after the arguments, which are checked at once
    from host_harness import small_models

    from . import e2e_files, e2e_model, results

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = small_models.SMALL if options.tiny else small_models.FULL
    size = dataclasses.replace(size, layers=options.layers or size.layers)
    model = e2e_model.Model(size, device)
    csv = options.out / ("conversion_tiny.csv" if options.tiny else "conversion.csv")
    results.check_columns(csv, COLUMNS)
    options.workdir.mkdir(parents=True, exist_ok=True)
    source = options.workdir / "source.safetensors"
    with torch.inference_mode():
        e2e_files.write_safetensors(source, model, "conditional", e2e_files.FILES["fp8"])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    environment = results.environment(None if device.type == "cuda" else f"cpu, {os.cpu_count()} cores")
    weights = sum(torch.Size(shape).numel() for shape in model.shapes.values())
    for target in options.targets:
        kind, name, *more = TARGETS[target]
        result = options.workdir / name
        command = [sys.executable, str(FOLDER.parent / "convert"), kind, str(source), str(result), *more]
        seconds, resident, anonymous = run([*command, "--device", device.type, "--overwrite"])
        row = {
            **{"target": target, "layers": size.layers, "weights": weights, "seconds": seconds},
            "disk_s": read_and_write(source, result.stat().st_size, options.workdir / "written"),
            **{"source_gb": source.stat().st_size / GB, "result_gb": result.stat().st_size / GB},
            **{"peak_ram_gb": resident / GB, "peak_anonymous_ram_gb": "" if anonymous is None else anonymous / GB},
        }
        result.unlink()
        results.append(csv, COLUMNS, [environment | row])
        print(
            f"{target:14} {seconds:7.1f} s, reading and writing alone {row['disk_s']:.1f} s, "
            f"{row['result_gb']:.2f} GB of {row['source_gb']:.2f}, peak {row['peak_ram_gb']:.2f} GB of RAM  "
            f"{verdict(row, device.type)}",
            flush=True,
        )
    source.unlink()
    return 0


def verdict(row: dict, device_type: str) -> str:
    """What is asked: PASS or short; nothing for other sizes and devices."""
    most = {("cuda", 34): MOST_S, ("cpu", 1): MOST_S_OF_ONE_LAYER}.get((device_type, row["layers"]))
    if most is None:
        return ""
    return f"most {most:.0f} s beside the disk's  {'PASS' if row['seconds'] - row['disk_s'] <= most else 'short'}"


def run(command: list[str]) -> tuple[float, int, int | None]:
    """Seconds that a command took, and its most resident and, where the system says, anonymous bytes. Raises
    RuntimeError where it fails."""
    import psutil

    start, resident, anonymous = time.perf_counter(), 0, None
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.NoSuchProcess:
                break
            resident = max(resident, memory.rss)
            if hasattr(memory, "shared"):  # on Linux
                anonymous = max(anonymous or 0, memory.rss - memory.shared)
            time.sleep(WATCH_INTERVAL_S)
        seconds = time.perf_counter() - start
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-2000:]}")
    return seconds, resident, anonymous


def read_and_write(source: pathlib.Path, size_bytes: int, target: pathlib.Path) -> float:
    """Seconds to read a file and to write and sync so many bytes, one after the other."""
    buffer = bytearray(COPY_BYTES)
    start = time.perf_counter()
    with source.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with target.open("wb", buffering=0) as file:
        for offset in range(0, size_bytes, COPY_BYTES):
            file.write(memoryview(buffer)[: size_bytes - offset])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--targets", type=_targets, default=tuple(TARGETS), metavar="NAME,...", help=", ".join(TARGETS))
    add("--layers", type=int, metavar="N", help="fewer than the model has")
    add("--device", choices=("cpu", "cuda"), help="where weights are quantized (the GPU, if there is one)")
    add("--workdir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "lowbit_conversion")
    add("--out", type=pathlib.Path, default=FOLDER / "results", metavar="DIR", help="of the CSV file")
    add("--tiny", action="store_true", help="a small model, to try this program; results to conversion_tiny.csv")
    return parser


def _targets(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(TARGETS):
        raise argparse.ArgumentTypeError(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return names


if __name__ == "__main__":
    from run import register_packages  # a script finds its neighbours; from here on they are modules of the pack

    register_packages()
    from lowbit.benchmarks import conversion

    sys.exit(conversion.main())
