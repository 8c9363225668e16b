"""Ideogram 4's blocks with fused quantizers: the results of the host's own blocks, and the host's code when changed."""

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small

KINDS = ("int8", "int8_smooth", "int8_convrot", "q8_0", "q4_k")
# Codes and norms are rounded at other places than in the host's code: noise of a few codes' rounding.
CLOSE = 0.01


@pytest.fixture
def fused(comfy_host):
    from lowbit.host import fused_block

    return fused_block


def unfused_clone(model):
    """The same model on the host's own blocks."""
    clone = model.clone()
    for key in [key for key in clone.object_patches if "layers." in key]:
        del clone.object_patches[key]
    return clone


def calls(monkeypatch, fused) -> dict[str, int]:
    """How often each fused op is called from now on."""
    counts = {}
    for name in ("rms_norm_scale_quantize", "gated_residual_norm_quantize", "gated_residual", "swiglu_quantize"):
        original = getattr(fused, name)

        def counted(*args, name=name, original=original):
            counts[name] = counts.get(name, 0) + 1
            return original(*args)

        monkeypatch.setattr(fused, name, counted)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_give_what_the_hosts_blocks_give(comfy_host, fused, tmp_path, monkeypatch, kind):
    model = quantized.load(quantized.write(tmp_path, kind), "int8", dtype="bf16")
    counts = calls(monkeypatch, fused)
    expected = quantized.output(comfy_host, unfused_clone(model))
    assert not counts
    actual = quantized.output(comfy_host, model)
    # w1 and w3 of a smoothed layer differ in their factors: each reads codes of its own.
    shared = kind != "int8_smooth"
    layers = len(model.model.diffusion_model.layers)
    assert counts == {
        "rms_norm_scale_quantize": layers * (1 if shared else 3),
        "gated_residual": layers * (1 if shared else 2),
        "swiglu_quantize": layers,
    } | ({"gated_residual_norm_quantize": layers} if shared else {})
    assert quantized.relative(actual, expected) < CLOSE
    assert fused.report(model) == [f"Fused blocks: {layers} of {layers}"]
