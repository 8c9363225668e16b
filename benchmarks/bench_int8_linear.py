"""INT8 linear layers at the model's shapes, all in: bf16 in, bf16 out, the activations' quantization included.

`ratio_to_bf16` compares with the bf16 variant that does the same work: `bf16_swiglu` for the variants with SwiGLU in
front of the product, `bf16_graph` for those replayed from a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.nn import functional

from ..formats.int8 import Int8Weight, quantize_weight
from ..kernels.int8_linear import int8_linear
from ..kernels.quantize_per_token import quantize_per_token
from ..kernels.quantized_linear import int8_weight_linear
from ..kernels.swiglu_quantize import swiglu_quantize
from . import operands, peers, results, shapes, timing

CSV_NAME = "int8_linear.csv"
COLUMNS = (*results.ENVIRONMENT, "variant", "M", "N", "K", "ms", "tops", "ratio_to_bf16", "error")

ROTATION_GROUP = 256
COMFY_KITCHEN = ("comfy_kitchen_cuda", "comfy_kitchen_triton")
COMFY_KITCHEN_CONVROT = ("comfy_kitchen_cuda_convrot", "comfy_kitchen_triton_convrot")
COMFY_KITCHEN_SWIGLU = ("comfy_kitchen_cuda_swiglu_convrot",)


def rows(options: timing.Options) -> Iterator[dict]:
    for layer in shapes.LAYERS:
        for M in layer.tokens or options.tokens or shapes.TOKENS:
            yield from linear_rows(options, layer, M)
            if layer.name == "w2":
                yield from swiglu_rows(options, layer, M)


def linear_rows(options: timing.Options, layer: shapes.Layer, M: int) -> Iterator[dict]:
    x = operands.activations(M, layer.K, options.device)
    w = operands.normal(layer.N, layer.K, device=options.device, seed=1)
    bias = operands.normal(layer.N, device=options.device, seed=2) if layer.bias else None
    variants = linear_variants(x, w, bias)
    reference = operands.float32_linear(x, w, bias)
    errors = {variant.name: operands.relative_error(variant.calls[0](), reference) for variant in variants}
    del reference
    if M <= shapes.SMALL_M:  # bound by launches: also what the device alone needs
        variants += timing.all_graphed(variants)
    yield from measured(options, layer, M, variants, errors)


def swiglu_rows(options: timing.Options, layer: shapes.Layer, M: int) -> Iterator[dict]:
    gate = operands.normal(M, layer.K, device=options.device, seed=3)
    up = operands.activations(M, layer.K, options.device, seed=4)
    w = operands.normal(layer.N, layer.K, device=options.device, seed=1)
    variants = swiglu_variants(gate, up, w)
    reference = operands.float32_linear(functional.silu(gate.float()) * up.float(), w)
    errors = {variant.name: operands.relative_error(variant.calls[0](), reference) for variant in variants}
    del reference
    yield from measured(options, layer, M, variants, errors)


def measured(
    options: timing.Options, layer: shapes.Layer, M: int, variants: list[timing.Variant], errors: dict[str, float]
) -> Iterator[dict]:
    times = options.measure(variants)
    for name, ms in times.items():
        yield {
            "variant": name,
            "M": M,
            "N": layer.N,
            "K": layer.K,
            "ms": ms,
            "tops": 2 * M * layer.N * layer.K / ms / 1e9,
            "ratio_to_bf16": times[baseline(name)] / ms,
            "error": errors[name.removesuffix("_graph")],
        }


def baseline(variant: str) -> str:
    """The bf16 variant that does the same work."""
    return "bf16" + ("_swiglu" if "swiglu" in variant else "") + ("_graph" if variant.endswith("_graph") else "")


# Variants


def linear_variants(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> list[timing.Variant]:
    xs, ws = operands.cold(x), operands.cold(w)
    plain, rotated = quantize_weight(w), quantize_weight(w, rotation_group=ROTATION_GROUP)
    plain_weights, rotated_weights = cold_weights(plain), cold_weights(rotated)
    fp8_weights = operands.cold(w.to(torch.float8_e4m3fn))
    makers = {
        "bf16": lambda: timing.cycled(lambda x, w: functional.linear(x, w, bias), xs, ws),
        # What a card without FP8 units must do with an FP8 weight.
        "fp8_unpacked": lambda: timing.cycled(lambda x, w: functional.linear(x, w.to(x.dtype), bias), xs, fp8_weights),
    }
    for backend in ("cuda", "triton"):
        for convrot in (False, True):
            name = f"comfy_kitchen_{backend}{'_convrot' if convrot else ''}"
            makers[name] = lambda backend=backend, convrot=convrot: comfy_kitchen_calls(
                backend, xs, w, bias, convrot=convrot
            )
    makers["lowbit_int8"] = lambda: timing.cycled(
        lambda x, weight: int8_weight_linear(x, weight, bias, "int8"), xs, plain_weights
    )
    makers["lowbit_int8_rotated"] = lambda: timing.cycled(
        lambda x, weight: int8_weight_linear(x, weight, bias, "int8"), xs, rotated_weights
    )
    if x.shape[0] > shapes.SMALL_M:  # fewer tokens are not quantized, and `_int_mm` takes none
        makers["torch_int8"] = lambda: timing.cycled(
            lambda x, weight: torch_int8_linear(x, weight, bias), xs, plain_weights
        )
        xq, x_scale = quantize_per_token(x)
        makers["lowbit_int8_product"] = lambda: timing.cycled(
            lambda xq, weight: int8_linear(xq, x_scale, weight.data, weight.scale, bias, x.dtype),
            operands.cold(xq),
            plain_weights,
        )
    return peers.available(makers)


def swiglu_variants(gate: torch.Tensor, up: torch.Tensor, w: torch.Tensor) -> list[timing.Variant]:
    """silu(gate) * up, quantized, and the product. comfy-kitchen gets gate and up side by side, as it wants them."""
    gates, ups = operands.cold(gate), operands.cold(up)

    def lowbit_linear(gate, up, weight):
        xq, x_scale = swiglu_quantize(gate, up, rotation_group=weight.rotation_group)
        return int8_linear(xq, x_scale, weight.data, weight.scale, out_dtype=gate.dtype)

    def lowbit(rotation_group: int) -> list:
        return timing.cycled(lowbit_linear, gates, ups, cold_weights(quantize_weight(w, rotation_group=rotation_group)))

    return peers.available(
        {
            "bf16_swiglu": lambda: timing.cycled(
                lambda gate, up, w: functional.linear(functional.silu(gate) * up, w), gates, ups, operands.cold(w)
            ),
            "comfy_kitchen_cuda_swiglu_convrot": lambda: comfy_kitchen_calls(
                "cuda", operands.cold(torch.cat((gate, up), dim=-1)), w, None, convrot=True, input_act="swiglu"
            ),
            "lowbit_swiglu": lambda: lowbit(0),
            "lowbit_swiglu_rotated": lambda: lowbit(ROTATION_GROUP),
        }
    )


def comfy_kitchen_calls(
    backend: str,
    xs: list[torch.Tensor],
    w: torch.Tensor,
    bias: torch.Tensor | None,
    convrot: bool,
    input_act: str | None = None,
) -> list:
    data, scale = peers.comfy_kitchen_weight(w, convrot)
    linear = peers.comfy_kitchen_linear(backend, xs[0], data, scale, bias, convrot, input_act)
    return timing.cycled(linear, xs, operands.cold(data))


def torch_int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Per-token INT8 of plain torch calls, each a pass over memory of its own."""
    x_scale = x.abs().amax(dim=-1, keepdim=True).float() / 127
    xq = (x / x_scale).round().to(torch.int8)
    y = torch._int_mm(xq, weight.data.t()).float() * x_scale * weight.scale.t()
    return (y if bias is None else y + bias).to(x.dtype)


def cold_weights(weight: Int8Weight) -> list[Int8Weight]:
    return [dataclasses.replace(weight, data=data) for data in operands.cold(weight.data)]


# Demands


def demands(measured_rows: list[dict]) -> Iterator[results.Demand]:
    """The floors that a run has to reach, each shape by itself."""
    times = results.Times(measured_rows)
    for layer in shapes.LAYERS:
        for M in times.tokens(layer.N, layer.K):
            for variant, against, peer_names, floor in floors(layer):
                speedup = times.speedup(variant, peer_names, M, layer.N, layer.K)
                yield results.Demand(f"{layer.name} M={M}: {variant} / {against}", speedup, floor)


def floors(layer: shapes.Layer) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """variant, the peer in words, the peers of which the fastest counts, and how many times faster to be."""
    if layer.name == "llm_cond_proj":
        yield "lowbit_int8", "bf16", ("bf16",), 1.15
    elif layer.tokens:
        yield "lowbit_int8", "bf16", ("bf16",), 1.0
        yield "lowbit_int8_graph", "bf16, replayed from a graph", ("bf16_graph",), 1.0
    else:
        yield "lowbit_int8", "bf16", ("bf16",), 1.6
        yield "lowbit_int8", "fastest comfy-kitchen", (*COMFY_KITCHEN, *COMFY_KITCHEN_CONVROT), 1.35
        yield "lowbit_int8_rotated", "fastest comfy-kitchen ConvRot", COMFY_KITCHEN_CONVROT, 1.45
    if layer.name == "w2":
        yield "lowbit_swiglu", "comfy-kitchen's fused SwiGLU", COMFY_KITCHEN_SWIGLU, 1.6
        yield "lowbit_swiglu_rotated", "comfy-kitchen's fused SwiGLU", COMFY_KITCHEN_SWIGLU, 1.6
