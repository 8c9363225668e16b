"""Models beside each other: two loads with different settings, clones, the stock guiders, and the host's node cache."""

import pytest
import torch
from host_harness import graphs
from host_harness import quantized_models as quantized
from host_harness import small_models as small

SETTINGS = [("exact", "fp32"), ("int8", "fp32"), ("int8", "bf16")]


@pytest.mark.parametrize("kind", ["int8", "q4_k"])
def test_loads_with_different_settings_do_not_disturb_each_other(comfy_host, tmp_path, kind):
    path = quantized.write(tmp_path, kind)
    alone = []
    for settings in SETTINGS:
        alone.append(quantized.output(comfy_host, quantized.load(path, *settings)))
        comfy_host.unload()
    assert not torch.equal(alone[0], alone[1])
    models = [quantized.load(path, *settings) for settings in SETTINGS]
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(quantized.output(comfy_host, model), expected)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_int8_mode_against_exact(comfy_host, tmp_path, kind):
    """Quantizing the activations per token costs no more than this; SQNR in dB of the model's output."""
    path = quantized.write(tmp_path, kind)
    exact = quantized.output(comfy_host, quantized.load(path))
    int8 = quantized.output(comfy_host, quantized.load(path, "int8"))
    sqnr = 20 * torch.log10(exact.norm() / (int8 - exact).norm())
    assert 40 < sqnr < 80


def test_what_newer_hosts_ask_of_a_linear_layer_is_theirs(comfy_host, monkeypatch):
    """They hand over an activation beside the input, and call `_forward_linear` for the product."""
    from lowbit.host.ops import LoadSettings, make_operations

    linear = make_operations(LoadSettings("m", "exact")).Linear(4, 3, dtype=torch.float32)
    linear.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
    asked = []
    host_linear = next(base for base in type(linear).__mro__ if base.__module__ == "comfy.ops")
    monkeypatch.setattr(host_linear, "forward", lambda self, *args, **kwargs: asked.append((args, kwargs)) or args[0])
    x = torch.ones(2, 4)
    assert linear(x, input_act="swiglu", act_up=x) is x and asked == [((x,), {"input_act": "swiglu", "act_up": x})]
    assert linear._forward_linear(x) is x and asked[1:] == [((x,), {})]


@pytest.mark.parametrize("quantize", [False, True])
def test_the_host_can_tell_on_which_disk_a_model_lies(comfy_host, tmp_path, monkeypatch, quantize):
    """From ComfyUI 0.37 on; what is quantized while it is loaded lies on none."""
    from lowbit.host.model import NONE, LoadRequest, load_pair

    sd, seen = comfy_host.module("comfy.sd"), set()
    load = sd.load_diffusion_model_state_dict

    def watched(state_dict, *args):
        seen.update(getattr(tensor.untyped_storage(), "_comfy_source_path", None) for tensor in state_dict.values())
        return load(state_dict, *args)

    monkeypatch.setattr(sd, "load_diffusion_model_state_dict", watched)
    path = small.save(tmp_path / "m.safetensors", small.ideogram4()) if quantize else quantized.write(tmp_path, "q4_k")
    load_pair(LoadRequest(str(path), quantize=quantize), NONE)
    assert seen == {None if quantize else str(path.resolve())}


def test_int8_mode_is_the_product_of_the_codes(comfy_host, tmp_path):
    """The layer's output from its definition: integer product in int64, one epilogue in float32."""
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    layer = model.model.diffusion_model.layers[0].feed_forward.w1
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x_scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / x_scale).round().to(torch.int64)
    product = codes @ layer.weight._qdata.to(torch.int64).T
    expected = product.float() * x_scale * layer.weight._params.scale.reshape(1, -1)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", ["int8_smooth", "q4_k"])
def test_deep_clone(comfy_host, tmp_path, kind):
    """A copy for another device: loaded anew, equal, with the patches of the original and its own modules."""
    model = quantized.add_lora(comfy_host, quantized.load(quantized.write(tmp_path, kind)), quantized.lora())
    before = quantized.output(comfy_host, model)
    with torch.inference_mode():
        copy = model.deepclone_multigpu()
    assert copy.model is not model.model and type(copy) is type(model)
    quantized.assert_same_bytes(quantized.stored_bytes(copy), quantized.stored_bytes(model))
    assert torch.equal(quantized.output(comfy_host, copy), before)


def test_clones_are_ours(comfy_host, tmp_path):
    model = quantized.load(quantized.write(tmp_path, "q8_0"))
    before = quantized.output(comfy_host, model)
    for clone in (
        model.clone(),
        model.clone(disable_dynamic=True),
        model.clone(force_deepcopy=True),
        model.clone().clone(),
    ):
        assert type(clone).__name__ in ("LowbitModelPatcher", "LowbitModelPatcherDynamic")
        assert torch.equal(quantized.output(comfy_host, clone), before)


@pytest.fixture(scope="module")
def branches(comfy_host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    models = [quantized.load(quantized.write(folder, "q4_k", branch)) for branch in ("conditional", "unconditional")]
    return models, [quantized.full_precision(comfy_host, model) for model in models]


def test_ksampler(comfy_host, branches):
    def sampled(model):
        latent = {"samples": torch.zeros(1, 128, 8, 8)}
        negative = comfy_host.conditioning(tokens=8, seed=9)
        positive = comfy_host.conditioning(tokens=8)
        sampler = comfy_host.nodes.KSampler()
        return sampler.sample(model, 0, 2, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    assert quantized.relative(sampled(branches[0][0]), sampled(branches[1][0])) < 1e-4


@pytest.mark.parametrize("same", [False, True], ids=["two_models", "the_same_model"])
def test_dual_model_guider_with_cfg_override(comfy_host, branches, same):
    override = comfy_host.module("comfy_extras.nodes_custom_sampler").CFGOverride

    def sampled(models):
        model = override.execute(models[0], 2.0, 0.5, 1.0).result[0]
        return comfy_host.sample(model, models[0] if same else models[1], width=128, height=128)

    assert quantized.relative(sampled(branches[0]), sampled(branches[1])) < 1e-4
    plain = comfy_host.sample(branches[0][0], branches[0][0] if same else branches[0][1], width=128, height=128)
    assert quantized.relative(sampled(branches[0]), plain) > 0.01


def test_a_lora_on_one_branch_alone(comfy_host, branches):
    def effect(models):
        patched = quantized.add_lora(comfy_host, models[0], quantized.lora())
        return [comfy_host.sample(m, models[1], width=128, height=128) for m in (patched, models[0])]

    (ours, ours_plain), (stock, stock_plain) = effect(branches[0]), effect(branches[1])
    assert quantized.relative(ours - ours_plain, stock - stock_plain) < 1e-3


# Through the server


def test_what_a_second_prompt_executes(comfy_server):
    names = small.write_stand_ins(comfy_server.base_directory)
    folder = comfy_server.base_directory / "models" / "diffusion_models"
    files = [quantized.write(folder, "q4_k", branch).name for branch in ("conditional", "unconditional")]
    prompt = graphs.stock_ideogram4(names, text=None, latent="cached")
    del prompt["model_negative"]
    inputs = {"checkpoint": files[0], "unconditional": files[1], "compute_mode": "exact", "dtype": "fp32"}
    prompt["model"] = graphs.node("Lowbit_LoadDiffusionModelGguf", **inputs)
    prompt = graphs.rewired(prompt, {("model_negative", 0): ("model", 1)})

    def executed(prompt):
        steps = []
        comfy_server.queue(prompt, on_progress=steps.append)
        return {step.node for step in steps}

    assert {"Lowbit_LoadDiffusionModelGguf", "SamplerCustomAdvanced"} <= executed(prompt)
    assert executed(prompt) == set()
    again = executed(graphs.with_inputs(prompt, "RandomNoise", noise_seed=1))
    assert "SamplerCustomAdvanced" in again and "Lowbit_LoadDiffusionModelGguf" not in again


def test_what_has_no_effect_or_looks_wrong_is_logged(comfy_host, tmp_path, caplog):
    from lowbit.host.model import NONE, LoadRequest, load_pair

    conditional, unconditional = (
        quantized.write(tmp_path, "int8", branch) for branch in ("conditional", "unconditional")
    )
    with caplog.at_level("WARNING", logger="lowbit"):
        load_pair(LoadRequest(str(conditional)), str(unconditional))
        assert not caplog.messages
        load_pair(LoadRequest(str(unconditional)), str(conditional))
        load_pair(LoadRequest(str(conditional)), str(conditional))
        load_pair(LoadRequest(str(conditional), quantize=True, protected=("feed_forward.w2",)), NONE)
        load_pair(LoadRequest(str(conditional)), NONE, unconditional_base_path=str(unconditional))
    swapped, twice, ignored, no_branch = caplog.messages
    assert "are the wrong way round: conditional first" in swapped
    assert f"{conditional.name} is picked for both branches, but by its name holds one of them" in twice
    assert f"{conditional.name} is quantized already: protected_layers is ignored" in ignored
    assert f"{conditional.name} is one model for both: base_checkpoint_unconditional is ignored" in no_branch
