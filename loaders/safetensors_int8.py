"""Safetensors keys -> weights by name: every INT8 and FP8 layout in circulation, told apart tensor by tensor.

| layout | how a quantized linear `m` looks |
| --- | --- |
| Transformer Lab | `m.wq` int8, `m.ws` per-channel, optional `m.smooth`; linears alone, the rest from a base |
| ComfyUI native | `m.weight` int8 or e4m3, `m.weight_scale`, marker `m.comfy_quant` (JSON, as bytes) |
| ComfyUI-INT8-Fast | `m.weight` int8, `m.weight_scale`, no marker |
| official FP8 | `m.weight` e4m3, `m.weight_scale` per-channel |
| Comfy-Org fp8_scaled | `m.weight` e4m3, `m.scale_weight`, `scaled_fp8` once |
| saved from Lowbit | the native markers, with `gguf_*` and `lowbit_int8_smooth` formats |
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

import torch

from ..formats import Fp8Weight, GgmlWeight, Int8Weight, QuantizedWeight, UnknownQuantizationError, ggml
from .errors import CheckpointError, counted, quoted

Weights = dict[str, "torch.Tensor | QuantizedWeight"]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
# Written beside quantized weights by other programs; nothing here reads them.
IGNORED_LEAVES = ("input_scale", "scale_input")


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

    def error(self, found: str, expected: str) -> CheckpointError:
        todo = "The file is damaged or of a layout that this version of Lowbit does not know."
        return CheckpointError(self.path, found=f"{found} in {self.name}", expected=expected, todo=todo)


def read_weights(path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Weights:
    """The weights of one branch by state-dict key, quantized ones as `QuantizedWeight`s on the same bytes.

    tensors: by key, without branch and model prefix. metadata: the file's `__metadata__`. Raises CheckpointError for a
    marker that cannot be read, an unknown quantization type, a missing scale and shapes that contradict each other.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key != "scaled_fp8":
            name, _, leaf = key.rpartition(".")
            modules.setdefault(name, {})[leaf] = tensor
    markers = _markers_of_metadata(path, metadata)
    weights: Weights = {}
    for name, leaves in modules.items():
        module = _Module(path, name, leaves)
        quantized = _quantized_weight(module, markers.get(name))
        if quantized is not None:
            weights[_join(name, "weight")] = quantized
            for leaf in IGNORED_LEAVES:
                module.take(leaf)
        for leaf, tensor in module.leaves.items():
            weights[_join(name, leaf)] = tensor
    return weights


def needs_base(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a branch is the linears-only layout: `wq` tensors, and no norm, which every diffusion transformer has."""
    leaves = {key.rpartition(".")[2] for key in tensors}
    linear_vectors = ("ws", "smooth", "bias")
    has_norms = any(len(t.shape) == 1 and not key.endswith(linear_vectors) for key, t in tensors.items())
    return "wq" in leaves and not has_norms


def _quantized_weight(module: _Module, marker: dict | None) -> QuantizedWeight | None:
    marker_tensor = module.take("comfy_quant")
    if marker_tensor is not None:
        marker = _parse_marker(module, marker_tensor)
    try:
        if "wq" in module.leaves:
            return _transformer_lab(module)
        if marker is not None:
            return _marked(module, marker)
        weight = module.leaves.get("weight")
        if weight is None:
            return None
        if weight.dtype == torch.int8:
            return _int8(module, {})
        return _fp8(module) if weight.dtype in FP8_DTYPES else None
    except UnknownQuantizationError as error:
        raise module.error(str(error), "a quantization type that Lowbit reads") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise module.error(f"a quantized weight that contradicts itself ({error})", "matching shapes") from error


def _transformer_lab(module: _Module) -> Int8Weight:
    wq, ws, smooth = module.take("wq"), module.take("ws"), module.take("smooth")
    if ws is None:
        raise module.error("`wq` without its scale `ws`", "both")
    return Int8Weight(wq, tuple(wq.shape), _int8_scale(ws, wq), None if smooth is None else smooth.float())


def _marked(module: _Module, marker: dict) -> QuantizedWeight:
    name = marker.get("format")
    if "weight" not in module.leaves:
        raise module.error(f"a quantization marker {quoted(name)} without a weight", "both")
    if name in ("int8_tensorwise", "lowbit_int8_smooth"):
        return _int8(module, marker)
    if name in FP8_FORMATS:
        return _fp8(module)
    if isinstance(name, str) and name.startswith("gguf_"):
        ggml_type = ggml.ggml_type_of_format(name)
        blocks = module.take("weight")
        K = ggml.logical_K(ggml_type, blocks.shape[-1])
        return GgmlWeight(blocks, (*blocks.shape[:-1], K), ggml_type)
    known = ["int8_tensorwise", "lowbit_int8_smooth", *FP8_FORMATS, "gguf_*"]
    raise module.error(f"the unknown quantization type {quoted(name)}", f"one of {', '.join(known)}")


def _int8(module: _Module, marker: dict) -> Int8Weight:
    weight, scale, smooth = (
        module.take("weight"),
        module.take("weight_scale", "scale_weight"),
        module.take("weight_smooth"),
    )
    if weight.dtype != torch.int8:
        raise module.error(f"a weight of dtype {weight.dtype} marked as INT8", "int8")
    if scale is None:
        raise module.error("an int8 weight without its scale", "a tensor `weight_scale` beside it")
    params = marker["params"] if isinstance(marker.get("params"), dict) else marker
    rotation_group = 0
    if marker.get("convrot", params.get("convrot", False)):
        rotation_group = int(marker.get("convrot_groupsize", params.get("convrot_groupsize", 256)))
    return Int8Weight(weight, tuple(weight.shape), _int8_scale(scale, weight), smooth, rotation_group)


def _int8_scale(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The scale as `formats.Int8Weight` wants it: a per-channel scale may be stored as [N] or [N, 1]."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(-1, 1) if scale.numel() == weight.shape[0] else scale


def _fp8(module: _Module) -> Fp8Weight | None:
    scale = module.take("weight_scale", "scale_weight")
    weight = module.leaves["weight"]
    if len(weight.shape) != 2 and scale is None:
        return None  # a norm or bias stored in FP8: a plain tensor
    module.take("weight")
    weight = weight.view(torch.float8_e4m3fn) if weight.dtype == torch.uint8 else weight
    return Fp8Weight(weight, tuple(weight.shape), torch.ones(()) if scale is None else scale.float())


def _parse_marker(module: _Module, tensor: torch.Tensor) -> dict:
    try:
        marker = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise module.error(f"a quantization marker that is no JSON ({error})", "a JSON object") from error
    if not isinstance(marker, dict):
        raise module.error(f"the quantization marker {quoted(marker)}", "a JSON object")
    return marker


def _markers_of_metadata(path: str, metadata: Mapping[str, str]) -> dict[str, dict]:
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        if not all(isinstance(marker, dict) for marker in layers.values()):
            raise TypeError("a layer's entry is no object")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            path,
            found=f"quantization metadata that cannot be read ({error})",
            expected="a JSON object with `layers`",
            todo="The file is damaged; download it again.",
        ) from error
    return layers


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


# The base checkpoint


# An INT8 row is within about 2 % of the weight it was made from, an FP8 row within about 3 %.
LARGEST_ERROR = 0.10
# The two readings of the smoothing factors are told apart when the worse one is off by this many times the better one.
SMALLEST_RATIO = 2.0
SAMPLED_LAYERS, SAMPLED_ROWS = 8, 8


def merge_base(path: str, weights: Weights, base_path: str, base: Weights) -> tuple[Weights, str]:
    """The INT8 linears over the base checkpoint's other tensors, and one line about what was found.

    The file does not say whether activations are divided or multiplied by `smooth`: rows of several layers are
    compared with the base's weights in both readings, and the returned weights multiply. Raises CheckpointError when
    the base is another model's or another branch's, or when the readings cannot be told apart.
    """
    modules = {key.rpartition(".")[0] for key in weights}
    supplied = {key: tensor for key, tensor in base.items() if key.rpartition(".")[0] not in modules}
    linears = [key for key, weight in weights.items() if isinstance(weight, Int8Weight)]
    missing = [key for key in linears if key not in base]
    if missing:
        raise CheckpointError(
            base_path,
            found=f"no tensor {missing[0]} ({counted(len(missing), 'tensor')} lacking in all)",
            expected=f"the base checkpoint of {_name(path)}: the release that it was quantized from, same branch",
            todo="Pick the base checkpoint that belongs to the quantized file.",
        )
    divides, error = _reading(path, weights, base_path, base, linears)
    if divides:
        for key in linears:
            if weights[key].smooth is not None:
                weights[key] = dataclasses.replace(weights[key], smooth=1.0 / weights[key].smooth)
    how = "divided" if divides else "multiplied"
    smoothed = any(weights[key].smooth is not None for key in linears)
    note = (
        f"{counted(len(supplied), 'tensor')} from the base checkpoint, sampled rows within {error:.1%} of its weights"
    )
    return supplied | weights, note + (f", activations are {how} by the smoothing factors" if smoothed else "")


def _reading(path: str, weights: Weights, base_path: str, base: Weights, linears: list[str]) -> tuple[bool, float]:
    """Whether activations are divided by `smooth`, and the relative error of that reading on the sampled rows."""
    errors = {True: [], False: []}
    step = max(1, len(linears) // SAMPLED_LAYERS)
    smoothed = any(weights[key].smooth is not None for key in linears)
    for key in linears[::step]:
        quantized, original = weights[key], base[key]
        if tuple(quantized.shape) != tuple(original.shape):
            raise CheckpointError(
                base_path,
                found=f"{key} of shape {tuple(original.shape)}",
                expected=f"{tuple(quantized.shape)} as in {_name(path)}",
                todo="This is the base checkpoint of another model; pick the one that the quantized file was made "
                "from.",
            )
        rows = torch.linspace(0, quantized.shape[0] - 1, SAMPLED_ROWS).long().unique()
        expected = _rows(original, rows)
        for divides, readings in errors.items():
            sample = _rows(quantized, rows)
            if quantized.smooth is not None and divides:
                sample = sample / quantized.smooth.square()
            readings.append(float((sample - expected).norm() / expected.norm().clamp(min=1e-30)))
    divided, multiplied = (sum(readings) / len(readings) for readings in (errors[True], errors[False]))
    better = min(divided, multiplied)
    if not better <= LARGEST_ERROR:
        raise CheckpointError(
            base_path,
            found=f"weights that differ from those of {_name(path)} by {better:.0%}",
            expected=f"at most {LARGEST_ERROR:.0%}, which quantization explains",
            todo="This is the base checkpoint of another model or of the other branch; pick the one that belongs to "
            "the file.",
        )
    if smoothed and max(divided, multiplied) < SMALLEST_RATIO * better:
        raise CheckpointError(
            path,
            found=f"smoothing factors that fit the base checkpoint equally well both ways ({divided:.2%} and "
            f"{multiplied:.2%})",
            expected="one reading that clearly fits",
            todo="Pick the unquantized release as the base checkpoint, or another quantized file.",
        )
    return divided < multiplied, better


def _name(path: str) -> str:
    return os.path.basename(path)


def _rows(weight: torch.Tensor | QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a weight [N, K] in float32, without unpacking the others."""
    if isinstance(weight, torch.Tensor):
        return weight[rows].float()
    part = {"data": weight.data.view(torch.uint8)[rows].view(weight.data.dtype), "shape": (len(rows), weight.shape[1])}
    scale = getattr(weight, "scale", None)
    if scale is not None and scale.numel() > 1:
        part["scale"] = scale[rows]
    return dataclasses.replace(weight, **part).dequantize()
