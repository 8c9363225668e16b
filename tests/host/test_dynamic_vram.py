"""Dynamic VRAM, the host's default on NVIDIA GPUs: weights stream from the file and stay resident as stored."""

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small

pytestmark = pytest.mark.gpu

# Half precision on the GPU: the effect is the difference of two rounded outputs, so the change is made large.
SIZE, EFFECT, EXACT_EFFECT = 1.0, 0.05, 0.01


@pytest.fixture(scope="module", autouse=True)
def _needs_dynamic_vram(comfy_host):
    if not comfy_host.dynamic_vram:
        pytest.skip("the host has not started dynamic VRAM (comfy-aimdo)")


@pytest.fixture(scope="module", params=quantized.KINDS)
def pair(request, comfy_host, tmp_path_factory):
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("dynamic"), request.param))
    return model, quantized.full_precision(comfy_host, model)


def resident_bytes(model) -> small.StateDict:
    """The bytes of the weights in VRAM, on the CPU."""
    return {
        name: module._v_weight._qdata.cpu()
        for name, module in quantized.quantized_linears(model).items()
        if hasattr(module, "_v_weight")
    }


def test_the_log_says_so(comfy_host, tmp_path, caplog):
    with caplog.at_level("INFO", logger="lowbit"):
        quantized.load(quantized.write(tmp_path, "q4_k"))
    assert "q4_k-conditional-0.gguf (conditional): 0.0" in caplog.text and "dynamic VRAM is on: weights" in caplog.text


def test_weights_stay_quantized_in_vram(comfy_host, pair):
    model, twin = pair
    assert model.is_dynamic() and type(model).__name__ == "LowbitModelPatcherDynamic"
    first = quantized.output(comfy_host, model)
    assert quantized.relative(first, quantized.output(comfy_host, twin)) < 5e-3
    linears, resident = quantized.quantized_linears(model), resident_bytes(model)
    assert len(linears) == 10 and len(resident) == 10
    for name, module in linears.items():
        assert module._v_weight._layout_cls.startswith("Lowbit") and module._v_weight._qdata.is_cuda
        assert torch.equal(resident[name], module.weight._qdata.cpu())
    assert torch.equal(quantized.output(comfy_host, model), first), (
        "resident weights give the same as those in transfer"
    )


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_lora(comfy_host, pair, kind):
    model, twin = pair
    file = quantized.lora(kind, size=SIZE) | quantized.vectors()
    stored, before = quantized.quantized_bytes(model), quantized.output(comfy_host, model)
    resident = resident_bytes(model)
    patched = quantized.add_lora(comfy_host, model, file)
    for strength in (1.0, 0.5):
        patched = quantized.add_lora(comfy_host, model, file, strength)
        plain = quantized.output(comfy_host, twin)
        expected = quantized.output(comfy_host, quantized.add_lora(comfy_host, twin, file, strength)) - plain
        first = quantized.output(comfy_host, patched) - before
        assert quantized.relative(first, expected) < EXACT_EFFECT
        again = quantized.output(comfy_host, patched) - before
        assert quantized.relative(again, expected) < EXACT_EFFECT, "with the weights resident"
        for name, weight in resident_bytes(model).items():
            assert torch.equal(weight, resident[name])
    assert torch.equal(quantized.output(comfy_host, model), before)
    quantized.assert_same_bytes(quantized.quantized_bytes(model), stored)


def test_lora_in_bfloat16(comfy_host, tmp_path):
    model = quantized.load(quantized.write(tmp_path, "int8"), dtype="bf16")
    twin = quantized.full_precision(comfy_host, model)
    file = quantized.lora(size=SIZE)
    effect = quantized.output(comfy_host, quantized.add_lora(comfy_host, model, file)) - quantized.output(
        comfy_host, model
    )
    expected = quantized.output(comfy_host, quantized.add_lora(comfy_host, twin, file)) - quantized.output(
        comfy_host, twin
    )
    assert quantized.relative(effect, expected) < EFFECT


def test_bypass(comfy_host, pair):
    model, twin = pair
    before = quantized.output(comfy_host, model)
    patched, expected = (
        quantized.add_lora(comfy_host, m, quantized.lora(size=SIZE), bypass=True) for m in (model, twin)
    )
    effect = quantized.output(comfy_host, patched) - before
    assert (
        quantized.relative(effect, quantized.output(comfy_host, expected) - quantized.output(comfy_host, twin))
        < EXACT_EFFECT
    )
    assert torch.equal(quantized.output(comfy_host, model), before)


def test_hooks_through_the_delegate(comfy_host, pair):
    hooks = comfy_host.module("comfy.hooks")

    def sampled(model, with_hook):
        positive = comfy_host.conditioning(tokens=8)
        if with_hook:
            positive[0][1]["hooks"] = hooks.create_hook_lora(quantized.lora(size=SIZE), 0.7, 0.0)
        return comfy_host.sample(model, positive=positive, width=128, height=128)

    model, twin = pair
    before = sampled(model, False)
    effect, expected = sampled(model, True) - before, sampled(twin, True) - sampled(twin, False)
    assert quantized.relative(effect, expected) < 0.02
    assert torch.equal(sampled(model, False), before)


def test_small_modules_are_moved_as_they_are(comfy_host, tmp_path):
    """Modules of 16 KiB and less: the host force-loads them, which must neither unpack nor pack them again."""
    floats = small.flux(hidden=128, text_width=128)
    for linear in ("Q4_0", "Q8_0"):
        model = quantized.load(small.write_gguf(tmp_path / f"{linear}.gguf", floats, linear=linear, rest="F32"))
        stored = quantized.stored_bytes(model)
        sizes = {name: module.weight._qdata.nbytes for name, module in quantized.quantized_linears(model).items()}
        forced = [name for name, size in sizes.items() if size < 12 * 1024]
        assert forced
        comfy_host.comfy.model_management.load_models_gpu([model])
        for name in forced:
            module = model.model.diffusion_model.get_submodule(name)
            assert quantized.is_quantized(module.weight.data) and module.weight._qdata.is_cuda
            assert torch.equal(module.weight._qdata.cpu(), stored[f"{name}.weight"])
        comfy_host.unload()
        quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


def test_merge_and_back(comfy_host, pair, tmp_path):
    model, twin = pair
    nodes = comfy_host.module("comfy_extras.nodes_model_merging")
    other = quantized.load(quantized.write(tmp_path, "q8_0", seed=1))
    before = quantized.output(comfy_host, model)
    merged = nodes.ModelMergeSimple().merge(model, other, 0.6)[0]
    expected = nodes.ModelMergeSimple().merge(twin, quantized.full_precision(comfy_host, other), 0.6)[0]
    for _ in range(2):
        assert quantized.relative(quantized.output(comfy_host, merged), quantized.output(comfy_host, expected)) < 0.02
    assert torch.equal(quantized.output(comfy_host, model), before)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_a_lora_is_saved_merged(comfy_host, tmp_path, kind):
    model = quantized.load(quantized.write(tmp_path, kind))
    patched = quantized.add_lora(comfy_host, model, quantized.lora())
    plain = quantized.floats_of(model)
    comfy_host.module("comfy_extras.nodes_model_merging").ModelSave().save(patched, f"dynamic_lora_{kind}")
    path = sorted(comfy_host.base_directory.joinpath("output").glob(f"dynamic_lora_{kind}_*.safetensors"))[-1]
    saved = quantized.floats_of(quantized.load(path))
    calculate_weight = comfy_host.module("comfy.lora").calculate_weight
    for key, patches in patched.patches.items():
        name = key.removeprefix("diffusion_model.")
        wanted = calculate_weight(patches, plain[name].clone(), key)
        assert quantized.relative(wanted, plain[name]) > 0.05
        # The host merges in float16 on a GPU.
        assert quantized.relative(saved[name], wanted) < quantized.PACKING_ERROR[kind] + 1e-3


def test_saving(comfy_host, pair):
    model, _ = pair
    stored = quantized.stored_bytes(model)
    comfy_host.module("comfy_extras.nodes_model_merging").ModelSave().save(model, "dynamic")
    path = sorted(comfy_host.base_directory.joinpath("output").glob("dynamic_*.safetensors"))[-1]
    again = quantized.stored_bytes(quantized.load(path))
    quantized.assert_same_bytes({k: v.cpu() for k, v in again.items()}, {k: v.cpu() for k, v in stored.items()})


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_hosts_own_choice_of_dtype(comfy_host, tmp_path, kind, mode):
    """As users run it: bfloat16 activations, against a stock bfloat16 model of the same weights."""
    model = quantized.load(quantized.write(tmp_path, kind), compute_mode=mode, dtype="default")
    assert model.model.get_dtype() == torch.bfloat16
    stock = comfy_host.load_state_dict(quantized.floats_of(model), dtype=torch.bfloat16)
    error = quantized.relative(quantized.output(comfy_host, model), quantized.output(comfy_host, stock))
    assert error < (0.02 if mode == "exact" else 0.05)


def test_alternating_models_leave_nothing_on_the_gpu(comfy_host, tmp_path):
    """Loaded, sampled with a LoRA, let go: no allocation stays, whichever memory it came from."""
    paths = [quantized.write(tmp_path, kind) for kind in ("int8_smooth", "q4_k")]

    def free_bytes(rounds: int) -> int:
        for index in range(rounds):
            model = quantized.load(paths[index % 2], "int8", "bf16")
            patched = quantized.add_lora(comfy_host, model, quantized.lora())
            assert torch.isfinite(comfy_host.sample(patched, model, width=256, height=256)).all()
            del model, patched
            comfy_host.unload()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    before = free_bytes(4)
    assert free_bytes(20) >= before - 2**24
