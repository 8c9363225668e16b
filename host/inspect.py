"""What a loaded MODEL is made of, as a table for people: formats, sizes, protected layers, and what computes each op
here."""

from __future__ import annotations

import collections
import dataclasses

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor

from ..formats import GgmlWeight, Int8Weight
from ..kernels import int8_linear, quantize_per_token, unpack, unpack_int8, unpack_to_int8
from ..kernels.dispatch import Op
from ..kernels.quantized_linear import SMALL_M, row_rotation_group
from ..loaders.policy import quantizes
from . import fused_block, layouts
from .lora import side_path
from .ops import LowbitLinear

IMPLEMENTATION_NAMES = {
    "reference": "plain PyTorch",
    "torch_impl": "PyTorch's INT8 product",
    "triton_impl": "Triton",
}
TOKENS = 4096  # an image of 1024x1024


@dataclasses.dataclass
class _Row:
    layers: int = 0
    parameters: int = 0
    size_bytes: int = 0

    def add(self, parameters: int, size_bytes: int) -> None:
        self.layers += 1
        self.parameters += parameters
        self.size_bytes += size_bytes


def report(patcher) -> str:
    """The table for a MODEL (the host's model patcher), ours or not."""
    model = patcher.model.diffusion_model
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LowbitLinear)}
    quantized = {name: layouts.from_host(module.weight) for name, module in linears.items()}
    quantized = {name: weight for name, weight in quantized.items() if weight is not None}
    rows: dict[str, _Row] = collections.defaultdict(_Row)
    others = 0
    for weight in quantized.values():
        rows[weight.format_name].add(weight.shape[0] * weight.shape[1], weight.size_bytes)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in quantized:
            continue
        if isinstance(parameter.data, QuantizedTensor):  # one of the host's own
            stored = parameter.data.state_dict()
            rows[parameter.data._layout_cls].add(parameter.numel(), sum(t.nbytes for t in stored.values()))
            others += 1
        else:
            rows[_dtype_name(parameter)].add(parameter.numel(), parameter.nbytes)
    lines = [f"{type(patcher.model).__name__}, {_settings_text(linears)}", ""]
    lines += _format_table(rows)
    if others:
        lines += ["", f"{others} weights in ComfyUI's own quantized layouts, computed by ComfyUI."]
    lines += ["", *_protected_text(linears, quantized)]
    if fused := fused_block.report(patcher):
        lines += ["", *fused]
    lines += ["", *_patches_text(patcher, linears)]
    lines += _implementations_text(quantized, linears)
    return "\n".join(lines).rstrip()


def _settings_text(linears: dict[str, LowbitLinear]) -> str:
    if not linears:
        return "not loaded by Lowbit"
    settings = next(iter(linears.values())).lowbit_settings
    return f"from {settings.file_name}, compute mode {settings.compute_mode}"


def _format_table(rows: dict[str, _Row]) -> list[str]:
    total = _Row()
    for row in rows.values():
        total.layers += row.layers
        total.parameters += row.parameters
        total.size_bytes += row.size_bytes
    width = max([16, *(len(name) + 1 for name in rows)])
    lines = [f"{'format':<{width}}{'tensors':>8}{'parameters':>14}{'bits/weight':>13}{'size':>11}"]
    ordered = sorted(rows.items(), key=lambda item: -item[1].size_bytes)
    for name, row in [*ordered, ("all", total)]:
        bits = 8 * row.size_bytes / max(row.parameters, 1)
        lines.append(
            f"{name:<{width}}{row.layers:>8}{row.parameters:>14,}{bits:>13.2f}{_size_text(row.size_bytes):>11}"
        )
    return lines


def _protected_text(linears: dict[str, LowbitLinear], quantized: dict) -> list[str]:
    """Linear layers left unquantized although others of the same name in other blocks are quantized, or would be."""
    if not quantized:
        return ["No layers quantized by Lowbit."]
    kinds = {_kind(name) for name in quantized}
    unquantized = {name: module for name, module in linears.items() if name not in quantized}
    protected = [
        name
        for name, module in unquantized.items()
        if _kind(name) in kinds or quantizes(name, module.out_features, module.in_features)
    ]
    others = [name for name in unquantized if name not in protected]
    lines = [f"Protected layers ({len(protected)}): {', '.join(protected) or 'none'}"]
    if others:
        lines.append(
            f"Other unquantized linear layers ({len(others)}): {', '.join(sorted({_kind(n) for n in others}))}"
        )
    return lines


def _patches_text(patcher, linears: dict[str, LowbitLinear]) -> list[str]:
    if not patcher.patches:
        return []
    side = 0
    for name, module in linears.items():
        key = f"diffusion_model.{name}.weight"
        if key in patcher.patches and layouts.from_host(module.weight) is not None:
            kept = module.lowbit_settings.kept_patches
            side += side_path(key, patcher.patches[key], *module.weight.shape, kept) is not None
    beside = f"for {side} of them the patch is added beside the quantized weight"
    return [f"Patched weights: {len(patcher.patches)} ({beside})", ""]


def _implementations_text(quantized: dict, linears: dict[str, LowbitLinear]) -> list[str]:
    if not quantized:
        return []
    device = comfy.model_management.get_torch_device()
    lines = [f"On {_device_name(device)}, a layer of each format is computed as follows ({TOKENS} tokens):"]
    seen = set()
    for name, weight in quantized.items():
        if weight.format_name in seen:
            continue
        seen.add(weight.format_name)
        mode = linears[name].mode
        lines.append(f"  {weight.format_name}: {_mode_text(weight, mode)}")
        for op, call in _calls(weight, mode, device):
            lines.append(f"    {op.name}: {_answers_text(op, call)}")
    return lines


def _mode_text(weight, mode: str) -> str:
    if mode == "int8":
        return f"int8 product (activations quantized per token; for at most {SMALL_M} tokens they stay floats)"
    few = f"; for at most {SMALL_M} tokens it stays INT8" if isinstance(weight, Int8Weight) else ""
    return f"exact (weight unpacked, then PyTorch's product{few})"


def _calls(weight, mode: str, device: torch.device) -> list[tuple[Op, object]]:
    """The ops of one layer with calls of its shape, on tensors of one element that only look that large."""
    N, K = weight.shape

    def tensor(*shape, dtype):
        return torch.empty(1, dtype=dtype, device=device).expand(shape)

    calls = []
    if isinstance(weight, Int8Weight) and mode == "exact":
        looks = dataclasses.replace(weight, **{n: tensor(*t.shape, dtype=t.dtype) for n, t in weight.tensors().items()})
        return [(unpack_int8.OP, unpack_int8.UnpackInt8Call(looks, torch.bfloat16))]
    if isinstance(weight, GgmlWeight):
        blocks = tensor(*weight.data.shape, dtype=torch.uint8)
        if mode == "exact":
            return [(unpack.OP, unpack.UnpackCall(blocks, weight.ggml_type, torch.bfloat16))]
        smooth, group = None, row_rotation_group(weight)
        calls.append((unpack_to_int8.OP, unpack_to_int8.UnpackToInt8Call(blocks, weight.ggml_type, None, group)))
    else:
        smooth, group = weight.smooth, weight.rotation_group
    tokens = tensor(TOKENS, K, dtype=torch.bfloat16)
    calls.append((quantize_per_token.OP, quantize_per_token.QuantizePerTokenCall(tokens, smooth, group)))
    product = int8_linear.Int8LinearCall(
        tensor(TOKENS, K, dtype=torch.int8),
        tensor(TOKENS, 1, dtype=torch.float32),
        tensor(N, K, dtype=torch.int8),
        tensor(N, 1, dtype=torch.float32),
        None,
        torch.bfloat16,
    )
    calls.append((int8_linear.OP, product))
    return calls


def _answers_text(op: Op, call: object) -> str:
    answers = op.refusals(call)
    chosen = next((name for name, reason in answers.items() if reason is None), "nothing")
    refused = [
        f"{IMPLEMENTATION_NAMES.get(name, name)}: it {reason}" for name, reason in answers.items() if reason is not None
    ]
    chosen = IMPLEMENTATION_NAMES.get(chosen, chosen)
    return chosen + (f" (not {'; not '.join(refused)})" if refused else "")


def _kind(name: str) -> str:
    """`layers.7.feed_forward.w2` -> `layers.N.feed_forward.w2`: the same layer of every block."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def _dtype_name(tensor: torch.Tensor) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    name = str(tensor.dtype).removeprefix("torch.")
    return names.get(name, name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def _size_text(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.2f} MiB"
