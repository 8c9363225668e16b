import pytest
from host_harness import small_models as small
from lowbit.loaders.policy import quantizes


@pytest.mark.parametrize(
    "state_dict", [small.ideogram4(), small.flux(), small.lumina2()], ids=["ideogram4", "flux", "lumina2"]
)
def test_the_products_inside_blocks_are_quantized_and_nothing_else(state_dict):
    """An independent list: the harness names the block linears of each architecture."""
    weights = {key.removesuffix(".weight"): w for key, w in state_dict.items() if w.dim() == 2}
    chosen = {name for name, w in weights.items() if quantizes(name, *w.shape)}
    assert chosen == set(small.block_linears(state_dict))


@pytest.mark.parametrize(
    "name",
    [
        "distilled_guidance_layer.layers.0.in_layer",  # Chroma
        "nerf_blocks.0.param_generator",  # Chroma Radiance
        "input_blocks.1.0.emb_layers.1",  # SDXL
        "label_emb.0.0",
        "down_blocks.1.resnets.0.time_emb_proj",  # a U-Net under diffusers' names
        "double_blocks.0.img_mod.lin",  # Flux
        "double_layers.0.modC.1",  # AuraFlow
        "double_layers.0.modX.1",
        "single_layers.0.modCX.1",
    ],
)
def test_what_gives_modulation_stays(name):
    assert not quantizes(name, 5120, 5120)


def test_protected_and_small_layers_stay():
    assert quantizes("layers.3.feed_forward.w2", 4608, 12288)
    assert not quantizes("layers.3.feed_forward.w2", 4608, 12288, protected=("feed_forward.w2",))
    assert quantizes("layers.3.feed_forward.w1", 12288, 4608, protected=("feed_forward.w2",))
    assert not quantizes("layers.3.feed_forward.w2", 4608, 128)


@pytest.mark.parametrize(
    "part, name, stays",
    [
        ("layers.1", "layers.1.attention.qkv", True),
        ("layers.1", "layers.10.attention.qkv", False),
        ("layers.1.", "layers.1.attention.qkv", True),
        ("w2", "layers.3.feed_forward.w2", True),
        ("w", "layers.3.feed_forward.w2", False),
        ("layers.w2", "layers.3.feed_forward.w2", False),
        ("layers.1", "double_layers.1.attention.qkv", False),
        ("", "layers.1.attention.qkv", False),
        ("*.feed_forward.w2", "layers.3.feed_forward.w2", True),
        ("layers.[12].*", "layers.3.feed_forward.w2", False),
        ("*w", "layers.3.feed_forward.w2", False),
    ],
)
def test_protected_parts_are_whole_components_and_patterns_fit_all_of_a_name(part, name, stays):
    assert quantizes(name, 1024, 1024, protected=(part,)) is not stays
