"""`python evaluation`, as people run it: texts, files and how it ends."""

import csv
import subprocess
import sys

import pytest
import torch
from host_harness import small_models as small
from lowbit.evaluation.__main__ import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file


def run(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "evaluation"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def files(tmp_path):
    source = small.save(tmp_path / "source.safetensors", small.ideogram4(), torch.bfloat16)
    return small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4())), source


def test_verify_prints_a_table_and_writes_a_picture(files, tmp_path):
    done = run("verify", *files, "--most", "3", "--picture", "errors.png", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("Nothing looks broken.\n\nint8.safetensors against source.safetensors")
    assert done.stdout.count("layers.") == 3
    with Image.open(tmp_path / "errors.png") as picture:
        assert picture.width > 300


def test_verify_ends_with_1_for_what_looks_broken_and_with_2_for_what_cannot_be_compared(files, tmp_path):
    stored = load_file(files[0])
    stored["layers.0.attention.o.weight"].zero_()
    save_file(stored, files[0], {"format": "pt"})
    done = run("verify", *files, cwd=tmp_path)
    assert done.returncode == 1 and "LOOKS BROKEN: 1 of 42 tensors." in done.stdout
    assert "layers.0.attention.o.weight" in done.stdout and "<- all zero" in done.stdout
    missing = run("verify", files[0], tmp_path / "gone.safetensors", cwd=tmp_path)
    assert missing.returncode == 2 and not missing.stdout
    assert missing.stderr.startswith("gone.safetensors: found no such file, expected a readable file.")
    nowhere = run("verify", *files, "--picture", "no/such/folder.png", cwd=tmp_path)
    assert nowhere.returncode == 2 and "no/such/folder.png" in nowhere.stderr


def test_ablation_prints_and_writes_its_table(tmp_path):
    done = run("ablation", "--out", "table.csv", cwd=tmp_path)
    assert done.returncode == 0
    assert "The 17 layers with planted outliers are the first of the fragility report." in done.stdout
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["variant"] == "naive" and rows[0]["variant"] in done.stdout
