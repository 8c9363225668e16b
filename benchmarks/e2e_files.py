"""The files of a random model in every format that is measured, written by the quantizers of `formats`, on the device.

A tensor at a time, both branches side by side: neither the model nor a file has to fit into memory.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator

import torch
from host_harness import small_models

from ..convert import gguf_header
from ..convert.file_layout import OutputTensor
from ..formats import ggml, int8
from .e2e_host import GB
from .e2e_model import BRANCHES, Model

FILE_PREFIX = "lowbit_e2e_"
SPARE_BYTES = 2**28  # of the disk, beside a file's weights


# What a file stores in place of a linear layer's weight, by the name that follows the module's


def fp8_tensors(w: torch.Tensor, **marker) -> dict[str, torch.Tensor]:
    scale = (w.abs().amax().float() / small_models.FP8_MAX).clamp(min=1e-12)
    return {
        "weight": (w.float() / scale).clamp_(-small_models.FP8_MAX, small_models.FP8_MAX).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "comfy_quant": small_models.comfy_quant(format="float8_e4m3fn", **marker),
    }


def int8_tensors(w: torch.Tensor, rotation_group: int = 0) -> dict[str, torch.Tensor]:
    quantized = int8.quantize_weight(w, rotation_group=rotation_group)
    marker = {"convrot": True, "convrot_groupsize": rotation_group} if rotation_group else {}
    return {
        "weight": quantized.data,
        "weight_scale": quantized.scale,
        "comfy_quant": small_models.comfy_quant(format="int8_tensorwise", **marker),
    }


@dataclasses.dataclass(frozen=True)
class Format:
    """bytes_per_weight: of the quantized layers. tensors: for a safetensors file. ggml_type: for a GGUF file."""

    bytes_per_weight: float
    tensors: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    ggml_type: str | None = None

    @property
    def suffix(self) -> str:
        return ".safetensors" if self.ggml_type is None else ".gguf"


FILES = {
    "bf16": Format(2.0, lambda w: {"weight": w}),
    "fp8": Format(1.0, fp8_tensors),
    # The marker by which ComfyUI unpacks FP8 weights to bf16, as it has to on cards without FP8 units.
    "fp8_unpacked": Format(1.0, functools.partial(fp8_tensors, full_precision_matrix_mult=True)),
    "int8": Format(1.0, int8_tensors),
    "int8_convrot": Format(1.0, functools.partial(int8_tensors, rotation_group=256)),
    "q8_0": Format(34 / 32, ggml_type="Q8_0"),
    "q4_k": Format(144 / 256, ggml_type="Q4_K"),
}


# Writing


class HostBuffer:
    """Page-locked memory on its way from the device to a file, reused: `bytes_of` is valid until the next call."""

    def __init__(self, device: torch.device):
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def bytes_of(self, tensor: torch.Tensor):
        """A numpy array of uint8."""
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if self._buffer.numel() < source.numel():
            self._buffer = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffer[: source.numel()].copy_(source).numpy()


SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
HEADER_BYTES = 2**20  # reserved, as sizes are known when all is written; the rest of it is spaces
PAGE_BYTES = 4096


def write_safetensors(path: pathlib.Path, model: Model, branch: str, form: Format) -> None:
    """What is no whole number of pages goes to the end, so that all others stay aligned."""
    header, small, buffer = {"__metadata__": {"format": "pt"}}, [], HostBuffer(model.device)
    with path.open("wb") as file:
        file.seek(struct.calcsize("<Q") + HEADER_BYTES)
        end = 0

        def write(name: str, tensor: torch.Tensor) -> None:
            nonlocal end
            start, end = end, end + file.write(buffer.bytes_of(tensor))
            header[name] = {
                "dtype": SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }

        for name, tensor in stored_tensors(model, branch, form):
            if tensor.nbytes % PAGE_BYTES:
                small.append((name, tensor))
            else:
                write(name, tensor)
        for name, tensor in sorted(small, key=lambda item: -item[1].element_size()):
            write(name, tensor)
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise RuntimeError(f"{path.name}: a header of {len(text)} bytes, {HEADER_BYTES} are reserved")
        file.seek(0)
        file.write(struct.pack("<Q", HEADER_BYTES) + text.ljust(HEADER_BYTES))


def stored_tensors(model: Model, branch: str, form: Format) -> Iterator[tuple[str, torch.Tensor]]:
    for key in model.shapes:
        weight = model.weight(branch, key)
        if model.is_block_linear(key):
            name = key.removesuffix("weight")
            yield from ((name + leaf, tensor) for leaf, tensor in form.tensors(weight).items())
        else:
            yield key, weight


def write_gguf(path: pathlib.Path, model: Model, branch: str, linear: str) -> None:
    """Linear layers of the blocks as the GGML type `linear`, other matrices in bf16, vectors in float32."""

    def type_of(key: str) -> str:
        if model.is_block_linear(key):
            return linear
        return "BF16" if len(model.shapes[key]) == 2 else "F32"

    outputs = [
        OutputTensor(key, shape, type_of(key), gguf_header.tensor_size_bytes(type_of(key), shape))
        for key, shape in model.shapes.items()
    ]
    metadata = {
        "general.architecture": "ideogram4",
        "general.quantization_version": gguf_header.QUANTIZATION_VERSION,
    }
    layout, buffer = gguf_header.gguf_layout(outputs, metadata), HostBuffer(model.device)
    with path.open("wb") as file:
        file.write(layout.header)
        for output in outputs:
            file.seek(layout.offsets[output.name])
            file.write(buffer.bytes_of(ggml.quantize(model.weight(branch, output.name), output.stored)))
        file.truncate(layout.size_bytes)


class Files:
    """The model's files below ComfyUI's models folder: those of one format at a time, so that a disk holds them."""

    def __init__(self, model: Model, models_folder: pathlib.Path):
        self._model, self._folder, self._loras = model, models_folder / "diffusion_models", models_folder / "loras"
        self._format = None
        for path in self._loras.glob(f"{FILE_PREFIX}*"):
            path.unlink()
        self.remove()  # what a run that was broken off has left

    def paths(self, name: str) -> list[pathlib.Path]:
        return [self._folder / f"{FILE_PREFIX}{name}_{branch}{FILES[name].suffix}" for branch in BRANCHES]

    def prepare(self, name: str) -> list[pathlib.Path]:
        """Both branches' files in a format of FILES, written unless they are there.

        Raises RuntimeError where the disk has no room for them.
        """
        if self._format == name:
            return self.paths(name)
        self.remove()
        need = sum(self._size_bytes(name) for _ in BRANCHES)
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise RuntimeError(
                f"{self._folder} has {free / GB:.1f} GB free, the files of {name} need {need / GB:.1f}: name "
                "another folder with --workdir"
            )
        with concurrent.futures.ThreadPoolExecutor(len(BRANCHES)) as pool:
            for written in [pool.submit(self._write, name, branch) for branch in BRANCHES]:
                written.result()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._format = name
        return self.paths(name)

    def lora_names(self, count: int) -> list[str]:
        """The names of so many LoRA files, as the stock node takes them."""
        from safetensors.torch import save_file

        paths = [self._loras / f"{FILE_PREFIX}lora_{number}.safetensors" for number in range(count)]
        for number, path in enumerate(paths):
            if not path.exists():
                save_file(self._model.lora(number), path)
        return [path.name for path in paths]

    def remove(self) -> None:
        """Of the weights, not the LoRAs, which are small."""
        self._format = None
        for path in self._folder.glob(f"{FILE_PREFIX}*"):
            path.unlink()

    def _write(self, name: str, branch: str) -> None:
        path, form = self.paths(name)[BRANCHES.index(branch)], FILES[name]
        with torch.inference_mode():  # a thread has a mode of its own
            if form.ggml_type is None:
                write_safetensors(path, self._model, branch, form)
            else:
                write_gguf(path, self._model, branch, form.ggml_type)

    def _size_bytes(self, name: str) -> int:
        quantized = sum(math.prod(self._model.shapes[key]) for key in self._model.block_linears)
        others = sum(map(math.prod, self._model.shapes.values())) - quantized
        return int(FILES[name].bytes_per_weight * quantized) + 4 * others + SPARE_BYTES


def drop_from_page_cache(paths: list[pathlib.Path]) -> None:
    """The next read comes from the disk, except for files of a tmpfs. Raises RuntimeError where that is impossible."""
    if not hasattr(os, "posix_fadvise"):
        raise RuntimeError("--cold: this system has no posix_fadvise to drop files from its page cache")
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
