"""Small quantized Ideogram 4 models loaded by Lowbit, beside full-precision models that hold the same weights.

model = load(folder, "q4_k")
twin = full_precision(host, model)          # what the file means, as a stock model
with_lora = add_lora(host, model, lora("lora"))
relative(effect(host, with_lora, model), effect(host, add_lora(host, twin, ...), twin))
"""

import pathlib
import zlib

import torch

from . import small_models as small

# Q3_K can be read and not written: what a quantizer is needed for keeps floats.
KINDS = ("int8", "int8_smooth", "int8_convrot", "q8_0", "q4_k", "q3_k")
REQUANTIZED = ("int8", "int8_smooth", "int8_convrot", "q8_0", "q4_k")

# What packing a layer of normal weights costs at most, relative to the layer: a sixth above what was measured. The
# random smoothing factors of these files fit no weight, hence theirs; the type without quantizer keeps floats.
PACKING_ERROR = {
    "int8": 0.009,
    "int8_smooth": 0.045,
    "int8_convrot": 0.009,
    "q8_0": 0.0065,
    "q4_k": 0.082,
    "q3_k": 1e-6,
}


def write(folder: pathlib.Path, kind: str, branch: str = "conditional", seed: int = 0) -> pathlib.Path:
    """A file of the small model in a kind of quantization, its block linears quantized; one that exists is kept."""
    path = folder / f"{kind}-{branch}-{seed}{'.safetensors' if kind.startswith('int8') else '.gguf'}"
    if path.exists():  # a model may be loaded from it
        return path
    floats = small.ideogram4(branch, seed)
    if kind == "int8_smooth":
        return small.save(path, int8_smooth(floats))
    if kind.startswith("int8"):
        return small.save(path, small.int8_native(floats, convrot=kind == "int8_convrot"))
    return small.write_gguf(path, floats, linear=kind.upper(), rest="F32", modules=small.block_linears(floats))


def int8_smooth(floats: small.StateDict, **marker) -> small.StateDict:
    """INT8 with smoothing factors, as Lowbit saves it."""
    stored = dict(floats)
    for name in small.block_linears(floats):
        factors = small.smoothing(name, floats[f"{name}.weight"].shape[1])
        stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = small.quantize_int8(
            floats[f"{name}.weight"] / factors
        )
        stored[f"{name}.weight_smooth"] = factors
        stored[f"{name}.comfy_quant"] = small.comfy_quant(format="lowbit_int8_smooth", **marker)
    return stored


def load(path: pathlib.Path, compute_mode: str = "exact", dtype: str = "fp32"):
    """The MODEL that Lowbit's loader nodes give."""
    from lowbit.host import model

    return model.load_model(model.LoadRequest(str(path), compute_mode=compute_mode, dtype=dtype))


def on_host_blocks(model):
    """The same model without fused blocks: every layer quantizes its input by itself, as in a stock model."""
    clone = model.clone()
    for key in [key for key in clone.object_patches if "layers." in key]:
        del clone.object_patches[key]
    return clone


def full_precision(host, model):
    """A stock float32 model with the weights that a quantized one stands for."""
    return host.load_state_dict(floats_of(model), dtype=torch.float32)


def floats_of(model) -> small.StateDict:
    """The weights of a model as plain float32 tensors."""
    floats = {}
    for key, parameter in model.model.diffusion_model.named_parameters():
        value = parameter.data.float()
        floats[key] = value.dequantize() if is_quantized(value) else value
    return floats


def is_quantized(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "QuantizedTensor"


def stored_bytes(model) -> small.StateDict:
    """A copy of every stored tensor of a model: bytes, scales, markers."""
    return {key: t.cpu().clone() for key, t in model.model.diffusion_model.state_dict().items()}


def quantized_bytes(model) -> small.StateDict:
    """Those of the quantized layers' weights alone."""
    state_dict, stored = model.model.diffusion_model.state_dict(), {}
    for name in quantized_linears(model):
        stored |= {key: t.clone() for key, t in state_dict.items() if key.startswith(f"{name}.") and "bias" not in key}
    return stored


def assert_same_bytes(actual: small.StateDict, expected: small.StateDict) -> None:
    assert actual.keys() == expected.keys()
    changed = [
        key
        for key, tensor in expected.items()
        if actual[key].dtype != tensor.dtype
        or actual[key].shape != tensor.shape
        or not torch.equal(actual[key], tensor)
    ]
    assert not changed


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def output(host, model) -> torch.Tensor:
    """One call of the model on the same random latent and text each time."""
    x = torch.randn(1, 128, 8, 8, generator=torch.Generator().manual_seed(5))
    return host.apply_model(model, x, context=host.conditioning(tokens=8)[0][0])


def quantized_linears(model) -> dict[str, torch.nn.Module]:
    from lowbit.host import layouts

    return {
        name: module
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Module) and layouts.from_host(getattr(module, "weight", None)) is not None
    }


# LoRA files


def random_values(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def adapter(kind: str, name: str, n: int, k: int, size: float = 0.3, seed: int = 0) -> small.StateDict:
    """The tensors of one linear layer [n, k] in a LoRA file; the change is about `size` of the weight."""
    noise = lambda leaf, *shape: random_values(f"{seed}/{name}/{leaf}", *shape)  # noqa: E731
    prefix, rank = f"diffusion_model.{name}", 4
    scale = size * k**-0.5
    if kind in ("lora", "dora"):
        tensors = {
            f"{prefix}.lora_up.weight": noise("up", n, rank) * scale,
            f"{prefix}.lora_down.weight": noise("down", rank, k) / rank**0.5,
            f"{prefix}.alpha": torch.tensor(float(rank) / 2),
        }
        if kind == "dora":
            tensors[f"{prefix}.dora_scale"] = 1.0 + 0.02 * noise("dora", n, 1)
        return tensors
    if kind.startswith("loha"):
        rank = 17 if kind == "loha_of_rank_17" else rank
        leaves = {"hada_w1_a": (n, rank), "hada_w1_b": (rank, k), "hada_w2_a": (n, rank), "hada_w2_b": (rank, k)}
        tensors = {f"{prefix}.{leaf}": noise(leaf, *shape) for leaf, shape in leaves.items()}
        tensors[f"{prefix}.hada_w1_a"] *= scale / rank
        return tensors
    if kind == "lokr":
        return {f"{prefix}.lokr_w1": noise("w1", 8, 8) * scale, f"{prefix}.lokr_w2": noise("w2", n // 8, k // 8)}
    if kind == "lokr_of_factors":
        leaves = {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (n // 8, rank), "lokr_w2_b": (rank, k // 8)}
        tensors = {f"{prefix}.{leaf}": noise(leaf, *shape) for leaf, shape in leaves.items()}
        tensors[f"{prefix}.lokr_w1_a"] *= scale
        return tensors | {f"{prefix}.alpha": torch.tensor(2.0)}
    if kind == "diff":
        return {f"{prefix}.diff": noise("diff", n, k) * scale}
    raise ValueError(kind)


def lora(kind: str = "lora", size: float = 0.3, seed: int = 0, modules: list[str] | None = None) -> small.StateDict:
    """A LoRA file for every block linear of the small model."""
    shapes = small.ideogram4_shapes()
    modules = small.block_linears(small.ideogram4()) if modules is None else modules
    tensors = {}
    for name in modules:
        tensors |= adapter(kind, name, *shapes[f"{name}.weight"], size, seed)
    return tensors


def vectors(size: float = 0.1) -> small.StateDict:
    """Changes of a bias and of norms, as LoRA files carry them."""
    tensors = {"diffusion_model.layers.0.adaln_modulation.diff_b": size * random_values("bias", 1024)}
    for norm in ("layers.0.attention_norm1", "layers.1.ffn_norm2"):
        tensors[f"diffusion_model.{norm}.w_norm"] = size * random_values(norm, 256)
    return tensors


def add_lora(host, model, file: small.StateDict, strength: float = 1.0, bypass: bool = False):
    """What the LoRA nodes do with a loaded file."""
    load_for = host.comfy.sd.load_bypass_lora_for_models if bypass else host.comfy.sd.load_lora_for_models
    with torch.inference_mode():
        return load_for(model, None, dict(file), strength, 0.0)[0]
