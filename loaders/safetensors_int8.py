"""Keys -> weights by name: every INT8 and FP8 layout in circulation, told apart tensor by tensor.

| layout | how a quantized linear `m` looks |
| --- | --- |
| Transformer Lab | `m.wq` int8, `m.ws` per-channel, optional `m.smooth`; linears alone, the rest from a base |
| ComfyUI native | `m.weight` int8 or e4m3, `m.weight_scale`, marker `m.comfy_quant` (JSON, as bytes) |
| ComfyUI-INT8-Fast | `m.weight` int8, `m.weight_scale`, no marker |
| official FP8 | `m.weight` e4m3, `m.weight_scale` per-channel |
| Comfy-Org fp8_scaled | `m.weight` e4m3, `m.scale_weight`, `scaled_fp8` once |
| saved from Lowbit | the native markers, with `gguf_*` and `lowbit_int8_smooth` formats |
| Q8_CR, in GGUF | `m.weight` I8, `m.weight_scale` F32, the native marker as metadata (`markers_of_gguf`) |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from ..formats import Fp8Weight, GgmlWeight, Int8Weight, QuantizedWeight, UnknownQuantizationError, ggml
from .errors import TAKE_ANOTHER, CheckpointError, quoted
from .markers import parse_marker

Weights = dict[str, "torch.Tensor | QuantizedWeight"]

INT8_FORMATS = ("int8_tensorwise", "lowbit_int8_smooth")
FP8_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Formats that nothing here reads, and what does.
_HOST, _COMFYUI_GGUF = "ComfyUI's Load Diffusion Model node", "ComfyUI-GGUF"
OTHER_FORMATS = {
    "nvfp4": ("NVFP4", _HOST),
    "mxfp8": ("MXFP8", _HOST),
    "convrot_w4a4": ("INT4 (ConvRot)", _HOST),
    "asym_w4a8_int8": ("INT4 (W4A8)", _HOST),
    "awq_w4a16": ("INT4 (AWQ)", _HOST),
    "int4_cr": ("INT4 (Q4_CR)", _COMFYUI_GGUF),
    "int4_pytorch": ("INT4 (Q4_PT)", _COMFYUI_GGUF),
    "int4_compact_gemm": ("INT4 (Q4_PT)", _COMFYUI_GGUF),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Integers that no format explains; a model's own integer tensors are no `weight` of two dimensions.
UNEXPLAINED = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
# Written beside quantized weights by other programs for the activations of their own FP8 product. They change nothing
# about the weight; every other tensor does, and reading the weight without it would give wrong values.
IGNORED_LEAVES = ("input_scale", "scale_input")
# All that belongs to a quantization: beside a weight of floats it means nothing, and the host ignores it.
QUANTIZATION_LEAVES = ("comfy_quant", "weight_scale", "scale_weight", *IGNORED_LEAVES)
# Far above every known file, which has 256; the matrix of a group has its size squared.
MAX_ROTATION_GROUP = 4096


@dataclasses.dataclass(frozen=True)
class _Module:
    """The tensors of one module, by leaf name; taking one removes it."""

    path: str
    name: str
    leaves: dict[str, torch.Tensor]

    def take(self, *names: str) -> torch.Tensor | None:
        """The first of these leaves that the module has."""
        for name in names:
            if name in self.leaves:
                return self.leaves.pop(name)
        return None

    def take_matrix(self, name: str) -> torch.Tensor:
        """A leaf that has to be a matrix with elements."""
        matrix = self.take(name)
        if matrix.dim() != 2 or matrix.numel() == 0:
            raise self.error(f"a quantized weight `{name}` of shape {list(matrix.shape)}", "[N, K]")
        return matrix

    def take_floats(self, *names: str) -> torch.Tensor | None:
        """The first of these leaves, as float32."""
        floats = self.take(*names)
        if floats is not None and floats.dtype not in FLOATS:
            raise self.error(f"a tensor `{names[0]}` of dtype {_dtype_name(floats)}", "floating point numbers")
        return None if floats is None else floats.float()

    def error(self, found: str, expected: str) -> CheckpointError:
        todo = f"The file is damaged or of a layout that this version of Lowbit does not know: {TAKE_ANOTHER}"
        return CheckpointError(self.path, found=f"{found} in {self.name}", expected=expected, todo=todo)


def read_weights(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor | GgmlWeight],
    markers: Mapping[str, dict] | None = None,
) -> Weights:
    """The weights of one branch by state-dict key, quantized ones as `QuantizedWeight`s on the same bytes.

    tensors: by key, without branch and model prefix; GGML blocks stay as they are. markers: those of the file's
    metadata, by module. Raises CheckpointError for a marker that cannot be read, an unknown quantization type, a
    missing scale, shapes that contradict each other, and a tensor beside a quantized weight that nothing here knows.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    weights: Weights = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, GgmlWeight):
            weights[key] = tensor
        elif key != "scaled_fp8":
            name, _, leaf = key.rpartition(".")
            modules.setdefault(name, {})[leaf] = tensor
    for name, leaves in modules.items():
        module = _Module(os.fspath(path), name, leaves)
        quantized = _quantized_weight(module, (markers or {}).get(name))
        if quantized is not None:
            weights[_join(name, "weight")] = quantized
            _drop_ignored(module)
        elif "scaled_fp8" in tensors:
            _check_scale_of_floats(module)
        for leaf, tensor in module.leaves.items():
            weights[_join(name, leaf)] = tensor
    return weights


def _drop_ignored(module: _Module) -> None:
    for leaf in IGNORED_LEAVES:
        module.take(leaf)
    if unknown := sorted(module.leaves.keys() - {"bias"}):
        found = f"the tensor {quoted(unknown[0])}, whose meaning is unknown, beside a quantized weight"
        raise module.error(found, "the weight, its scale and bias alone")


def _check_scale_of_floats(module: _Module) -> None:
    """In a file that calls itself FP8 the host multiplies weights of floats by their `scale_weight` too."""
    scale = module.leaves.get("scale_weight")
    if scale is not None and "weight" in module.leaves and bool((scale.float() != 1).any()):
        raise module.error("`scale_weight` other than 1 beside a weight that is not FP8", "FP8, or a scale of 1")


def _quantized_weight(module: _Module, marker: dict | None) -> QuantizedWeight | None:
    marker_tensor = module.take("comfy_quant")
    try:
        if marker_tensor is not None:
            marker = parse_marker(marker_tensor)
    except ValueError as error:
        raise module.error(str(error), "a JSON object, as bytes") from error
    try:
        if "wq" in module.leaves:
            return _transformer_lab(module)
        return _unmarked(module) if marker is None else _marked(module, marker)
    except UnknownQuantizationError as error:
        raise module.error(str(error), "a quantization type that Lowbit reads") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise module.error(f"a quantized weight that contradicts itself ({error})", "matching shapes") from error


def _transformer_lab(module: _Module) -> Int8Weight:
    if "ws" not in module.leaves:
        raise module.error("`wq` without its scale `ws`", "both")
    wq = module.take_matrix("wq")
    return Int8Weight(wq, tuple(wq.shape), _scale(module, wq, "ws"), module.take_floats("smooth"))


def _unmarked(module: _Module) -> QuantizedWeight | None:
    weight = module.leaves.get("weight")
    if weight is None:
        return None
    if weight.dtype == torch.int8:
        return _int8(module, {})
    if weight.dtype in FP8_FORMATS.values():
        is_plain = weight.dim() != 2 and not {"weight_scale", "scale_weight"} & module.leaves.keys()
        return None if is_plain else _fp8(module, weight.dtype)  # plain: a norm or bias stored in FP8
    if weight.dtype in UNEXPLAINED and weight.dim() == 2:
        raise module.error(f"a weight of dtype {_dtype_name(weight)} that nothing explains", "a quantization marker")
    return None


def _marked(module: _Module, marker: dict) -> QuantizedWeight:
    name = marker.get("format")
    if "weight" not in module.leaves:
        raise module.error(f"a quantization marker {quoted(name)} without a weight", "both")
    if name in INT8_FORMATS:
        return _int8(module, marker)
    if isinstance(name, str) and name in FP8_FORMATS:
        return _fp8(module, FP8_FORMATS[name])
    if isinstance(name, str) and name.startswith("gguf_") and name.isascii() and len(name) < 40:
        ggml_type = ggml.ggml_type_of_format(name)
        blocks = module.take_matrix("weight")
        return GgmlWeight(blocks, (blocks.shape[0], ggml.logical_K(ggml_type, blocks.shape[1])), ggml_type)
    if isinstance(name, str) and name in OTHER_FORMATS:
        known_as, reader = OTHER_FORMATS[name]
        raise CheckpointError(
            module.path,
            found=f"the layer {module.name} in {known_as}, which Lowbit does not read",
            expected="INT8, FP8, GGUF or unquantized layers",
            todo=f"Load the file with {reader}, or take a BF16, FP8, INT8 or GGUF file of the model.",
        )
    known = [*INT8_FORMATS, *FP8_FORMATS, "gguf_*"]
    raise module.error(f"the unknown quantization type {quoted(name)}", f"one of {', '.join(known)}")


def _int8(module: _Module, marker: dict) -> Int8Weight:
    if module.leaves["weight"].dtype != torch.int8:
        raise module.error(f"a weight of dtype {_dtype_name(module.leaves['weight'])} marked as INT8", "int8")
    weight = module.take_matrix("weight")
    scale = _scale(module, weight, "weight_scale", "scale_weight")
    if scale is None:
        raise module.error("an int8 weight without its scale", "a tensor `weight_scale` beside it")
    rotation_group, smooth = _rotation_group(module, marker), module.take_floats("weight_smooth")
    prefers_exact = marker.get("full_precision_matrix_mult") is True
    return Int8Weight(weight, tuple(weight.shape), scale, smooth, rotation_group, prefers_exact)


def _rotation_group(module: _Module, marker: dict) -> int:
    """The group size by which a marker says that the weight is rotated, 0 for none."""
    params = marker["params"] if isinstance(marker.get("params"), dict) else {}
    rotated = marker.get("convrot", params.get("convrot", False))
    if not isinstance(rotated, bool):
        raise module.error(f"`convrot` of {quoted(rotated)} in the quantization marker", "true or false")
    size = marker.get("convrot_groupsize", params.get("convrot_groupsize", 256))
    if rotated and (type(size) is not int or not 0 < size <= MAX_ROTATION_GROUP):
        found = f"a rotation group (`convrot_groupsize`) of {quoted(size)}"
        raise module.error(found, f"a whole number from 1 to {MAX_ROTATION_GROUP:,}")
    return size if rotated else 0


def _fp8(module: _Module, dtype: torch.dtype) -> Fp8Weight:
    weight = module.take_matrix("weight")
    if weight.dtype == torch.uint8:  # safetensors had no FP8 once
        weight = weight.view(dtype)
    if weight.dtype != dtype:
        raise module.error(f"a weight of dtype {_dtype_name(weight)} marked as {_dtype_name(dtype)}", "one of them")
    scale = _scale(module, weight, "weight_scale", "scale_weight")
    return Fp8Weight(weight, tuple(weight.shape), torch.ones(()) if scale is None else scale)


def _scale(module: _Module, weight: torch.Tensor, *names: str) -> torch.Tensor | None:
    """The scale as float32 [] or [N, 1]; None when the module has none."""
    scale = module.take_floats(*names)
    if scale is None:
        return None
    N, K = weight.shape
    shape = tuple(scale.shape)
    if shape in ((), (1,), (1, 1)):
        return scale.reshape(())
    if shape == (1, N) == (1, K):
        found = f"a scale of shape [1, {N}], for the rows or for the columns of a square weight,"
        raise module.error(found, f"[{N}, 1]")
    if shape in ((N,), (N, 1), (1, N)):
        return scale.reshape(N, 1)
    found = f"a quantized weight that contradicts itself (of shape [{N}, {K}] with a scale of shape {list(shape)})"
    raise module.error(found, f"one number or [{N}, 1]")


def _dtype_name(value: torch.Tensor | torch.dtype) -> str:
    return str(value.dtype if isinstance(value, torch.Tensor) else value).removeprefix("torch.")


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
