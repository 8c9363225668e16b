"""`python <this folder>`: what it writes, prints and answers, from any working folder."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from lowbit.tests.convert.making import spiky_record, to_gguf, to_int8

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, cwd=None, pack=ROOT, encoding=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(pack / "convert"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment, encoding=encoding
    )


def test_the_same_files_as_from_the_functions(tmp_path, fp8_files):
    record = spiky_record(tmp_path / "record.safetensors")
    result = run(
        "int8", fp8_files["conditional"], "cli.safetensors", "--unconditional", fp8_files["unconditional"],
        "--record", record, record, "--smooth-alpha", "0.6", "--convrot", "--protect", "layers.0.*.w2", "attention.o",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    to_int8(
        fp8_files["conditional"], tmp_path / "f.safetensors", unconditional=str(fp8_files["unconditional"]),
        records=(str(record),) * 2, alpha=0.6, rotate=True, protected=("layers.0.*.w2", "attention.o"),
    )  # fmt: skip
    for suffix in ("", "_uncond"):
        cli, function = (tmp_path / f"{name}{suffix}.safetensors" for name in ("cli", "f"))
        assert cli.read_bytes() == function.read_bytes()
        written = (
            f"cli{suffix}.safetensors: 3.74 MB, 7 linear layers quantized (7 of them smoothed), 3 layers protected"
        )
        assert written in result.stdout
    assert "reading: " in result.stderr and "smoothing: " in result.stderr and "B/s, 0:00 left" in result.stderr


def test_gguf_from_a_pack_folder_of_any_name(tmp_path, fp8_files):
    """As people have it in custom_nodes. Nothing but these folders is needed."""
    pack = tmp_path / "comfyui-lowbit.main"
    for folder in ("convert", "formats", "loaders"):
        shutil.copytree(ROOT / folder, pack / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / file, pack)
    result = run(
        "gguf", fp8_files["conditional"], tmp_path / "m.gguf", "--unconditional", fp8_files["unconditional"],
        "--one-file", "--policy", "q8_0", "--architecture", "named", pack=pack, cwd=ROOT / "convert",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    to_gguf(
        fp8_files["conditional"], tmp_path / "f.gguf", "q8_0", "named", one_file=True,
        unconditional=str(fp8_files["unconditional"]),
    )  # fmt: skip
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "f.gguf").read_bytes()


def test_errors_are_a_sentence_and_no_traceback(tmp_path, fp8_files):
    shutil.copy(fp8_files["conditional"], tmp_path / "m.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:5000])
    (tmp_path / "there.gguf").write_bytes(b"")
    for arguments, text in (
        (("gguf", "broken.safetensors", "out.gguf"), "broken.safetensors: found 5,000 of"),
        (("gguf", "m.safetensors", "there.gguf"), "there.gguf: exists already"),
        (("gguf", "m.safetensors", "out.gguf", "--policy", "q3_k"), "'q3_k': found no such file"),
        (("gguf", "m.safetensors", "out.gguf", "--architecture", ""), "architecture: found '', expected a name"),
        (("int8", "m.safetensors", "out.safetensors", "--protect", "w9"), "'w9' fits no layer of m.safetensors"),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 1 and result.stdout == ""
        assert text in result.stderr and "Traceback" not in result.stderr
    for arguments, text in (
        (("int8",), "required: source, target"),
        (("int8", "a", "b", "--protect-top", "-1"), "expected a number of layers, found '-1'"),
    ):
        result = run(*arguments)
        assert result.returncode == 2 and text in result.stderr
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_remarked_is_a_line_and_no_refusal(tmp_path, fp8_files):
    to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", "q8_0")
    shutil.copy(fp8_files["unconditional"], tmp_path / "m_uncond.safetensors")
    result = run("int8", "m_uncond.safetensors", "out.safetensors", "--unconditional", "m.gguf", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("out") == 2
    remarked = result.stderr.splitlines()[:2]
    assert remarked[0].startswith("m.gguf is quantized already (gguf_q8_0): ")
    assert remarked[1].startswith("m_uncond.safetensors is converted as the conditional branch, but its name says")
    assert "is converted as" not in "".join(result.stderr.splitlines()[2:])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict", "utf-8"])
def test_a_path_that_the_terminal_has_no_letters_for(tmp_path, fp8_files, monkeypatch, encoding):
    """Of the file's path at the end, and of an error's."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    result = run("gguf", fp8_files["conditional"], tmp_path / "模型.gguf", encoding=encoding.partition(":")[0])
    name = "模型" if encoding == "utf-8" else r"\u6a21\u578b"
    assert result.returncode == 0 and f"{name}.gguf: " in result.stdout and (tmp_path / "模型.gguf").is_file()
    again = run("gguf", fp8_files["conditional"], tmp_path / "模型.gguf", encoding=encoding.partition(":")[0])
    assert again.returncode == 1 and f"{name}.gguf: exists already" in again.stderr


def test_help_names_every_option_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for command in ("int8", "gguf"):
        result = subprocess.run(
            [sys.executable, str(ROOT / "convert"), command, "--help"], capture_output=True, text=True, timeout=60,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert result.returncode == 0 and "--protect-top" in result.stdout and "--overwrite" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_nothing_behind(tmp_path, fp8_files):
    from host_harness import small_models as small

    size = small.Ideogram4Size(layers=24, heads=4, ffn=2048)
    source = small.save(tmp_path / "m.safetensors", small.ideogram4(size=size))
    target = tmp_path / "out"
    target.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "convert"), "gguf", str(source), str(target / "m.gguf"), "--policy", "q4_k"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell starts what it runs in the background with this signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:  # the first of the stage that writes
        if line.startswith("writing"):
            break
    deadline = time.monotonic() + 60
    while not list(target.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [path.suffix for path in target.iterdir()] == [".partial"]
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Cancelled: nothing was written." in rest and "Traceback" not in rest
    assert not list(target.iterdir())


def test_a_python_without_torch_is_told_so(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "convert"), "int8", "a.safetensors", "b.safetensors"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith(" has no torch. Run this by the Python that runs ComfyUI.\n")
