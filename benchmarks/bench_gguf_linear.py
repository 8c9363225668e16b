"""GGUF linear layers at the model's shapes: bf16 in, bf16 out, unpacking included.

`torch_*` unpacks with plain torch and multiplies in bf16, as GGUF loaders without kernels do. `error` is relative to
the float32 product of the unquantized weight, so it holds the file format's own error. Printed beside the rows: the
memory that one call takes beside its operands, which are the result and one unpacked weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.nn import functional

from ..formats import GgmlWeight, ggml
from ..kernels.dispatch import use_implementation
from ..kernels.quantized_linear import ggml_weight_linear, row_rotation_group
from ..kernels.unpack import unpack
from ..kernels.unpack_to_int8 import find_row_scale
from . import bench_int8_linear, operands, peers, results, shapes, timing

CSV_NAME = "gguf_linear.csv"
COLUMNS = bench_int8_linear.COLUMNS

TYPES = ("Q4_K", "Q8_0")


def rows(options: timing.Options) -> Iterator[dict]:
    for layer in shapes.LAYERS:
        for M in layer.tokens or options.tokens or shapes.TOKENS:
            yield from linear_rows(options, layer, M)


def linear_rows(options: timing.Options, layer: shapes.Layer, M: int) -> Iterator[dict]:
    x = operands.activations(M, layer.K, options.device)
    w = operands.normal(layer.N, layer.K, device=options.device, seed=1)
    variants = linear_variants(x, w)
    reference = operands.float32_linear(x, w)
    errors = {variant.name: operands.relative_error(variant.calls[0](), reference) for variant in variants}
    del reference
    if options.device.type == "cuda":
        peaks = ", ".join(f"{variant.name} {peak_mib(variant, options.device):.0f}" for variant in variants)
        result_mib = 2 * M * layer.N / 2**20
        print(f"{layer.name} M={M}: most memory of a call in MiB, its result ({result_mib:.0f}) included: {peaks}")
    if M <= shapes.SMALL_M:
        variants += timing.all_graphed(variants)
    yield from bench_int8_linear.measured(options, layer, M, variants, errors)


def linear_variants(x: torch.Tensor, w: torch.Tensor) -> list[timing.Variant]:
    xs, ws = operands.cold(x), operands.cold(w)
    makers = {"bf16": lambda: timing.cycled(functional.linear, xs, ws)}
    for ggml_type in TYPES:
        weight = GgmlWeight(ggml.quantize(w.float(), ggml_type), tuple(w.shape), ggml_type)
        weights = [dataclasses.replace(weight, data=data) for data in operands.cold(weight.data)]
        name = ggml_type.lower()
        makers[f"torch_{name}"] = lambda weights=weights: timing.cycled(torch_linear, xs, weights)
        for mode in ("exact", "int8") if x.shape[0] > shapes.SMALL_M else ("exact",):  # which few tokens are in both
            makers[f"lowbit_{name}_{mode}"] = lambda weights=weights, mode=mode: lowbit_calls(xs, weights, mode)
    return peers.available(makers)


def lowbit_calls(xs: list[torch.Tensor], weights: list[GgmlWeight], mode: str) -> list:
    first = weights[0]
    row_scale = find_row_scale(first.data, first.ggml_type, row_rotation_group(first))  # once, as at first use
    return timing.cycled(lambda x, weight: ggml_weight_linear(x, weight, None, mode, row_scale), xs, weights)


def torch_linear(x: torch.Tensor, weight: GgmlWeight) -> torch.Tensor:
    with use_implementation("reference"):
        return functional.linear(x, unpack(weight.data, weight.ggml_type, x.dtype))


def peak_mib(variant: timing.Variant, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.calls[0]()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def demands(measured_rows: list[dict]) -> Iterator[results.Demand]:
    """The floors that a run has to reach, each shape by itself."""
    times = results.Times(measured_rows)
    floors = (
        ("lowbit_q4_k_int8", "bf16", 1.4),
        ("lowbit_q8_0_int8", "bf16", 1.4),
        ("lowbit_q4_k_int8", "torch_q4_k", 2.8),
        ("lowbit_q8_0_int8", "torch_q8_0", 1.9),
        ("lowbit_q4_k_exact", "bf16", 0.9),
        ("lowbit_q8_0_exact", "bf16", 0.9),
    )
    few = (
        ("lowbit_q4_k_exact", "bf16", 1.0),
        ("lowbit_q8_0_exact", "bf16", 1.0),
        ("lowbit_q4_k_exact_graph", "bf16_graph", 1.0),
        ("lowbit_q8_0_exact_graph", "bf16_graph", 1.0),
    )
    for layer in (layer for layer in shapes.LAYERS if layer.name != "llm_cond_proj"):
        for M in times.tokens(layer.N, layer.K):
            for variant, peer, floor in few if M <= shapes.SMALL_M else floors:
                speedup = times.speedup(variant, (peer,), M, layer.N, layer.K)
                yield results.Demand(f"{layer.name} M={M}: {variant} / {peer}", speedup, floor)
