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


@pytest.mark.triton
@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_give_what_the_hosts_blocks_give(comfy_host, fused, tmp_path, monkeypatch, kind):
    model = quantized.load(quantized.write(tmp_path, kind), "int8", dtype="bf16")
    counts = calls(monkeypatch, fused)
    expected = quantized.output(comfy_host, quantized.on_host_blocks(model))
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


@pytest.mark.triton
def test_protected_layers_read_floats(comfy_host, fused, tmp_path, monkeypatch):
    floats = small.ideogram4()
    modules = [name for name in small.block_linears(floats) if not name.endswith(("w2", "qkv"))]
    path = small.save(tmp_path / "int8.safetensors", small.int8_native(floats, modules=modules))
    model = quantized.load(path, "int8")
    expected = quantized.output(comfy_host, quantized.on_host_blocks(model))
    counts = calls(monkeypatch, fused)
    assert quantized.relative(quantized.output(comfy_host, model), expected) < CLOSE
    assert counts == {"gated_residual_norm_quantize": 2, "gated_residual": 2}


def test_w1_and_w3_with_different_quantizers_read_codes_of_their_own(comfy_host, fused, tmp_path):
    floats = small.ideogram4()
    stored = small.int8_native(floats, convrot=True)
    plain = small.int8_native(floats)
    for name in ("layers.0.feed_forward.w3", "layers.1.feed_forward.w1"):
        stored |= {key: value for key, value in plain.items() if key.startswith(f"{name}.")}
    model = quantized.load(small.save(tmp_path / "mixed.safetensors", stored), "int8")
    expected = quantized.output(comfy_host, quantized.on_host_blocks(model))
    assert quantized.relative(quantized.output(comfy_host, model), expected) < CLOSE


@pytest.mark.parametrize("modules", [None, ["layers.0.feed_forward.w3", "layers.1.attention.qkv"]])
@pytest.mark.parametrize("kind", ["int8", "int8_smooth", "q4_k"])
def test_layers_with_a_lora_read_codes_and_floats(comfy_host, fused, tmp_path, monkeypatch, kind, modules):
    """The blocks stay fused; two LoRAs beside one layer; the effect is the one on the host's blocks."""
    model = quantized.load(quantized.write(tmp_path, kind), "int8", dtype="bf16")
    counts = calls(monkeypatch, fused)
    before = quantized.output(comfy_host, model)
    plain_counts = dict(counts)
    patched = quantized.add_lora(comfy_host, model, quantized.lora(seed=1, modules=modules), 1.4)
    patched = quantized.add_lora(comfy_host, patched, quantized.lora(seed=2), -0.8)
    expected = quantized.output(comfy_host, quantized.on_host_blocks(patched))
    counts.clear()
    actual = quantized.output(comfy_host, patched)
    assert counts == plain_counts
    assert quantized.relative(actual, before) > 2 * CLOSE
    assert quantized.relative(actual, expected) < CLOSE
    assert torch.equal(quantized.output(comfy_host, model), before)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora"])
def test_patched_layers_read_floats(comfy_host, fused, tmp_path, kind):
    """The effect of a LoRA on the fused model is the one on the host's blocks, and gone when it is removed."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    before = quantized.output(comfy_host, model)
    patched = quantized.add_lora(comfy_host, model, quantized.lora(kind))
    expected = quantized.output(comfy_host, quantized.on_host_blocks(patched))
    actual = quantized.output(comfy_host, patched)
    assert quantized.relative(actual, before) > 2 * CLOSE
    assert quantized.relative(actual, expected) < CLOSE
    assert torch.equal(quantized.output(comfy_host, model), before)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["attention.qkv", "feed_forward.w2", "feed_forward", "ffn_norm1"])
@pytest.mark.parametrize("change", ["hook", "pre_hook", "forward"])
def test_a_changed_module_sees_what_it_sees_in_the_hosts_block(comfy_host, fused, tmp_path, name, change):
    """Hooks and replaced forwards of other packs get tensors, and their results count."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    plain = quantized.output(comfy_host, model)
    module = model.model.diffusion_model.layers[1].get_submodule(name)
    seen = []

    def look(value):
        seen.append(value)
        assert isinstance(value, torch.Tensor)
        return value

    if change == "hook":
        module.register_forward_hook(lambda module, args, y: y.flip(-1) * (look(args[0]).numel() > 0))
    elif change == "pre_hook":
        module.register_forward_pre_hook(lambda module, args: (look(args[0]).flip(-1), *args[1:]))
    else:
        original = module.forward
        module.forward = lambda x, *args, **kwargs: original(look(x), *args, **kwargs).flip(-1)
    changed = quantized.output(comfy_host, model)
    expected = quantized.output(comfy_host, quantized.on_host_blocks(model))
    assert quantized.relative(changed, plain) > 2 * CLOSE
    assert quantized.relative(changed, expected) < CLOSE
    reasons = fused.report(model)
    assert reasons[0] == "Fused blocks: 1 of 2" and reasons[1].startswith("  1 not fused: ")
    assert seen


@pytest.mark.triton
def test_a_patch_of_another_pack_on_the_block_wins(comfy_host, fused, tmp_path):
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    patched = model.clone()
    block = model.model.diffusion_model.layers[0]
    patched.add_object_patch(
        "diffusion_model.layers.0.forward",
        lambda x, *args, **kwargs: 10 * type(block).forward(block, x, *args, **kwargs),
    )
    assert quantized.relative(quantized.output(comfy_host, patched), quantized.output(comfy_host, model)) > 2 * CLOSE
    assert fused.report(patched) == ["Fused blocks: 1 of 2", "  1 not fused: another pack has patched the block"]


def test_models_that_cannot_be_fused_are_left_alone(comfy_host, fused, tmp_path, monkeypatch):
    path = quantized.write(tmp_path, "int8")
    assert not quantized.load(path, "exact").object_patches
    monkeypatch.setattr(fused, "KNOWN_FINGERPRINT", "another")
    newer = quantized.load(path, "int8")
    assert not newer.object_patches
    assert fused.report(newer)[1] == "  2 not fused: this ComfyUI's block is not one that this version of Lowbit knows"


def test_a_host_whose_feed_forward_has_no_gating_of_its_own(fused, monkeypatch):
    monkeypatch.delattr(fused.host_feed_forward.FeedForward, "_forward_silu_gating")
    monkeypatch.setattr(fused, "REPLACED", fused._host_functions())
    assert fused.REPLACED[-1] is None and fused.fingerprint.__wrapped__() == ""


@pytest.mark.parametrize(
    "body, hands_on",
    [
        ("batch, length, _ = x.shape; return self.o(self.qkv(x).view(batch, length, 3))", True),
        ("return self.o(self.qkv(x))", True),
        ("x = x.contiguous(); return self.o(self.qkv(x))", False),
        ("return self.o(self.qkv(x) + self.bypass(x))", False),
        ("return self.o(self.q(x) + self.kv(x))", False),
    ],
)
def test_what_an_attention_may_do_with_codes(fused, monkeypatch, body, hands_on):
    """A newer host's attention may be another, as long as only `qkv` reads what it is given."""
    source = f"def forward(self, x, attn_mask, freqs_cis, transformer_options={{}}):\n    {body}\n"
    monkeypatch.setattr(fused.inspect, "getsource", lambda function: source)
    assert fused.attention_hands_on.__wrapped__() is hands_on


def test_blocks_whose_attention_reads_floats_are_not_fused(fused, tmp_path, monkeypatch):
    path = quantized.write(tmp_path, "int8")
    monkeypatch.setattr(fused, "attention_hands_on", lambda: False)
    assert not quantized.load(path, "int8").object_patches


@pytest.mark.triton
@pytest.mark.parametrize("times", [1, 2])
def test_one_timestep_for_a_batch(comfy_host, fused, tmp_path, monkeypatch, times):
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    on_host = quantized.on_host_blocks(model)
    x = torch.randn(2, 128, 8, 8, generator=torch.Generator().manual_seed(0))
    context = comfy_host.conditioning(tokens=8)[0][0].expand(2, -1, -1)
    results = []
    for each in (on_host, model):
        comfy_host.comfy.model_management.load_models_gpu([each])
        device, transformer = each.load_device, each.model.diffusion_model
        counts = calls(monkeypatch, fused)
        with torch.inference_mode():
            results.append(transformer(x.to(device), torch.full((times,), 0.5, device=device), context.to(device)))
    assert ("gated_residual" in counts) is (times == 2)  # the kernels take a modulation for each picture
    assert quantized.relative(*results[::-1]) < CLOSE


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["int8", "q4_k"])
def test_training_computes_in_floats(comfy_host, fused, tmp_path, monkeypatch, kind):
    path = quantized.write(tmp_path, kind)
    monkeypatch.setattr(comfy_host.comfy.model_management, "in_training", True)
    expected = quantized.output(comfy_host, quantized.load(path, "exact"))
    model = quantized.load(path, "int8")
    counts = calls(monkeypatch, fused)
    assert torch.equal(quantized.output(comfy_host, model), expected)
    assert not counts


def test_a_clone_with_modules_of_its_own_runs_them(comfy_host, fused, tmp_path):
    """As the host clones for hooks and for further GPUs: not the source's weights."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    other = quantized.load(quantized.write(tmp_path, "int8", seed=1), "int8")
    expected = quantized.output(comfy_host, other)
    clone = model.clone(model_override=other.get_clone_model_override())
    assert torch.equal(quantized.output(comfy_host, clone), expected)
    assert all(patch.block is not model.model.diffusion_model.layers[0] for patch in blocks_of(clone))


def blocks_of(model) -> list:
    return [patch for key, patch in model.object_patches.items() if key.endswith("layers.0.forward")]


def test_gradients_go_through_the_hosts_functions(comfy_host, fused, tmp_path):
    """Quantized activations have none: the whole feed-forward computes exactly, and so does a block."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    comfy_host.comfy.model_management.load_models_gpu([model])
    feed_forward = model.model.diffusion_model.layers[0].feed_forward
    floats = quantized.floats_of(model)
    w1, w2, w3 = (floats[f"layers.0.feed_forward.{name}.weight"].to(model.load_device) for name in ("w1", "w2", "w3"))
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    with torch.inference_mode(False), torch.enable_grad():
        w1, w2, w3 = w1.clone(), w2.clone(), w3.clone()
        values = torch.randn(1, 20, 256, device=model.load_device)
        x, reference = values.clone().requires_grad_(), values.clone().requires_grad_()
        feed_forward(x).square().sum().backward()
        linear(silu(linear(reference, w1)) * linear(reference, w3), w2).square().sum().backward()
    assert quantized.relative(x.grad, reference.grad) < 1e-4


def test_a_replaced_feed_forward_sees_tensors_between_its_layers(comfy_host, fused, tmp_path):
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    module = model.model.diffusion_model.layers[0].feed_forward
    seen = []

    def forward(x):
        seen.append(module._forward_silu_gating(module.w1(x), module.w3(x)))
        return module.w2(seen[-1])

    module.forward = forward
    quantized.output(comfy_host, model)
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)


@pytest.mark.triton
def test_a_patch_taken_back_leaves_the_block_fused(comfy_host, fused, tmp_path, monkeypatch):
    """Bypass LoRA puts the class's own bound method back as an attribute of the module."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    module = model.model.diffusion_model.layers[0].attention.o
    original = module.forward
    module.forward = lambda x: original(x)
    assert fused.report(model)[0] == "Fused blocks: 1 of 2"
    module.forward = original
    assert fused.report(model) == ["Fused blocks: 2 of 2"]
    counts = calls(monkeypatch, fused)
    quantized.output(comfy_host, model)
    assert counts["gated_residual_norm_quantize"] == 2


@pytest.mark.triton
@pytest.mark.parametrize("name", ["", "attention", "feed_forward"])
def test_a_patch_on_the_hosts_class_is_respected(comfy_host, fused, tmp_path, monkeypatch, name):
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    patched = type(model.model.diffusion_model.layers[0].get_submodule(name))
    original, calls_seen = patched.forward, []

    def forward(self, x, *args, **kwargs):
        calls_seen.append(self)
        return original(self, x.contiguous(), *args, **kwargs)

    monkeypatch.setattr(patched, "forward", forward)
    quantized.output(comfy_host, model)
    assert len(calls_seen) == 2
    assert fused.report(model)[1] == "  2 not fused: another pack has patched the block's class"
