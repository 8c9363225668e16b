"""The activation quantizer and the producers fused with it, as a fraction of the device's own copy bandwidth.

The kernels take microseconds, so all but the large copy are replayed from CUDA graphs. `gbps` counts bytes read and
written, for a copy as for a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels.quantize_per_token import quantize_per_token
from ..kernels.rms_norm_scale_quantize import rms_norm_scale_quantize
from ..kernels.swiglu_quantize import swiglu_quantize
from . import operands, peers, results, shapes, timing

CSV_NAME = "quantize.csv"
COLUMNS = (
    *(*results.ENVIRONMENT, "variant", "M", "K", "ms"),
    *("gbps", "fraction_of_copy", "fraction_of_same_size_copy"),
)

COPY_BYTES = 2**30
ROTATION_GROUP = 256
EPS = 1e-5


def rows(options: timing.Options) -> Iterator[dict]:
    for M in options.tokens or shapes.TOKENS:
        yield from measured(options, M, shapes.HIDDEN, 3 * M * shapes.HIDDEN, "copy_same_size", block_variants)
        yield from measured(options, M, shapes.FFN, 3 * M * shapes.FFN, "copy_same_size", quantizer_variants)
        yield from measured(options, M, shapes.FFN, 5 * M * shapes.FFN, "copy_swiglu_size", swiglu_variants)


def measured(options: timing.Options, M: int, K: int, values: int, same_size: str, make_variants) -> Iterator[dict]:
    """Rows of variants that read and write as many bytes: `values` of the tokens, and their scales."""
    traffic = values + 4 * M
    source = random_bytes(COPY_BYTES, options.device)
    target = torch.empty_like(source)
    variants = [timing.Variant("copy", timing.cycled(target.copy_, [source]))]
    same_sources = operands.cold(random_bytes(traffic // 2, options.device))
    small = [timing.Variant(same_size, timing.cycled(torch.clone, same_sources)), *make_variants(options, M, K)]
    variants += [timing.graphed(variant, variant.name) for variant in small]
    times = options.measure(variants)
    copy_rate = 2 * COPY_BYTES / times["copy"] / 1e6
    for name, ms in times.items():
        rate = copy_rate if name == "copy" else traffic / ms / 1e6
        yield {
            "variant": name,
            "M": M,
            "K": K,
            "ms": ms,
            "gbps": rate,
            "fraction_of_copy": rate / copy_rate,
            "fraction_of_same_size_copy": rate / (traffic / times[same_size] / 1e6),
        }


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device, generator=generator)


# Variants


def quantizer_variants(options: timing.Options, M: int, K: int) -> list[timing.Variant]:
    xs = operands.cold(operands.activations(M, K, options.device))
    return peers.available(
        {
            "lowbit_quantize": lambda: timing.cycled(quantize_per_token, xs),
            "lowbit_quantize_rotated": lambda: timing.cycled(
                lambda x: quantize_per_token(x, rotation_group=ROTATION_GROUP), xs
            ),
            "comfy_kitchen_cuda_quantize": lambda: timing.cycled(peers.comfy_kitchen_quantizer("cuda", xs[0]), xs),
            "comfy_kitchen_cuda_quantize_convrot": lambda: timing.cycled(
                peers.comfy_kitchen_convrot_quantizer(xs[0]), xs
            ),
            "comfy_kitchen_triton_quantize": lambda: timing.cycled(peers.comfy_kitchen_quantizer("triton", xs[0]), xs),
        }
    )


def block_variants(options: timing.Options, M: int, K: int) -> list[timing.Variant]:
    """Those on a block's input: the quantizers, and RMSNorm times modulation in front of one."""
    xs = operands.cold(operands.activations(M, K, options.device).unsqueeze(0))
    weight = operands.normal(K, device=options.device, seed=1)
    scale = operands.normal(1, 1, K, device=options.device, seed=2)
    fused = {
        "lowbit_rms_norm_scale_quantize": lambda: timing.cycled(
            lambda x: rms_norm_scale_quantize(x, weight, scale, EPS), xs
        ),
        "lowbit_rms_norm_scale_quantize_rotated": lambda: timing.cycled(
            lambda x: rms_norm_scale_quantize(x, weight, scale, EPS, rotation_group=ROTATION_GROUP), xs
        ),
    }
    return quantizer_variants(options, M, K) + peers.available(fused)


def swiglu_variants(options: timing.Options, M: int, K: int) -> list[timing.Variant]:
    gate = operands.normal(M, K, device=options.device, seed=3)
    up = operands.activations(M, K, options.device, seed=4)
    gates, ups = operands.cold(gate), operands.cold(up)

    def comfy_kitchen() -> list:
        both = operands.cold(torch.cat((gate, up), dim=-1))
        return timing.cycled(peers.comfy_kitchen_convrot_quantizer(both[0], "swiglu"), both)

    return peers.available(
        {
            "lowbit_swiglu_quantize": lambda: timing.cycled(swiglu_quantize, gates, ups),
            "lowbit_swiglu_quantize_rotated": lambda: timing.cycled(
                lambda gate, up: swiglu_quantize(gate, up, rotation_group=ROTATION_GROUP), gates, ups
            ),
            "comfy_kitchen_cuda_swiglu_quantize_convrot": comfy_kitchen,
        }
    )


# Demands


def demands(measured_rows: list[dict]) -> Iterator[results.Demand]:
    """Three quarters of the copy bandwidth at 1024x1024."""
    for row in measured_rows:
        if row["variant"].startswith("lowbit_") and row["M"] == shapes.TOKENS[0]:
            text = f"{row['variant']} M={row['M']} K={row['K']}: fraction of copy bandwidth"
            yield results.Demand(text, float(row["fraction_of_copy"]), 0.75)
