"""`python evaluation`, as people run it: texts, files and how it ends."""

import csv
import os
import re
import subprocess
import sys

import pytest
import torch
from host_harness import small_models as small
from lowbit.evaluation.__main__ import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file


def run(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "evaluation"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


@pytest.fixture
def files(tmp_path):
    source = small.save(tmp_path / "source.safetensors", small.ideogram4(), torch.bfloat16)
    return small.save(tmp_path / "int8.safetensors", small.int8_native(small.ideogram4())), source


def test_verify_prints_a_table_and_writes_a_picture(files, tmp_path):
    done = run("verify", *files, "--most", "3", "--picture", "errors.png", cwd=tmp_path)
    assert done.returncode == 0 and re.fullmatch(r"(comparing: .*/s.*\n)+", done.stderr)
    assert done.stdout.startswith("Nothing looks broken.\n\nint8.safetensors against source.safetensors")
    assert done.stdout.count("layers.") == 3
    with Image.open(tmp_path / "errors.png") as picture:
        assert picture.width > 300


def test_verify_lists_as_many_tensors_as_asked_for(files, tmp_path):
    none = run("verify", *files, "--most", "0", cwd=tmp_path)
    assert none.returncode == 0 and none.stdout.startswith("Nothing looks broken.\n\nint8.safetensors against")
    assert "median, dB" in none.stdout and "layers." not in none.stdout and "worst first" not in none.stdout
    assert "All tensors are those of the source" not in none.stdout
    same = run("verify", files[1], files[1], "--most", "0", cwd=tmp_path)
    assert same.returncode == 0 and "All tensors are those of the source." in same.stdout
    for count in ("-1", "many"):
        refused = run("verify", *files, "--most", count, cwd=tmp_path)
        assert refused.returncode == 2 and f"expected a number of tensors, found '{count}'" in refused.stderr


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


def test_a_name_that_the_terminal_cannot_show_is_no_failure(files, tmp_path):
    named = tmp_path / "\u6a21\u578b.safetensors"
    os.rename(files[0], named)
    done = run("verify", named, files[1], cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and "charmap" not in done.stderr
    assert r"\u6a21\u578b.safetensors against source.safetensors" in done.stdout


def test_a_device_that_is_none_is_refused(files, tmp_path):
    done = run("verify", *files, "--device", "gpu", cwd=tmp_path)
    assert done.returncode == 2 and "device: found 'gpu', expected cpu, cuda or a certain GPU" in done.stderr


def test_where_nothing_can_be_written_is_said_before_anything_is_compared(files, tmp_path):
    (tmp_path / "there.png").write_bytes(b"mine")
    for picture, text in (
        ("no/such/folder.png", "no/such/folder.png: there is no folder"),
        ("there.png", "there.png: exists already. Pick another name, or allow overwriting (--overwrite)."),
        ("errors.txt", "errors.txt: found the ending .txt, expected a kind of picture, such as .png."),
        ("errors", "errors: found no ending, expected a kind of picture, such as .png."),
        (files[1], "source.safetensors: is read itself and cannot be the result"),
    ):
        done = run("verify", *files, "--picture", picture, cwd=tmp_path)
        assert done.returncode == 2 and text in done.stderr and not done.stdout and "comparing" not in done.stderr
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    assert run("verify", *files, "--picture", "there.png", "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / "there.png").read_bytes() != b"mine"
    (tmp_path / "table.csv").write_bytes(b"mine")
    done = run("ablation", "--out", "table.csv", cwd=tmp_path)
    assert done.returncode == 2 and "table.csv: exists already" in done.stderr and not done.stdout


def test_overwrite_without_a_file_is_refused(files, tmp_path):
    for arguments, option in ((("verify", *files), "--picture"), (("ablation",), "--out")):
        done = run(*arguments, "--overwrite", cwd=tmp_path)
        assert done.returncode == 2 and f"--overwrite: found no {option} whose file" in done.stderr and not done.stdout


def test_a_picture_of_nothing_is_not_left_out_without_a_word(files, tmp_path):
    done = run("verify", files[1], files[1], "--picture", "errors.png", cwd=tmp_path)
    assert done.returncode == 0 and "No picture was written: no weight is quantized." in done.stdout
    assert not (tmp_path / "errors.png").exists()


def test_ablation_prints_and_writes_its_table(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"mine")
    done = run("ablation", "--out", "table.csv", "--overwrite", cwd=tmp_path)
    assert done.returncode == 0
    assert "The 17 layers with planted outliers are the first of the fragility report." in done.stdout
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["variant"] == "naive" and rows[0]["variant"] in done.stdout
