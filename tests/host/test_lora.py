"""LoRA next to quantized weights, whichever stock node put it there.

The effect of a LoRA (output with it minus output without) is compared with its effect on a stock float32 model of the
same weights, where the host merges it. Nothing that is applied may change a stored byte.
"""

import weakref

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small

# Of the effect, for which 1 % is asked: float32 against a merge in float32. On a GPU the host merges bias and norm
# patches of the model it is compared with in float16.
EFFECT = 1e-2 if torch.cuda.is_available() else 1e-3


@pytest.fixture(scope="module", params=quantized.KINDS)
def pair(request, comfy_host, tmp_path_factory):
    """A quantized model and the stock float32 model of its weights."""
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("lora"), request.param))
    return model, quantized.full_precision(comfy_host, model)


def assert_same_effect(host, pair, apply, bound=EFFECT, smallest=0.01):
    """`apply(model)` changes both models alike; when it is gone, the quantized one gives the same bytes and outputs."""
    model, twin = pair
    before, stored, plain = quantized.output(host, model), quantized.stored_bytes(model), quantized.output(host, twin)
    weights = quantized.quantized_bytes(model)
    patched = apply(model)
    effect = quantized.output(host, patched) - before
    quantized.assert_same_bytes(quantized.quantized_bytes(model), weights)
    expected = quantized.output(host, apply(twin)) - plain
    assert expected.norm() > smallest * plain.norm()
    assert quantized.relative(effect, expected) < bound
    assert torch.equal(quantized.output(host, model), before)
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "loha_of_rank_17", "lokr", "lokr_of_factors", "diff"])
def test_effect(comfy_host, pair, kind):
    assert_same_effect(comfy_host, pair, lambda model: quantized.add_lora(comfy_host, model, quantized.lora(kind), 0.7))


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        *[(kind, True) for kind in ("lora", "loha", "lokr", "lokr_of_factors")],
        *[(kind, False) for kind in ("loha_of_rank_17", "dora", "diff")],
    ],
)
def test_what_goes_beside_the_weight(comfy_host, pair, kind, beside):
    """And that the others are applied to the unpacked weight."""
    model, _ = pair
    patched = quantized.add_lora(comfy_host, model, quantized.lora(kind), 0.7)
    comfy_host.comfy.model_management.load_models_gpu([patched])
    for linear in quantized.quantized_linears(model).values():
        assert bool(linear.model_patches) is beside
        assert bool(linear.weight_function or linear.weight_lowvram_function) is not beside


@pytest.mark.parametrize("offset", [None, (0, 64, 128), (1, 32, 96)], ids=["whole", "rows", "columns"])
@pytest.mark.parametrize(
    "kinds", [["loha"], ["lokr"], ["lokr_of_factors"], ["lokr", "lora", "loha", "lokr_of_factors"]]
)
def test_a_side_path_is_what_the_host_would_merge(comfy_host, kinds, offset):
    from lowbit.host.lora import side_path
    from lowbit.kernels.kept_memory import KeptMemory

    N, K = 256, 192
    rows, columns = (N, K) if offset is None else (offset[2], K) if offset[0] == 0 else (N, offset[2])
    adapters = comfy_host.module("comfy.lora").load_lora(
        {k: v for i, kind in enumerate(kinds) for k, v in quantized.adapter(kind, f"l{i}", rows, columns).items()},
        {f"diffusion_model.l{i}": f"l{i}" for i in range(len(kinds))},
    )
    patches = [(0.7 + i, adapters[f"l{i}"], 1.0, offset, None) for i in range(len(kinds))]
    merged = comfy_host.comfy.lora.calculate_weight(list(patches), torch.zeros(N, K), "key")
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(0))
    path, y = side_path("key", patches, N, K, KeptMemory()), torch.zeros(2, 5, N)
    if any(kind in ("lora", "loha") for kind in kinds):
        hidden, up = path.hidden_and_up(x)
        y += hidden @ up.T
    else:
        assert path.hidden_and_up(x) is None
    path.add_kronecker(y, x)
    torch.testing.assert_close(y, x @ merged.T, rtol=1e-4, atol=1e-4)
    assert path.device_bytes == path.release() > 0 == path.device_bytes


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_patch_of_another_shape_is_left_out(comfy_host, pair, caplog, kind):
    """As in a stock model, with a line that names the layer; what fits is applied."""
    model, _ = pair
    fits = quantized.lora(kind, modules=["layers.0.attention.qkv"])
    misfit = quantized.adapter(kind, "layers.1.feed_forward.w2", 256, 520)
    expected = quantized.output(comfy_host, quantized.add_lora(comfy_host, model, fits))
    found = quantized.output(comfy_host, quantized.add_lora(comfy_host, model, fits | misfit))
    assert torch.equal(found, expected)
    text = "a LoRA for diffusion_model.layers.1.feed_forward.w2.weight is left out: it changes a matrix of (256, 520)"
    assert text in caplog.text


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_effect_in_bypass(comfy_host, pair, kind):
    file = quantized.lora(kind)
    assert_same_effect(comfy_host, pair, lambda model: quantized.add_lora(comfy_host, model, file, 0.7, bypass=True))


def test_a_small_change_is_not_rounded_away(comfy_host, pair):
    """A change far below the step of the format: packed again, it would vanish."""
    file = quantized.lora("diff", size=0.003)
    apply = lambda model: quantized.add_lora(comfy_host, model, file)  # noqa: E731
    assert_same_effect(comfy_host, pair, apply, bound=0.01, smallest=1e-4)


def test_effect_on_bias_and_norms(comfy_host, pair):
    assert_same_effect(
        comfy_host, pair, lambda model: quantized.add_lora(comfy_host, model, quantized.lora() | quantized.vectors())
    )


def test_two_at_once(comfy_host, pair):
    """Low-rank ones, a Kronecker product and one that is neither, on some of the same layers."""

    def apply(model):
        model = quantized.add_lora(comfy_host, model, quantized.lora(seed=1), 0.5)
        model = quantized.add_lora(comfy_host, model, quantized.lora(seed=2), -0.8)
        model = quantized.add_lora(comfy_host, model, quantized.lora("lokr", seed=3), 0.3)
        return quantized.add_lora(comfy_host, model, quantized.lora("dora", modules=["layers.1.feed_forward.w2"]), 0.3)

    assert_same_effect(comfy_host, pair, apply)


def test_one_over_the_other_route(comfy_host, pair):
    """A merged LoRA and a bypass LoRA on the same layers."""

    def apply(model):
        model = quantized.add_lora(comfy_host, model, quantized.lora(seed=1), 0.5)
        return quantized.add_lora(comfy_host, model, quantized.lora(seed=2), 0.8, bypass=True)

    assert_same_effect(comfy_host, pair, apply)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_what_wraps_a_weight_sees_it_patched(comfy_host, pair, kind):
    """Weight wrappers of other packs come after all patches: here the sign of every weight is lost."""

    def apply(model):
        model = quantized.add_lora(comfy_host, model, quantized.lora(kind))
        model.add_weight_wrapper("diffusion_model.layers.1.feed_forward.w2.weight", torch.abs)
        return model

    assert_same_effect(comfy_host, pair, apply)


@pytest.mark.parametrize("compute_mode", ["exact", "int8"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_effect_under_autocast(comfy_host, tmp_path, kind, compute_mode):
    model = quantized.load(quantized.write(tmp_path, "int8"), compute_mode)
    patched = quantized.add_lora(comfy_host, model, quantized.lora(kind))
    expected = quantized.output(comfy_host, patched)
    with torch.autocast(model.load_device.type, dtype=torch.bfloat16):
        assert quantized.relative(quantized.output(comfy_host, patched), expected) < 0.05


@pytest.mark.parametrize("strength_model", [0.9, 0.0])
def test_strength_on_the_model(comfy_host, pair, strength_model):
    """A strength on the weight itself is no side path: add_patches takes it, and merging packs use it."""

    def apply(model):
        host_lora = comfy_host.comfy.lora
        key_map = host_lora.model_lora_keys_unet(model.model, {})
        model = model.clone()
        model.add_patches(host_lora.load_lora(quantized.lora(), key_map), 0.7, strength_model)
        return model

    assert_same_effect(comfy_host, pair, apply)


def test_strength_is_the_effect_and_never_touches_the_bytes(comfy_host, pair):
    model, twin = pair
    stored, file = quantized.stored_bytes(model), quantized.lora()
    before, plain = quantized.output(comfy_host, model), quantized.output(comfy_host, twin)
    for strength in (0.25, 1.0, -2.0):
        effect = quantized.output(comfy_host, quantized.add_lora(comfy_host, model, file, strength)) - before
        expected = quantized.output(comfy_host, quantized.add_lora(comfy_host, twin, file, strength)) - plain
        assert quantized.relative(effect, expected) < EFFECT
        quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


@pytest.mark.parametrize("with_function", [False, True], ids=["slices", "with_function"])
def test_rows_columns_and_functions_of_a_patch(comfy_host, pair, with_function):
    """Patches of a slice of the weight, as key maps make them for split projections, and with a function."""
    name, n, k = "layers.0.attention.qkv", 768, 256
    key = f"diffusion_model.{name}.weight"
    slices = {(0, 0, 256): (256, k), (0, 512, 256): (256, k), (1, 64, 128): (n, 128)}

    def apply(model):
        key_map, file = {}, {}
        for offset, shape in slices.items():
            part = f"{name}.{offset[0]}.{offset[1]}"
            key_map[f"diffusion_model.{part}"] = (key, offset)
            file |= quantized.adapter("lora", part, *shape)
        if with_function:  # then it is no side path
            key_map["diffusion_model.flipped"] = (key, (0, 256, 256), lambda change: change.flip(0))
            file |= quantized.adapter("lora", "flipped", 256, k)
        model = model.clone()
        model.add_patches(comfy_host.comfy.lora.load_lora(file, key_map))
        return model

    assert_same_effect(comfy_host, pair, apply)


@pytest.fixture(scope="module")
def flux(comfy_host, tmp_path_factory):
    model = quantized.load(small.write_gguf(tmp_path_factory.mktemp("flux") / "flux.gguf", small.flux(), linear="Q8_0"))
    return model, quantized.full_precision(comfy_host, model)


def test_split_projections_on_a_fused_layer(comfy_host, flux):
    """Diffusers' names for Flux: q, k, v and the MLP of a single block are slices of one layer here."""
    file = {}
    for part, n in {
        "transformer_blocks.0.attn.to_q": 256,
        "transformer_blocks.0.attn.to_v": 256,
        "transformer_blocks.0.attn.add_k_proj": 256,
        "single_transformer_blocks.0.attn.to_k": 256,
        "single_transformer_blocks.0.proj_mlp": 1024,
    }.items():
        file[f"transformer.{part}.lora_A.weight"] = quantized.random_values(f"A{part}", 4, 256) * 0.1
        file[f"transformer.{part}.lora_B.weight"] = quantized.random_values(f"B{part}", n, 4) * 0.1
    model, twin = (quantized.add_lora(comfy_host, base, file) for base in flux)
    offsets = [patch[3] for patches in model.patches.values() for patch in patches]
    assert len(offsets) == 5 and None not in offsets

    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    conditions = {
        "context": torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(2)),
        "y": torch.randn(1, 64, generator=torch.Generator().manual_seed(3)),
        "guidance": torch.full((1,), 3.5),
    }
    run = lambda patcher: comfy_host.apply_model(patcher, x, **conditions)  # noqa: E731
    effect, expected = run(model) - run(flux[0]), run(twin) - run(flux[1])
    assert expected.norm() > 0.01 * run(flux[1]).norm()
    assert quantized.relative(effect, expected) < EFFECT


def test_a_resizing_patch_makes_the_weight_float(comfy_host, flux):
    """A change of shape belongs to no format: the host's merge is kept as floats, and goes with the patch."""
    model, _ = flux
    stored = quantized.stored_bytes(model)
    file = {
        "diffusion_model.img_in.lora_up.weight": torch.ones(256, 4),
        "diffusion_model.img_in.lora_down.weight": torch.ones(4, 128),
        "diffusion_model.img_in.reshape_weight": torch.tensor([256, 128]),
    }
    module = model.model.diffusion_model.img_in
    values = module.weight.dequantize()
    comfy_host.comfy.model_management.load_models_gpu([quantized.add_lora(comfy_host, model, file)])
    expected = torch.nn.functional.pad(values, (0, 64)) + 4
    rounding = 4e-3 if torch.cuda.is_available() else 1e-5  # values near 4, merged in float16 on a GPU
    torch.testing.assert_close(module.weight.data.cpu(), expected, rtol=0, atol=rounding)
    comfy_host.comfy.model_management.load_models_gpu([model])
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


def test_a_lora_that_is_let_go_leaves_nothing_where_row_scales_lie(comfy_host, tmp_path):
    """Of all tensors that a model keeps beside its weights, each in memory of its own once cost 2 GiB."""
    model = quantized.load(quantized.write(tmp_path, "q4_k"), "int8", dtype="bf16")
    patched = quantized.add_lora(comfy_host, model, quantized.lora("lora"))
    quantized.output(comfy_host, patched)
    linears = quantized.quantized_linears(patched).values()
    scales = [module._row_scale for module in linears if module._row_scale is not None]
    sides = [side for module in linears for side in module.model_patches]
    matrices = [matrix for side in sides for matrix in side._matrices]
    assert len(scales) > 5 and len(matrices) > 5
    of_scales, of_matrices = ({each.untyped_storage().data_ptr() for each in some} for some in (scales, matrices))
    assert len(of_scales) == len(of_matrices) == 1 and of_scales != of_matrices
    block = weakref.ref(matrices[0].lowbit_block)
    del matrices
    assert block() is not None
    for side in sides:
        side.release()
    assert block() is None
