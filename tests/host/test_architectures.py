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


def test_same_file_of_a_model_with_one_weight_set_is_ordinary_cfg(comfy_host, tmp_path):
    from lowbit.host.model import SAME_FILE, LoadRequest, load_pair

    path = small.write_gguf(tmp_path / "flux-Q8_0.gguf", small.flux())
    model, negative = load_pair(LoadRequest(str(path)), SAME_FILE)
    assert model is negative
