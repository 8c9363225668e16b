"""Unpacking of every GGML type alone, to bf16 and to INT8 rows, as a fraction of the copy bandwidth of the same run.

`fraction_of_copy` compares with a copy of 1 GiB, `fraction_of_same_copy` with one that moves as many bytes as the
unpacking. All but the large copy are replayed from CUDA graphs: the device's own time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..formats import ggml
from ..kernels.unpack import unpack
from ..kernels.unpack_to_int8 import find_row_scale, unpack_to_int8
from . import operands, results, shapes, timing

CSV_NAME = "gguf_unpack.csv"
COLUMNS = (*results.ENVIRONMENT, "variant", "N", "K", "ms", "gbps", "fraction_of_copy", "fraction_of_same_copy")

COPY_BYTES = 2**30
ROTATION_GROUP = 256


def rows(options: timing.Options) -> Iterator[dict]:
    layers = [layer for layer in shapes.LAYERS if layer.name != "adaln_modulation"]
    quantized = [name for name, ggml_type in ggml.TYPES.items() if ggml_type.plain_dtype is None]
    for index, layer in enumerate(layers):  # every type at one shape, those with most users at each
        yield from unpack_rows(options, layer, ["Q4_K", "Q8_0"] if index else quantized)


def unpack_rows(options: timing.Options, layer: shapes.Layer, types: list[str]) -> Iterator[dict]:
    N, K = layer.N, layer.K
    source = torch.randint(0, 256, (COPY_BYTES if options.device.type == "cuda" else 1024,), dtype=torch.uint8)
    source = source.to(options.device)
    target = torch.empty_like(source)
    large_copy = timing.Variant("copy", [lambda: target.copy_(source)])
    variants = []
    moved = {"copy": 2 * source.nbytes}
    w = operands.normal(N, K, device=options.device, seed=1).float()
    for ggml_type in types:
        name = ggml_type.lower()
        if ggml.TYPES[ggml_type].can_quantize:
            blocks = ggml.quantize(w, ggml_type)
        else:  # any bytes are blocks of the type; scales that are not finite cost no other time
            blocks = torch.randint(0, 256, (N, ggml.row_size_bytes(ggml_type, K)), dtype=torch.uint8)
            blocks = blocks.to(options.device)
        packed = operands.cold(blocks)
        moved[f"{name}_to_bf16"] = blocks.nbytes + 2 * N * K
        variants.append(
            timing.Variant(
                f"{name}_to_bf16", timing.cycled(lambda b, t=ggml_type: unpack(b, t, torch.bfloat16), packed)
            )
        )
        for suffix, group in (("", 0), ("_rotated", ROTATION_GROUP)):
            row_scale = find_row_scale(blocks, ggml_type, group)
            moved[f"{name}_to_int8{suffix}"] = blocks.nbytes + N * K
            calls = timing.cycled(lambda b, t=ggml_type, s=row_scale, g=group: unpack_to_int8(b, t, s, g), packed)
            variants.append(timing.Variant(f"{name}_to_int8{suffix}", calls))
    for size in {size for size in moved.values() if size < moved["copy"]}:
        parts = [source[start : start + size // 2] for start in range(0, source.nbytes - size // 2 + 1, size // 2)]
        copies = timing.cycled(lambda part, size=size: target[: size // 2].copy_(part), parts)
        variants.append(timing.Variant(f"copy_{size}", copies))
        moved[f"copy_{size}"] = size
    times = options.measure([large_copy, *(timing.graphed(variant, variant.name) for variant in variants)])
    gbps = {name: moved[name] / ms / 1e6 for name, ms in times.items()}
    for name, ms in times.items():
        if name.startswith("copy_"):
            continue
        same_copy = f"copy_{moved[name]}" if moved[name] < moved["copy"] else "copy"
        yield {
            "variant": name,
            "N": N,
            "K": K,
            "ms": ms,
            "gbps": gbps[name],
            "fraction_of_copy": gbps[name] / gbps["copy"],
            "fraction_of_same_copy": gbps[name] / gbps[same_copy],
        }


def demands(measured_rows: list[dict]) -> Iterator[results.Demand]:
    """To bf16: 80 % of the copy bandwidth for the types with most users, 55 % for the others."""
    for row in measured_rows:
        if row["variant"].endswith("_to_bf16"):
            floor = 0.8 if row["variant"].startswith(("q4_k_", "q8_0_")) else 0.55
            title = f"{row['variant']} {row['N']}x{row['K']}: fraction of copy bandwidth"
            yield results.Demand(title, row["fraction_of_copy"], floor)
