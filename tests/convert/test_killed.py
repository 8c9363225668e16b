"""kill -9 at any moment: what lies under the final name is the whole file, or there is none."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from lowbit.loaders import open_checkpoint
from lowbit.tests.convert.making import to_gguf, to_int8

ROOT = pathlib.Path(__file__).resolve().parents[2]

# One process imports torch; each conversion runs in a child of it. A child names every step to its parent, a call of
# `report` or one around the system calls of the end, and waits after the one that it is to be killed at.
PROGRAM = """
import importlib.util, json, os, signal, sys
import torch
torch.set_num_threads(1)
root, source, folder, count = sys.argv[1:4] + [int(sys.argv[4])]
spec = importlib.util.spec_from_file_location("lowbit", root + "/__init__.py", submodule_search_locations=[root])
module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from lowbit.convert import gguf, int8, job, output_file, policy, request, source as sources
sources.CHUNK_ELEMENTS = 20_000

def around(function, before, after, step):
    def call(*arguments):
        step(before)
        function(*arguments)
        step(after)
    return call

def convert(target, step):
    output_file.os.fsync = around(os.fsync, "complete", "synchronized", step)
    output_file.os.replace = around(os.replace, "finished", "renamed", step)
    asked, report = request.Request(source, target), lambda progress: step(progress.stage)
    if target.endswith(".gguf"):
        job.convert_to_gguf(asked, gguf.GgufOptions(policy.read_policy("q8_0")), report)
    else:
        job.convert_to_int8(asked, int8.Int8Options(), report)

def steps_of_child(target, kill_at):
    "The steps until the child was killed, at the last one; all of them without `kill_at`."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            done = []
            def step(name):
                done.append(name)
                os.write(writing, (name + "\\n").encode())
                if len(done) - 1 == kill_at:
                    while True:
                        signal.pause()
            convert(target, step)
        finally:
            os._exit(0)
    os.close(writing)
    steps = []
    with os.fdopen(reading) as lines:
        for line in lines:
            steps.append(line.strip())
            if len(steps) - 1 == kill_at:
                os.kill(pid, signal.SIGKILL)
                break
    os.waitpid(pid, 0)
    return steps

results, half = {}, count // 2
for suffix in (".safetensors", ".gguf"):
    steps = steps_of_child(folder + "/whole" + suffix, None)
    # Each of the last steps, and of the others as many as there are kills left.
    first = len(steps) - 6
    kills = [first * i // (half - 6) for i in range(half - 6)] + list(range(first, len(steps)))
    for kill_at in kills:
        name = f"{kill_at:04}{suffix}"
        assert steps_of_child(folder + "/" + name, kill_at) == steps[: kill_at + 1]
        results[name] = steps[: kill_at + 1]
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_no_half_file_under_the_final_name(tmp_path, fp8_files):
    source, count = fp8_files["conditional"], 50
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT), str(source), str(tmp_path), str(count)],
        check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    killed = json.loads(run.stdout)
    assert len(killed) == count
    reference = tmp_path / "reference"
    reference.mkdir()
    to_int8(source, reference / "m.safetensors")
    to_gguf(source, reference / "m.gguf")
    partial = {path.name.rsplit(".", 2)[0] for path in tmp_path.iterdir() if path.name.endswith(".partial")}
    whole = {path.name for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".gguf")}
    for name in whole:
        open_checkpoint(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (reference / f"m{(tmp_path / name).suffix}").read_bytes()
    assert whole == {name for name, steps in killed.items() if "renamed" in steps} | {"whole.safetensors", "whole.gguf"}
    # The first report of writing comes before the file is opened.
    began = {name for name, steps in killed.items() if steps.count("writing") > 1}
    assert partial == began - whole
    assert len(whole) == 2 + 2 * 3 and len(partial) > 20 and len(began) < count
