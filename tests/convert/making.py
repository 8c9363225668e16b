"""Small checkpoints in every layout that is a source, activation records, and what files hold, read by others' code."""

import pathlib

import gguf
import torch
from host_harness import small_models as small
from lowbit.convert.gguf import GgufOptions
from lowbit.convert.int8 import Int8Options
from lowbit.convert.job import Written, convert_to_gguf, convert_to_int8
from lowbit.convert.policy import read_policy
from lowbit.convert.record import LayerActivations, write_activation_record
from lowbit.convert.request import Request
from lowbit.loaders.branch import load_branch
from safetensors import safe_open
from safetensors.torch import load_file

BRANCHES = ("conditional", "unconditional")
BLOCK_LINEARS = small.block_linears(small.ideogram4())


def to_int8(source, target, rotate=False, alpha=None, report=lambda progress: None, **request) -> list[Written]:
    return convert_to_int8(Request(str(source), str(target), **request), Int8Options(rotate, alpha), report)


def to_gguf(source, target, policy="q8_0", architecture=None, report=lambda p: None, **request) -> list[Written]:
    options = GgufOptions(read_policy(str(policy)), architecture)
    return convert_to_gguf(Request(str(source), str(target), **request), options, report)


def fp8(folder: pathlib.Path, branch: str = "conditional") -> pathlib.Path:
    return small.save(folder / f"{branch}.safetensors", small.fp8_official(small.ideogram4(branch)))


def bf16(folder: pathlib.Path, branch: str = "conditional") -> pathlib.Path:
    return small.save(folder / f"{branch}_bf16.safetensors", small.ideogram4(branch), torch.bfloat16)


def floats_of(path, branch: str = "conditional") -> dict[str, torch.Tensor]:
    """What our loaders read from a file, as float32."""
    weights = load_branch(path, branch).weights
    return {key: w.float() if isinstance(w, torch.Tensor) else w.dequantize() for key, w in weights.items()}


def meant_by_gguf(path, prefix: str = "") -> dict[str, torch.Tensor]:
    """What gguf-py reads from a file, as float32."""
    floats = {}
    for tensor in gguf.GGUFReader(path).tensors:
        assert tensor.name.startswith(prefix)
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        floats[tensor.name.removeprefix(prefix)] = values.reshape(tuple(reversed(tensor.shape.tolist())))
    return floats


def meant_by_int8(path, prefix: str = "") -> dict[str, torch.Tensor]:
    """What the safetensors library and the formula of per-channel INT8 read from a file without rotation."""
    tensors, floats = load_file(path), {}
    for key, value in tensors.items():
        assert key.startswith(prefix)
        if value.dtype == torch.int8:
            value = value.float() * tensors[f"{key}_scale"]
        if not key.endswith((".weight_scale", ".comfy_quant")):
            floats[key.removeprefix(prefix)] = value.float()
    return floats


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def spiky_record(path: pathlib.Path, spread: float = 1.5, seed: int = 0, channels=None) -> pathlib.Path:
    """An activation record of the small model whose channels differ in size; w1 and w3 share theirs."""
    shapes, layers = small.ideogram4_shapes(), {}
    for name in BLOCK_LINEARS:
        shared = name.replace("w3", "w1")
        generator = torch.Generator().manual_seed(seed * 1000 + BLOCK_LINEARS.index(shared))
        K = shapes[f"{name}.weight"][1] if channels is None else channels
        size = torch.exp(spread * torch.randn(K, generator=generator))
        layers[name] = LayerActivations(4 * size, size**2, float(size.max() / size.median()))
    write_activation_record(path, layers, overwrite=True)
    return path


def sqnr_db(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (actual - expected).norm()))
