"""benchmarks/conversion.py at sizes without meaning: the converter runs for every target, what it took is written."""

import csv
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "conversion.py"


def run(folder, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), "--tiny", "--device", "cpu", "--workdir", str(folder / "work"), *options]
    return subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True)


def test_every_target_has_a_row(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "conversion_tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == ["int8", "int8_convrot", "q8_0", "q4_k"]
    for row in rows:
        assert row["device"].startswith("cpu, ") and row["layers"] == "2"
        assert 0 < float(row["disk_s"]) < float(row["seconds"])
        if sys.platform == "linux":  # elsewhere nobody says which pages are mapped
            assert 0 < float(row["peak_anonymous_ram_gb"]) < float(row["peak_ram_gb"])
        assert row["target"] in done.stdout
    sizes = {row["target"]: float(row["result_gb"]) for row in rows}
    assert sizes["q4_k"] < sizes["int8"] < float(rows[0]["source_gb"])
    assert not list((tmp_path / "work").iterdir())  # gigabytes, at full size


def test_a_converter_that_fails_is_shown():
    from lowbit.benchmarks import conversion

    command = [sys.executable, "-c", "import sys; sys.exit('no room on the disk')"]
    with pytest.raises(RuntimeError, match="ended with 1:\nno room on the disk"):
        conversion.run(command)


def test_what_is_asked_depends_on_the_device_and_the_size():
    from lowbit.benchmarks import conversion

    row = {"seconds": 190.0, "disk_s": 15.0, "layers": 34}
    assert conversion.verdict(row, "cuda").endswith("PASS")
    assert conversion.verdict(row | {"disk_s": 5.0}, "cuda").endswith("short")
    assert conversion.verdict(row | {"layers": 1}, "cpu").endswith("short")
    assert conversion.verdict(row, "cpu") == conversion.verdict(row | {"layers": 2}, "cuda") == ""


def test_an_unknown_target_is_refused(tmp_path):
    done = run(tmp_path, "--targets", "int8,q9")
    assert done.returncode == 2 and "no target q9; there are int8, int8_convrot, q8_0, q4_k" in done.stderr
