"""LoRA hooks on conditionings: the host's patcher switches them on and off between the calls of one sampling run."""

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small

pytestmark = pytest.mark.usefixtures("plain_patcher")

EFFECT = 1e-3


@pytest.fixture(scope="module", params=("int8_smooth", "q4_k", "q3_k"))
def pair(request, comfy_host, tmp_path_factory):
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("hooks"), request.param))
    return model, quantized.full_precision(comfy_host, model)


def hook(host, file, strength=1.0, keyframes=()):
    hooks = host.module("comfy.hooks")
    group = hooks.create_hook_lora(dict(file), strength, 0.0)
    if keyframes:
        schedule = hooks.HookKeyframeGroup()
        for start, factor in keyframes:
            schedule.add(hooks.HookKeyframe(factor, start, guarantee_steps=0))
        group.set_keyframes_on_hooks(schedule)
    return group


def sampled(host, model, *hook_groups, steps=2):
    """A latent, with one conditioning for each group of hooks (None: without)."""
    positive = []
    for i, group in enumerate(hook_groups):
        ((features, extra),) = host.conditioning(tokens=8, seed=i)
        positive.append([features, extra | ({} if group is None else {"hooks": group})])
    return host.sample(model, positive=positive, steps=steps, width=128, height=128)


def assert_same_effect(host, pair, make_groups, steps=2, bound=EFFECT):
    model, twin = pair
    stored, count = quantized.stored_bytes(model), len(make_groups())
    before = sampled(host, model, *[None] * count, steps=steps)
    effect = sampled(host, model, *make_groups(), steps=steps) - before
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)
    assert torch.equal(sampled(host, model, *[None] * count, steps=steps), before)
    plain = sampled(host, twin, *[None] * count, steps=steps)
    expected = sampled(host, twin, *make_groups(), steps=steps) - plain
    assert expected.norm() > 0.01 * plain.norm()
    assert quantized.relative(effect, expected) < bound


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_one_hook(comfy_host, pair, kind):
    assert_same_effect(comfy_host, pair, lambda: [hook(comfy_host, quantized.lora(kind), 0.7)])


def test_different_hooks_on_two_conditionings_and_none_on_a_third(comfy_host, pair):
    """The modules are switched twice in each step; the second file also changes a bias and norms."""
    assert_same_effect(
        comfy_host,
        pair,
        lambda: [
            hook(comfy_host, quantized.lora(seed=1)),
            None,
            hook(comfy_host, quantized.lora("dora", seed=2) | quantized.vectors(), -0.5),
        ],
    )


def test_matrices_of_hooks_are_moved_once_a_sampling(comfy_host, tmp_path, monkeypatch):
    """Two prompts take turns in every step; keyframes change a strength."""
    from lowbit.host import lora

    made, down_and_up = [], lora.SidePath._down_and_up
    monkeypatch.setattr(lora.SidePath, "_down_and_up", lambda side, *args: made.append(1) or down_and_up(side, *args))
    model = quantized.load(quantized.write(tmp_path, "q4_k"))
    layers = len(quantized.quantized_linears(model))

    def moved(*groups, steps=4) -> int:
        made.clear()
        sampled(comfy_host, model, *groups, steps=steps)
        return len(made) // layers

    first, second = (quantized.lora(seed=seed) for seed in (1, 2))
    for _ in range(2):  # kept for one sampling, not for the next
        assert moved(hook(comfy_host, first), hook(comfy_host, second)) == 2
    assert moved(hook(comfy_host, first), None) == 1
    frames = [(0.0, 1.0), (0.5, 0.2)]
    assert moved(hook(comfy_host, first, keyframes=frames), hook(comfy_host, second)) == 3


def of_float_layers(seed: int):
    """A LoRA for the linear layers that the files do not quantize."""
    floats = small.ideogram4()
    modules = [name for name in small.linears(floats) if name not in small.block_linears(floats)]
    return quantized.lora(seed=seed, modules=modules)


def test_hooks_on_layers_that_are_not_quantized(comfy_host, pair):
    """In every step: the host keeps the merged weights for the next one."""

    def groups():
        return [hook(comfy_host, of_float_layers(1), 0.8), None, hook(comfy_host, of_float_layers(2), 0.8)]

    assert_same_effect(comfy_host, pair, groups, steps=3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_hook_leaves_a_files_wider_weights_as_they_were(comfy_host, tmp_path, dtype):
    model = quantized.load(quantized.write(tmp_path, "q4_k"), "exact", dtype)
    before = sampled(comfy_host, model, None, None)
    with_hook = sampled(comfy_host, model, hook(comfy_host, of_float_layers(1), 0.8), None)
    assert not torch.equal(with_hook, before)
    assert torch.equal(sampled(comfy_host, model, None, None), before)


def test_two_hooks_on_one_conditioning(comfy_host, pair):
    def groups():
        return [
            hook(comfy_host, quantized.lora(seed=1)).clone_and_combine(hook(comfy_host, quantized.lora(seed=2), 0.5))
        ]

    assert_same_effect(comfy_host, pair, groups)


def test_keyframes_change_the_strength_between_steps(comfy_host, pair):
    frames = [(0.0, 1.0), (0.4, 0.2), (0.7, -0.5)]
    scheduled = lambda: [hook(comfy_host, quantized.lora(), keyframes=frames)]  # noqa: E731
    assert_same_effect(comfy_host, pair, scheduled, steps=3)
    constant = sampled(comfy_host, pair[0], hook(comfy_host, quantized.lora()), steps=3)
    assert quantized.relative(sampled(comfy_host, pair[0], *scheduled(), steps=3), constant) > 0.01


def test_hook_over_a_lora(comfy_host, pair):
    """A hook on a model that a LoRA node has patched already, in both kinds."""
    model, twin = (quantized.add_lora(comfy_host, base, quantized.lora(seed=7)) for base in pair)
    assert_same_effect(comfy_host, (model, twin), lambda: [hook(comfy_host, quantized.lora(seed=8), 0.6)])
    # What is not added to the weight changes what the LoRA has made of it.
    assert_same_effect(comfy_host, (model, twin), lambda: [hook(comfy_host, quantized.lora("dora", seed=8)), None])
    model, twin = (quantized.add_lora(comfy_host, base, quantized.lora("dora", seed=7)) for base in pair)
    assert_same_effect(comfy_host, (model, twin), lambda: [hook(comfy_host, quantized.lora("lokr", seed=8), 0.6)])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_wraps_a_weight_sees_what_a_hook_makes_of_it(comfy_host, pair, kind):
    """Weight wrappers of other packs come after all patches: here the sign of every weight is lost."""
    model, twin = (quantized.add_lora(comfy_host, base, quantized.lora(seed=7)) for base in pair)
    for each in (model, twin):
        each.add_weight_wrapper("diffusion_model.layers.1.feed_forward.w2.weight", torch.abs)
    assert_same_effect(comfy_host, (model, twin), lambda: [hook(comfy_host, quantized.lora(kind, seed=8)), None])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_hook_stays_on_through_an_unload_and_a_load(comfy_host, pair, kind):
    """Of a part of the model, as another one needs its memory, and of text encoders, whose hooks stay on."""
    hooks = comfy_host.module("comfy.hooks")
    outputs = []
    for base in pair:
        model = quantized.add_lora(comfy_host, base, quantized.lora(seed=7)).clone()
        group = hook(comfy_host, quantized.lora(kind, seed=8), 0.6)
        model.register_all_hook_patches(group, hooks.create_target_dict(hooks.EnumWeightTarget.Model))
        plain = quantized.output(comfy_host, model)
        model.patch_hooks(group)
        hooked = call(comfy_host, model)
        model.partially_unload(model.offload_device, 1)
        if base is pair[1]:
            model.patch_hooks(group)  # the stock patcher forgets them
        unloaded = call(comfy_host, model)
        model.patch_hooks(None)
        outputs.append([plain, hooked, unloaded, call(comfy_host, model)])
        model.forced_hooks, model.is_clip = group, True
        comfy_host.unload()
        outputs[-1].append(quantized.output(comfy_host, model))
        model.patch_hooks(None)
        outputs[-1].append(call(comfy_host, model))
        comfy_host.unload()
    for actual, expected in zip(*outputs, strict=True):
        assert quantized.relative(actual, expected) < 1e-5
    plain, hooked, unloaded, after, forced, forced_off = outputs[0]
    assert quantized.relative(hooked, plain) > EFFECT
    assert torch.equal(unloaded, hooked) and torch.equal(forced, hooked)
    assert torch.equal(after, plain) and torch.equal(forced_off, plain)


def call(host, model) -> torch.Tensor:
    """One call of the model as it stands, without loading it."""
    x = torch.randn(1, 128, 8, 8, generator=torch.Generator().manual_seed(5)).to(model.load_device)
    context = host.conditioning(tokens=8)[0][0].to(model.load_device)
    with torch.inference_mode():
        return model.model.apply_model(x, torch.full((1,), 0.5, device=x.device), c_crossattn=context).cpu()


def test_another_model_as_a_hook(comfy_host, pair, tmp_path):
    hooks = comfy_host.module("comfy.hooks")
    other = quantized.full_precision(comfy_host, quantized.load(quantized.write(tmp_path, "q8_0", seed=3)))
    weights = hooks.get_patch_weights_from_model(other)
    assert_same_effect(comfy_host, pair, lambda: [hooks.create_hook_model_as_lora(weights, None, 0.4, 0.0)])


def test_the_node(comfy_host, pair, tmp_path):
    """Create Hook LoRA and Set Hooks, as a graph runs them."""
    from safetensors.torch import save_file

    nodes = comfy_host.module("comfy_extras.nodes_hooks")
    folder = comfy_host.models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(quantized.lora(), folder / "test_hook.safetensors")

    def groups():
        return [nodes.CreateHookLoraModelOnly().create_hook_model_only("test_hook.safetensors", 0.7)[0]]

    assert_same_effect(comfy_host, pair, groups)
