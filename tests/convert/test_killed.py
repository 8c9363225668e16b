"""kill -9 at any moment: what lies under the final name is the whole file, or there is none."""

import os
import pathlib
import subprocess
import sys

import pytest
from lowbit.loaders import open_checkpoint
from lowbit.tests.convert.making import to_gguf, to_int8

ROOT = pathlib.Path(__file__).resolve().parents[2]

# One process imports torch; each conversion runs in a child of it, which is killed after a part of the time that a
# whole one takes.
PROGRAM = """
import importlib.util, os, signal, sys, time
import torch
torch.set_num_threads(1)
root, source, folder, count = sys.argv[1:4] + [int(sys.argv[4])]
spec = importlib.util.spec_from_file_location("lowbit", root + "/__init__.py", submodule_search_locations=[root])
module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from lowbit.convert import gguf, int8, job, policy, request, source as sources
sources.CHUNK_ELEMENTS = 20_000

def convert(target):
    asked = request.Request(source, target)
    if target.endswith(".gguf"):
        job.convert_to_gguf(asked, gguf.GgufOptions(policy.read_policy("q8_0")))
    else:
        job.convert_to_int8(asked, int8.Int8Options())

def child(target):
    pid = os.fork()
    if pid == 0:
        try:
            convert(target)
        finally:
            os._exit(0)
    return pid

durations = []
for suffix in (".safetensors", ".gguf"):
    start = time.monotonic()
    os.waitpid(child(folder + "/whole" + suffix), 0)
    durations.append(time.monotonic() - start)
for i in range(count):
    pid = child(f"{folder}/{i:02}" + (".safetensors", ".gguf")[i % 2])
    time.sleep(durations[i % 2] * 1.5 * i / count)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_no_half_file_under_the_final_name(tmp_path, fp8_files):
    source, count = fp8_files["conditional"], 50
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT), str(source), str(tmp_path), str(count)],
        check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    reference = tmp_path / "reference"
    reference.mkdir()
    to_int8(source, reference / "m.safetensors")
    to_gguf(source, reference / "m.gguf")
    whole, partial = [], [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    for path in tmp_path.iterdir():
        if path.suffix in (".safetensors", ".gguf"):
            open_checkpoint(path)
            assert path.read_bytes() == (reference / f"m{path.suffix}").read_bytes()
            whole.append(path)
    assert len(whole) >= 2 + 2, "some of them had the time to finish"
    assert len(partial) >= 5, "some of them were killed while they wrote"
    assert len(whole) + len(partial) <= count + 2
