"""Patches while a model is loaded in part: whatever the order, a patch is applied once, and leaves with its patcher.

On the CPU nothing is ever offloaded by itself: the patcher is driven with a memory limit, as the host does on a GPU.
"""

import gc
import weakref

import pytest
import torch
from host_harness import quantized_models as quantized

pytestmark = pytest.mark.usefixtures("plain_patcher")

EFFECT = 1e-3
EVERYTHING, SOME, NOTHING = 1e32, 1_500_000, 0.1
ORDERS = (
    ("some", "everything", "unload_some"),
    ("everything", "unload_some", "some"),
    ("everything", "unload_all", "everything"),
    ("some", "detach", "everything"),
)


@pytest.fixture(scope="module", params=("int8_smooth", "q4_k", "q3_k"))
def pair(request, comfy_host, tmp_path_factory):
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("memory"), request.param))
    return model, quantized.full_precision(comfy_host, model)


class Loaded:
    """A patcher driven as the host's model management drives it, and the output of the model as it stands."""

    def __init__(self, host, patcher):
        self.host, self.patcher = host, patcher
        host.unload()

    def load(self, limit_bytes: float) -> None:
        self.patcher.partially_load(self.patcher.load_device, limit_bytes)

    def unload_some(self, size_bytes: float) -> None:
        self.patcher.partially_unload(self.patcher.offload_device, size_bytes)

    def output(self) -> torch.Tensor:
        x = torch.randn(1, 128, 8, 8, generator=torch.Generator().manual_seed(5))
        context = self.host.conditioning(tokens=8)[0][0]
        return self.patcher.model.apply_model(x, torch.full((1,), 0.5), c_crossattn=context).float()

    def resident(self) -> set[str]:
        modules = self.patcher.model.diffusion_model.named_modules()
        return {name for name, module in modules if getattr(module, "comfy_patched_weights", False)}


def expected_effect(host, twin, apply):
    return quantized.output(host, apply(twin)) - quantized.output(host, twin)


PATCHES = {
    "low_rank": lambda host: lambda model: quantized.add_lora(host, model, quantized.lora() | quantized.vectors(), 0.7),
    "small_change": lambda host: lambda model: quantized.add_lora(host, model, quantized.lora("dora"), 0.7),
}


@pytest.mark.parametrize("patches", PATCHES)
def test_every_order_of_loading_and_unloading(comfy_host, pair, patches):
    model, twin = pair
    apply = PATCHES[patches](comfy_host)
    stored, plain = quantized.stored_bytes(model), quantized.output(comfy_host, model)
    expected = expected_effect(comfy_host, twin, apply)
    steps = {
        "some": lambda loaded: loaded.load(SOME),
        "everything": lambda loaded: loaded.load(EVERYTHING),
        "unload_some": lambda loaded: loaded.unload_some(1_000_000),
        "unload_all": lambda loaded: loaded.unload_some(1e30),
        "detach": lambda loaded: (loaded.patcher.detach(), loaded.load(NOTHING)),
    }
    for order in ORDERS:
        loaded = Loaded(comfy_host, apply(model))
        loaded.load(NOTHING)
        for step in order:
            steps[step](loaded)
            assert quantized.relative(loaded.output() - plain, expected) < EFFECT, (order, step)
        loaded.patcher.detach()
        assert torch.equal(quantized.output(comfy_host, model), plain)
        quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


def test_the_log_says_how_weights_reach_the_device(comfy_host, tmp_path, caplog):
    with caplog.at_level("INFO", logger="lowbit"):
        quantized.load(quantized.write(tmp_path, "q4_k"))
    assert "q4_k-conditional-0.gguf (conditional): 0.0" in caplog.text and "dynamic VRAM is off" in caplog.text


def test_the_limit_offloads_some_modules(comfy_host, pair):
    """The steps above would prove nothing if every module were resident, or none."""
    loaded = Loaded(comfy_host, pair[0].clone())
    sizes = []
    for step in (lambda: loaded.load(NOTHING), lambda: loaded.load(SOME), lambda: loaded.load(EVERYTHING)):
        step()
        sizes.append(len(loaded.resident()))
    loaded.unload_some(1_000_000)
    sizes.append(len(loaded.resident()))
    loaded.patcher.detach()
    assert sizes[0] == 0 < sizes[1] < sizes[2] > sizes[3] > 0


def test_another_patcher_takes_over_a_model_that_is_loaded_in_part(comfy_host, pair):
    """Clones share the modules: what one applied must be gone when another is loaded."""
    model, twin = pair
    apply = PATCHES["low_rank"](comfy_host)
    plain, expected = quantized.output(comfy_host, model), expected_effect(comfy_host, twin, apply)
    other = quantized.add_lora(comfy_host, model, quantized.lora("lokr"))
    patched = apply(model)
    for _ in range(2):
        Loaded(comfy_host, other).load(SOME)
        loaded = Loaded(comfy_host, patched)
        loaded.load(SOME)
        assert quantized.relative(loaded.output() - plain, expected) < EFFECT
        loaded = Loaded(comfy_host, model)
        loaded.load(SOME)
        torch.testing.assert_close(loaded.output(), plain, rtol=0, atol=0)
    model.detach()


def test_a_patched_model_that_is_unloaded_holds_no_patch(comfy_host, pair):
    model, _ = pair
    for kind in ("lora", "dora"):
        patched = quantized.add_lora(comfy_host, model, quantized.lora(kind))
        comfy_host.comfy.model_management.load_models_gpu([patched])
        linears = quantized.quantized_linears(model).values()
        assert all(linear.model_patches or linear.weight_function for linear in linears)
        comfy_host.unload()
        assert not any(linear.model_patches or linear.weight_function for linear in linears)


def test_unload_and_reload(comfy_host, pair):
    model, _ = pair
    stored, before = quantized.stored_bytes(model), quantized.output(comfy_host, model)
    comfy_host.unload()
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)
    assert torch.equal(quantized.output(comfy_host, model), before)


def test_unloading_outside_inference_mode(comfy_host, pair):
    """The page's button and idle unloading run outside the mode in which nodes run: no weight is copied for it, and the
    model can be loaded again. (The host's own quantized layers fail here in ComfyUI 0.30.0.)"""
    model, _ = pair
    before = quantized.output(comfy_host, model)
    places = {name: linear.weight._qdata.data_ptr() for name, linear in quantized.quantized_linears(model).items()}
    for _ in range(2):
        with torch.inference_mode(False):
            comfy_host.unload()
        linears = quantized.quantized_linears(model)
        assert {name: linear.weight._qdata.data_ptr() for name, linear in linears.items()} == places
        assert torch.equal(quantized.output(comfy_host, model), before)


@pytest.mark.parametrize("bypass", [False, True])
def test_a_model_that_is_let_go_is_freed_at_once(comfy_host, tmp_path, bypass):
    """Nothing waits for Python to look for cycles: 20 GB stay mapped until then. A bypass LoRA leaves such ones."""
    model = quantized.load(quantized.write(tmp_path, "q4_k"), "int8", "bf16")
    if bypass:
        model = quantized.add_lora(comfy_host, model, quantized.lora(), bypass=True)
    comfy_host.sample(model.clone(), model, width=64, height=64)
    layer = weakref.ref(model.model.diffusion_model.layers[0].attention.qkv)
    gc.collect()
    gc.disable()
    try:
        del model
        comfy_host.unload()
        assert layer() is None
    finally:
        gc.enable()


def test_offloaded_weights_stay_quantized(comfy_host, pair):
    loaded = Loaded(comfy_host, pair[0].clone())
    loaded.load(SOME)
    linears = quantized.quantized_linears(loaded.patcher)
    assert len(linears) == 10
    loaded.patcher.detach()
    assert len(quantized.quantized_linears(loaded.patcher)) == 10


# Dynamic VRAM needs a GPU (test_dynamic_vram.py); the parts of it that are plain Python are tested here.


@pytest.fixture
def dynamic(comfy_host, pair, monkeypatch):
    """The host's patcher for dynamic VRAM on the CPU: its load without the virtual address space."""
    from comfy import model_patcher
    from lowbit.host.patcher import LowbitModelPatcherDynamic

    comfy_host.unload()
    monkeypatch.setattr(LowbitModelPatcherDynamic, "_vbar_get", lambda self, create=False: None)
    monkeypatch.setattr(model_patcher.comfy_aimdo.host_buffer, "HostBuffer", lambda *sizes: None)
    monkeypatch.setattr(LowbitModelPatcherDynamic, "__new__", lambda cls, *args, **kwargs: object.__new__(cls))
    monkeypatch.setattr(LowbitModelPatcherDynamic, "partially_unload_ram", lambda self, *args, **kwargs: 0)

    def adopt(patcher):
        n = LowbitModelPatcherDynamic(patcher.model, patcher.load_device, patcher.offload_device, patcher.size)
        n.patches, n.patches_uuid = dict(patcher.patches), patcher.patches_uuid
        return n

    made = []
    yield lambda patcher: made.append(adopt(patcher)) or made[-1]
    for patcher in made:
        patcher.restore_loaded_backups()
        patcher.model.current_weight_patches_uuid = None
    pair[0].detach()


def test_dynamic_load_hands_patches_to_the_modules(comfy_host, pair, dynamic):
    """A side path, or a function on the unpacked weight: nothing that the host would merge into the resident weight."""
    model, _ = pair
    for kind, side_path in (("lora", True), ("loha", True), ("lokr", True), ("dora", False), ("diff", False)):
        patcher = dynamic(quantized.add_lora(comfy_host, model, quantized.lora(kind)))
        patcher.load(patcher.load_device)
        for linear in quantized.quantized_linears(model).values():
            assert linear.weight_lowvram_function is None
            assert bool(linear.model_patches) == side_path
            assert len(linear.weight_function) == (0 if side_path else 1)
    patcher = dynamic(model)
    patcher.load(patcher.load_device)
    for linear in quantized.quantized_linears(model).values():
        assert not linear.model_patches and not linear.weight_function and linear.weight_lowvram_function is None


def test_dynamic_load_leaves_merges_of_models_to_the_host(comfy_host, pair, dynamic):
    from lowbit.host import layouts

    model, _ = pair
    merged = comfy_host.module("comfy_extras.nodes_model_merging").ModelMergeSimple().merge(model, model, 0.5)[0]
    patcher = dynamic(merged)
    patcher.load(patcher.load_device)
    for linear in quantized.quantized_linears(model).values():
        assert not linear.model_patches
        if layouts.can_requantize(layouts.from_host(linear.weight)):
            assert linear.weight_lowvram_function.key in patcher.patches
        else:  # dynamic VRAM merges into the weight's own memory: what has no quantizer is merged where it is used
            assert linear.weight_lowvram_function is None
            assert [function.key in patcher.patches for function in linear.weight_function] == [True]


def test_dynamic_force_load_keeps_the_bytes(comfy_host, pair, dynamic):
    """The host moves modules of 16 KiB and less by `force_cast`, which would unpack and pack them again."""
    model, _ = pair
    stored, plain = quantized.stored_bytes(model), quantized.output(comfy_host, model)
    comfy_host.unload()
    apply = PATCHES["low_rank"](comfy_host)
    patcher = dynamic(apply(model))
    for name in quantized.quantized_linears(model):
        patcher.patch_weight_to_device(f"diffusion_model.{name}.weight", patcher.load_device, force_cast=True)
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)
    assert len(patcher.backup) == 10
    patcher.patch_weight_to_device(
        "diffusion_model.layers.0.attention_norm1.weight", patcher.load_device, force_cast=True
    )
    assert "diffusion_model.layers.0.attention_norm1.weight" in patcher.backup
    patcher.restore_loaded_backups()
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)
    assert torch.equal(quantized.output(comfy_host, model), plain)


@pytest.mark.parametrize("kind", ["lora", "diff", None])
def test_a_weight_in_transfer(comfy_host, pair, dynamic, kind):
    """What the host's transfer gives for a weight in a gathered buffer: the side path leaves it quantized."""
    ops, memory = comfy_host.module("comfy.ops"), comfy_host.module("comfy.memory_management")
    model, twin = pair
    name = "layers.1.feed_forward.w1"
    file = quantized.lora(kind, modules=[name]) if kind else None
    apply = lambda m: quantized.add_lora(comfy_host, m, file) if file else m  # noqa: E731
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    comfy_host.comfy.model_management.load_models_gpu([apply(twin)])
    expected = twin.model.diffusion_model.get_submodule(name)(x)
    comfy_host.unload()

    patcher = dynamic(apply(model))
    patcher.load(patcher.load_device)
    module = patcher.model.diffusion_model.get_submodule(name)
    buffer = torch.zeros(memory.vram_aligned_size([module.weight, module.bias]), dtype=torch.uint8)
    weight, _ = memory.interpret_gathered_like([module.weight, module.bias], buffer)
    weight.copy_(module.weight)
    module._prefetch = {
        "signature": None,
        "resident": False,
        "needs_cast": False,
        "xfer_dest": buffer,
        "cast_dest": None,
        "cast_geometry": memory.tensors_to_geometries([module.weight, module.bias]),
    }
    weight, bias = ops.resolve_cast_module_with_vbar(
        module, module.weight.dtype, torch.device("cpu"), x.dtype, x.dtype, want_requant=True
    )
    del module._prefetch
    assert quantized.is_quantized(weight) == (kind != "diff")
    low_rank = [side_path.hidden_and_up(x) for side_path in module.model_patches]
    y = module._linear(x, weight, bias, *(low_rank or [None]))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
