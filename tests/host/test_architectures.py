"""Any architecture that the host detects loads, without a list of ours: Flux and Lumina 2 with Z-Image's settings."""

import gguf
import pytest
import torch
from host_harness import small_models as small

MODELS = {"flux": (small.flux, {"width": 256, "pooled_width": 64}), "lumina2": (small.lumina2, {"width": 256})}
WRITERS = {
    "int8_native": (lambda path, floats: small.save(path, small.int8_native(floats)), ".safetensors", False),
    "int8_fast": (lambda path, floats: small.save(path, small.int8_fast(floats)), ".safetensors", False),
    "bf16_on_the_fly": (lambda path, floats: small.save(path, floats, torch.bfloat16), ".safetensors", True),
    "fp8_scaled": (lambda path, floats: small.save(path, small.fp8_scaled(floats)), ".safetensors", True),
    "gguf_q4_k": (lambda path, floats: small.write_gguf(path, floats, linear="Q4_K", rest="BF16"), ".gguf", False),
    "gguf_q8_0_prefixed": (
        lambda path, floats: small.write_gguf(path, floats, prefix="model.diffusion_model.", architecture=None),
        ".gguf",
        False,
    ),
    "gguf_every_weight": (
        lambda path, floats: small.write_gguf(path, floats, linear="Q8_0", every_weight=True),
        ".gguf",
        False,
    ),
}


# The smallest that the host still detects.
HUNYUAN_VIDEO_15 = {
    "image_model": "hunyuan_video",
    "in_channels": 65,
    "patch_size": [1, 1, 1],
    "out_channels": 32,
    "vec_in_dim": None,
    "axes_dim": [16, 56, 56],
    "context_in_dim": 256,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": True,
    "meanflow": False,
    "meanflow_sum": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
}


def random_floats(host, model_class: str, **config) -> small.StateDict:
    """Weights of one of the host's models by module and class name."""
    module, _, name = model_class.rpartition(".")
    operations = host.module("comfy.ops").manual_cast
    model = getattr(host.module(module), name)(**config, device="cpu", dtype=torch.float32, operations=operations)
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(value.shape, generator=generator) * max(1, value.shape[-1]) ** -0.5
        for key, value in model.state_dict().items()
    }


def gguf_floats(path) -> dict[str, torch.Tensor]:
    floats = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        shape = tuple(reversed(tensor.shape.tolist()))
        floats[tensor.name.removeprefix("model.diffusion_model.")] = values.reshape(shape)
    return floats


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", MODELS)
def test_another_architecture_samples_what_its_file_means(comfy_host, tmp_path, name, layout):
    from lowbit.host.model import NONE, LoadRequest, load_pair
    from lowbit.host.ops import LowbitLinear

    make, conditioning = MODELS[name]
    write, suffix, quantize = WRITERS[layout]
    floats = make()
    path = write(tmp_path / f"{name}{suffix}", floats)
    request = LoadRequest(str(path), compute_mode="exact", dtype="fp32", quantize=quantize)
    model, negative = load_pair(request, NONE)
    assert model is negative
    quantized = {
        key
        for key, module in model.model.diffusion_model.named_modules()
        if isinstance(module, LowbitLinear) and type(module.weight).__name__ == "QuantizedTensor"
    }
    assert quantized >= set(small.block_linears(floats))
    positive = comfy_host.conditioning(**conditioning)
    latent = comfy_host.sample(model, positive=positive, width=128, height=128)
    assert latent.isfinite().all() and latent.std() > 0
    if suffix == ".gguf":
        stock = comfy_host.load_state_dict(gguf_floats(path), dtype=torch.float32)
        meant = comfy_host.sample(stock, positive=positive, width=128, height=128)
        assert float((latent - meant).norm() / meant.norm()) < 1e-4
    else:
        stock = comfy_host.load_state_dict(floats, dtype=torch.float32)
        original = comfy_host.sample(stock, positive=positive, width=128, height=128)
        assert float((latent - original).norm() / original.norm()) < (0.15 if "fp8" in layout else 0.05)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model."])
def test_a_whole_checkpoint_is_the_model_under_the_hosts_prefix(comfy_host, tmp_path, prefix):
    from lowbit.host.model import NONE, LoadRequest, load_pair
    from lowbit.loaders.branch import load_branch

    floats = small.flux()
    beside = {
        "text_encoders.pile_t5xl.layers.0.self_attn.q_proj.weight": torch.randn(256, 256),
        "text_encoders.pile_t5xl.embed_tokens.weight": torch.randn(8, 256),
        "vae.decoder.conv_in.weight": torch.randn(8, 4, 3, 3),
    }
    whole = {prefix + key: value for key, value in floats.items()} | beside
    assert comfy_host.module("comfy.model_detection").unet_prefix_from_state_dict(whole) == prefix
    bare_path, path = tmp_path / "bare.safetensors", tmp_path / "whole.safetensors"
    small.save(bare_path, floats, torch.bfloat16)
    small.save(path, whole, torch.bfloat16)
    assert load_branch(path).weights.keys() == floats.keys()
    models = [load_pair(LoadRequest(str(p), quantize=True, dtype="fp32"), NONE)[0] for p in (bare_path, path)]
    positive = comfy_host.conditioning(**MODELS["flux"][1])
    bare, latent = (comfy_host.sample(model, positive=positive, width=128, height=128) for model in models)
    assert torch.equal(latent, bare)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, "EPS"),
        ({"v_pred": [], "ztsnr": []}, "V_PREDICTION"),
        ({"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}, "V_PREDICTION_EDM"),
        ({"edm_mean": [0.0], "edm_std": [1.0]}, "EDM"),
    ],
)
def test_a_whole_sdxl_says_how_it_was_trained(comfy_host, tmp_path, flags, expected):
    """Beside the model, whose keys have the prefix. What the host reads is the same as in the whole file."""
    from lowbit.loaders.branch import load_branch

    model = {f"model.diffusion_model.{index}.weight": torch.ones(4) for index in range(6)}
    whole = model | {key: torch.tensor(value) for key, value in flags.items()}
    weights = load_branch(small.save(tmp_path / "sdxl.safetensors", whole)).weights
    host_model = comfy_host.module("comfy.supported_models").SDXL
    read = [host_model({}) for _ in range(2)]
    found = [model.model_type(tensors).name for model, tensors in zip(read, (whole, weights), strict=True)]
    assert found == [expected, expected]
    assert read[0].sampling_settings == read[1].sampling_settings


def test_same_file_of_a_model_with_one_weight_set_is_ordinary_cfg(comfy_host, tmp_path):
    from lowbit.host.model import SAME_FILE, LoadRequest, load_pair

    path = small.write_gguf(tmp_path / "flux-Q8_0.gguf", small.flux())
    model, negative = load_pair(LoadRequest(str(path)), SAME_FILE)
    assert model is negative


@pytest.mark.parametrize("in_place", [True, False], ids=["copied", "assigned"])
@pytest.mark.parametrize("kind", ["Q8_0", "fp8"])
def test_a_weight_of_no_layer_of_the_hosts_is_unpacked(comfy_host, tmp_path, monkeypatch, kind, in_place):
    """HunyuanVideo 1.5 has a torch.nn.Embedding. The host copies weights into parameters without dynamic VRAM, and puts
    them in their place with it."""
    floats = random_floats(comfy_host, "comfy.ldm.hunyuan_video.model.HunyuanVideo", **HUNYUAN_VIDEO_15)
    key = "cond_type_embedding.weight"
    if kind == "fp8":
        stored = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in floats.items()}
        path, expected = small.save(tmp_path / "fp8.safetensors", stored), stored[key].float()
    else:
        path = small.write_gguf(tmp_path / "q8_0.gguf", floats, every_weight=True)
        expected = gguf_floats(path)[key]
        assert not torch.equal(expected, floats[key]), "the file holds it quantized"
    if not in_place:
        load = torch.nn.Module.load_state_dict
        monkeypatch.setattr(
            torch.nn.Module, "load_state_dict", lambda self, values, strict=True, **_: load(self, values, strict, True)
        )
    from lowbit.host.model import NONE, LoadRequest, load_pair

    request = LoadRequest(str(path), compute_mode="exact", dtype="fp32", quantize=kind == "fp8")
    model, _ = load_pair(request, NONE)
    weight = model.model.diffusion_model.cond_type_embedding.weight
    assert type(weight) is torch.nn.Parameter and torch.equal(weight.float(), expected)
    assert model.model.diffusion_model.double_blocks[0].img_mlp[0].quant_format
