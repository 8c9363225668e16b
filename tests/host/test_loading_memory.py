"""One layer of Ideogram 4 at real width, 558 M parameters: what loading costs in memory."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch
from host_harness import inprocess
from host_harness import small_models as small

ONE_LAYER = small.Ideogram4Size(layers=1, heads=18, head_dim=256, ffn=12288, adaln=512, llm=53248)
SHAPES = small.ideogram4_shapes(ONE_LAYER)
LARGEST = 1.15  # times the file's size, at the peak of loading

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")


def random_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes: cheap to make, and no page of the file is like another one."""
    return torch.randint(0, 2**62, (math.prod(shape) // 8,)).view(torch.uint8).reshape(shape)


def is_linear(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    return tmp_path_factory.mktemp("real_width")


@pytest.fixture(scope="module")
def bf16_path(folder):
    tensors = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
    return small.save(folder / "one-layer-bf16.safetensors", tensors)


@pytest.fixture(scope="module")
def int8_path(folder):
    tensors = {}
    for key, shape in SHAPES.items():
        if is_linear(key, shape):
            tensors[key] = random_bytes(shape).view(torch.int8)
            tensors[f"{key}_scale"] = torch.full((shape[0], 1), 1e-4)
        else:
            tensors[key] = torch.ones(shape, dtype=torch.bfloat16)
    return small.save(folder / "one-layer-int8.safetensors", tensors)


@pytest.fixture(scope="module")
def gguf_path(folder):
    import gguf

    path = folder / "one-layer-q8_0.gguf"
    writer = gguf.GGUFWriter(str(path), "ideogram4")
    for key, shape in SHAPES.items():
        if is_linear(key, shape):
            blocks = random_bytes((shape[0], shape[1] // 32 * 34))
            writer.add_tensor(key, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, torch.ones(shape, dtype=torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measure(folder: pathlib.Path, path: pathlib.Path, *options: str) -> dict:
    program = pathlib.Path(__file__).with_name("measure_loading.py")
    command = [sys.executable, str(program), str(folder / "base"), str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["parameters"] == pytest.approx(558e6, rel=0.01)
    return measured


@pytest.mark.parametrize("fixture", ["int8_path", "gguf_path"])
def test_loading_maps_the_file_and_copies_nothing(request, folder, fixture):
    path = request.getfixturevalue(fixture)
    measured, size = measure(folder, path), path.stat().st_size
    assert measured["peak"] < LARGEST * size
    # Weights stay on the mapping, whose pages come when they are computed with: loading reads next to nothing.
    assert measured["after"] < 0.1 * size
    assert measured["twice"] < measured["after"] + 0.05 * size


def test_quantizing_on_the_fly_stays_within_the_file(folder, bf16_path):
    measured, size = measure(folder, bf16_path, "--quantize"), bf16_path.stat().st_size
    assert measured["peak"] < LARGEST * size
    assert measured["twice"] < measured["after"] + 0.05 * size
