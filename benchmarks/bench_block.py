"""One whole Ideogram 4 block, the real ComfyUI's own module at its real sizes, in bf16 and in INT8.

All INT8 variants hold the same bytes. `error` is relative to the stock block computed in float32.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator

import torch

from ..formats.int8 import Int8Weight, quantize_weight
from . import operands, results, shapes, timing

CSV_NAME = "block.csv"
COLUMNS = (*results.ENVIRONMENT, "variant", "M", "ms", "ratio_to_bf16", "error")

QUANTIZED = ("attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
TEXT_TOKENS = 256
# The model's own constants, as comfy.ldm.ideogram4 has them.
NORM_EPS, ROPE_THETA, ROPE_SECTIONS = 1e-5, 5000000, (24, 20, 20)

Forward = Callable[..., torch.Tensor]


def rows(options: timing.Options) -> Iterator[dict]:
    from host_harness import inprocess

    if inprocess.find_host() is None:
        print(f"left out: block: {inprocess.missing_host_reason()}")
        return
    with tempfile.TemporaryDirectory() as base:
        host = inprocess.start(base, small=False)
        for M in options.tokens or shapes.TOKENS[:1]:
            yield from block_rows(host, options, M)


def block_rows(host, options: timing.Options, M: int) -> Iterator[dict]:
    floats = block_weights(options.device)
    weights = {name: quantize_weight(floats[f"{name}.weight"]) for name in QUANTIZED}
    inputs = block_inputs(host, M, options.device)
    reference = stock_block(host, floats, torch.float32)(*(cast(value, torch.float32) for value in inputs))

    forwards: dict[str, Forward] = {
        "bf16": stock_block(host, floats, torch.bfloat16),
        "stock_int8_tensorwise": stock_int8_block(host, floats, weights),
        "lowbit_int8_unfused": lowbit_block(host, floats, weights),
        "lowbit_int8_fused_swiglu": fused(lowbit_block(host, floats, weights), "feed_forward._forward_silu_gating"),
        "lowbit_int8_fused": fused(lowbit_block(host, floats, weights)),
    }

    xs = operands.cold(inputs[0])
    variants = [
        timing.Variant(name, timing.cycled(lambda x, forward=forward: forward(x, *inputs[1:]), xs))
        for name, forward in forwards.items()
    ]
    times = options.measure(variants)
    for name, ms in times.items():
        error = operands.relative_error(forwards[name](*inputs), reference)
        yield {"variant": name, "M": M, "ms": ms, "ratio_to_bf16": times["bf16"] / ms, "error": error}


# Operands


def block_weights(device: torch.device) -> dict[str, torch.Tensor]:
    """Random bf16 weights of one block, by key; a few rows of w3 are loud, and so the channels that w2 reads."""

    def matrix(N: int, K: int, seed: int) -> torch.Tensor:
        return operands.normal(N, K, device=device, seed=seed) * K**-0.5

    hidden, ffn, head = shapes.HIDDEN, shapes.FFN, shapes.HIDDEN // shapes.HEADS
    w3 = matrix(ffn, hidden, 5)
    w3[torch.randperm(ffn, generator=torch.Generator().manual_seed(0))[: max(2, ffn // 2048)].to(device)] *= 20
    weights = {
        "attention.qkv.weight": matrix(3 * hidden, hidden, 1),
        "attention.o.weight": matrix(hidden, hidden, 2),
        "feed_forward.w1.weight": matrix(ffn, hidden, 3),
        "feed_forward.w2.weight": matrix(hidden, ffn, 4),
        "feed_forward.w3.weight": w3,
        "adaln_modulation.weight": matrix(4 * hidden, shapes.ADALN, 6),
        "adaln_modulation.bias": 0.02 * operands.normal(4 * hidden, device=device, seed=7),
    }
    norms = {"attention.norm_q": head, "attention.norm_k": head}
    norms |= {f"{part}_norm{number}": hidden for part in ("attention", "ffn") for number in (1, 2)}
    for seed, (name, width) in enumerate(norms.items(), 8):
        weights[f"{name}.weight"] = 1 + 0.1 * operands.normal(width, device=device, seed=seed)
    return weights


def block_inputs(host, M: int, device: torch.device) -> tuple:
    """x [1, M, hidden], no mask, the rotary matrices of text and a square image, the modulation's input [1, 1, adaln].

    No mask, as when all text tokens count.
    """
    ideogram4 = host.module("comfy.ldm.ideogram4.model")
    llama = host.module("comfy.text_encoders.llama")
    text = torch.arange(min(TEXT_TOKENS, M // 2)).view(-1, 1).expand(-1, 3)
    pixels = torch.arange(M - len(text))
    side = max(1, math.isqrt(len(pixels)))
    image = torch.stack((torch.zeros_like(pixels), pixels // side, pixels % side), dim=1)
    positions = torch.cat((text, image + ideogram4.IMAGE_POSITION_OFFSET)).t().to(device)
    frequencies = llama.precompute_freqs_cis(
        shapes.HIDDEN // shapes.HEADS,
        positions,
        ROPE_THETA,
        rope_dims=ROPE_SECTIONS,
        interleaved_mrope=True,
        device=device,
    )
    x = operands.activations(M, shapes.HIDDEN, device).unsqueeze(0)
    modulation = torch.nn.functional.silu(operands.normal(1, 1, shapes.ADALN, device=device, seed=20))
    return x, None, ideogram4._split_half_rope_matrix(frequencies), modulation


def cast(value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if value is None else value.to(dtype)


# Blocks


def build(host, operations: type, state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """The host's block on these operations, with these weights."""
    block = host.module("comfy.ldm.ideogram4.model").Ideogram4TransformerBlock(
        shapes.HIDDEN,
        shapes.FFN,
        shapes.HEADS,
        NORM_EPS,
        shapes.ADALN,
        dtype=dtype,
        device=state_dict["attention_norm1.weight"].device,
        operations=operations,
    )
    block.load_state_dict(state_dict)
    return block


def stock_block(host, floats: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    operations = host.module("comfy.ops").disable_weight_init
    return build(host, operations, {key: value.to(dtype) for key, value in floats.items()}, dtype)


def stock_int8_block(host, floats: dict[str, torch.Tensor], weights: dict[str, Int8Weight]) -> torch.nn.Module:
    """What the host makes of a file in its own INT8 format."""
    state_dict = dict(floats)
    for name, weight in weights.items():
        marker = json.dumps({"format": "int8_tensorwise"}).encode()
        state_dict[f"{name}.weight"], state_dict[f"{name}.weight_scale"] = weight.data, weight.scale
        state_dict[f"{name}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    return build(host, host.module("comfy.ops").mixed_precision_ops(), state_dict, torch.bfloat16)


def lowbit_block(host, floats: dict[str, torch.Tensor], weights: dict[str, Int8Weight]) -> torch.nn.Module:
    """The host's block on our operations: every linear layer quantizes its input by itself."""
    from ..host import layouts
    from ..host.ops import LoadSettings, make_operations

    quantized = {f"{name}.weight": layouts.to_host(weight, torch.bfloat16) for name, weight in weights.items()}
    operations = make_operations(LoadSettings("benchmark", compute_mode="int8"))
    return build(host, operations, floats | quantized, torch.bfloat16)


def fused(block: torch.nn.Module, *names: str) -> torch.nn.Module:
    """Our block with these of its functions replaced by fused ones, as the loader replaces them; all without names."""
    from ..host import fused_block

    for name, function in fused_block.replacements(block).items():
        if not names or name in names:
            module, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(module), attribute, function)
    return block
