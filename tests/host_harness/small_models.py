"""Small models in every layout that the loaders read: deterministic by seed, a few megabytes, finite and not trivial.

Needs torch and safetensors only; `gguf` and `comfy_kitchen` are imported by the writers that need them. The host
accepts the small sizes after `small_ideogram4.patch` (in this process) or with that folder in custom_nodes.

    conditional, unconditional = ideogram4("conditional"), ideogram4("unconditional")
    save(path, int8_transformer_lab({"conditional": conditional, "unconditional": unconditional}))
    write_gguf(path, {"cond.": conditional, "uncond.": unconditional}, linear="Q4_K")
"""

import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from .small_ideogram4.patch import LUMINA2, TEXT_ENCODER

StateDict = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

INT8_MAX = 127.0
FP8_MAX = 448.0
EMBEDDINGS = ("embed_image_indicator.weight", "embed_tokens.weight")
HOST_PREFIX = "model.diffusion_model."


# Shapes


@dataclass(frozen=True)
class Ideogram4Size:
    layers: int = 2
    heads: int = 2
    head_dim: int = 128
    ffn: int = 512
    adaln: int = 256
    llm: int = 832  # 13 taps x 64 features: what the small text encoder gives
    in_channels: int = 128  # the latent format fixes it

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


SMALL = Ideogram4Size()
FULL = Ideogram4Size(layers=34, heads=18, head_dim=256, ffn=12288, adaln=512, llm=53248)

LUMINA2_WIDTH = 256


def _linear(name: str, n: int, k: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (n, k)} | ({f"{name}.bias": (n,)} if bias else {})


def _norms(*names: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,) for name in names}


def ideogram4_shapes(size: Ideogram4Size = SMALL) -> Shapes:
    hidden, adaln = size.hidden, size.adaln
    shapes = _linear("input_proj", hidden, size.in_channels, bias=True)
    shapes |= _norms("llm_cond_norm", width=size.llm)
    shapes |= _linear("llm_cond_proj", hidden, size.llm, bias=True)
    shapes |= _linear("t_embedding.mlp_in", hidden, hidden, bias=True)
    shapes |= _linear("t_embedding.mlp_out", hidden, hidden, bias=True)
    shapes |= _linear("adaln_proj", adaln, hidden, bias=True)
    shapes |= {"embed_image_indicator.weight": (2, hidden)}
    for i in range(size.layers):
        layer = f"layers.{i}"
        shapes |= _linear(f"{layer}.attention.qkv", 3 * hidden, hidden)
        shapes |= _norms(f"{layer}.attention.norm_q", f"{layer}.attention.norm_k", width=size.head_dim)
        shapes |= _linear(f"{layer}.attention.o", hidden, hidden)
        shapes |= _linear(f"{layer}.feed_forward.w1", size.ffn, hidden)
        shapes |= _linear(f"{layer}.feed_forward.w2", hidden, size.ffn)
        shapes |= _linear(f"{layer}.feed_forward.w3", size.ffn, hidden)
        norms = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
        shapes |= _norms(*(f"{layer}.{norm}" for norm in norms), width=hidden)
        shapes |= _linear(f"{layer}.adaln_modulation", 4 * hidden, adaln, bias=True)
    shapes |= _linear("final_layer.linear", size.in_channels, hidden, bias=True)
    shapes |= _linear("final_layer.adaln_modulation", hidden, adaln, bias=True)
    return shapes


def flux_shapes(hidden: int = 256, depth: int = 1, text_width: int = 256, pooled_width: int = 64) -> Shapes:
    """Flux dev: 128 features a head and 16 latent channels are fixed, the rest is read from the file."""
    mlp = 4 * hidden
    shapes = _linear("img_in", hidden, 64, bias=True) | _linear("txt_in", hidden, text_width, bias=True)
    for name, width in (("time_in", 256), ("vector_in", pooled_width), ("guidance_in", 256)):
        shapes |= _linear(f"{name}.in_layer", hidden, width, bias=True)
        shapes |= _linear(f"{name}.out_layer", hidden, hidden, bias=True)
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= _linear(f"{block}_mod.lin", 6 * hidden, hidden, bias=True)
            shapes |= _linear(f"{block}_attn.qkv", 3 * hidden, hidden, bias=True)
            shapes |= {f"{block}_attn.norm.query_norm.scale": (128,), f"{block}_attn.norm.key_norm.scale": (128,)}
            shapes |= _linear(f"{block}_attn.proj", hidden, hidden, bias=True)
            shapes |= _linear(f"{block}_mlp.0", mlp, hidden, bias=True) | _linear(
                f"{block}_mlp.2", hidden, mlp, bias=True
            )
        block = f"single_blocks.{i}"
        shapes |= _linear(f"{block}.linear1", 3 * hidden + mlp, hidden, bias=True)
        shapes |= _linear(f"{block}.linear2", hidden, hidden + mlp, bias=True)
        shapes |= {f"{block}.norm.query_norm.scale": (128,), f"{block}.norm.key_norm.scale": (128,)}
        shapes |= _linear(f"{block}.modulation.lin", 3 * hidden, hidden, bias=True)
    shapes |= _linear("final_layer.linear", 64, hidden, bias=True)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden, bias=True)


def lumina2_shapes(width: int = LUMINA2_WIDTH, layers: int = 1, text_width: int = 256) -> Shapes:
    """Lumina 2 with Z-Image's settings: two heads, one refiner layer each side."""
    ffn = 256 * -(-int(width * LUMINA2["ffn_dim_multiplier"]) // 256)
    shapes: Shapes = {"x_pad_token": (1, width), "cap_pad_token": (1, width)}
    shapes |= _linear("x_embedder", width, 64, bias=True)
    shapes |= _norms("cap_embedder.0", width=text_width) | _linear("cap_embedder.1", width, text_width, bias=True)
    shapes |= _linear("t_embedder.mlp.0", width, 256, bias=True) | _linear("t_embedder.mlp.2", 256, width, bias=True)
    blocks = {"noise_refiner.0": True, "context_refiner.0": False} | {f"layers.{i}": True for i in range(layers)}
    for block, modulated in blocks.items():
        shapes |= _linear(f"{block}.attention.qkv", 3 * width, width) | _linear(f"{block}.attention.out", width, width)
        shapes |= _norms(f"{block}.attention.q_norm", f"{block}.attention.k_norm", width=width // 2)
        shapes |= _linear(f"{block}.feed_forward.w1", ffn, width) | _linear(f"{block}.feed_forward.w2", width, ffn)
        shapes |= _linear(f"{block}.feed_forward.w3", ffn, width)
        norms = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
        shapes |= _norms(*(f"{block}.{norm}" for norm in norms), width=width)
        if modulated:
            shapes |= _linear(f"{block}.adaLN_modulation.0", 4 * width, 256, bias=True)
    shapes |= _linear("final_layer.linear", 64, width, bias=True)
    return shapes | _linear("final_layer.adaLN_modulation.1", width, 256, bias=True)


def text_encoder_shapes(layers: int = 36) -> Shapes:
    """The language model of Qwen3-VL-8B, 64 features wide, with the full vocabulary of the real tokenizer."""
    width, ffn, head_dim = TEXT_ENCODER["hidden_size"], TEXT_ENCODER["intermediate_size"], 128
    shapes: Shapes = {"model.embed_tokens.weight": (151936, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", head_dim, width)
        shapes |= _linear(f"{layer}.self_attn.o_proj", width, head_dim)
        shapes |= _norms(f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm", width=head_dim)
        for name in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{layer}.mlp.{name}", ffn, width)
        shapes |= _linear(f"{layer}.mlp.down_proj", width, ffn)
        shapes |= _norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", width=width)
    return shapes


def taef2_shapes() -> tuple[Shapes, Shapes]:
    """Encoder and decoder of the approximate VAE that the host calls `taef2`: 32 latent channels, 64 features."""

    def conv(index: str, n: int, k: int, size: int = 3, bias: bool = True) -> Shapes:
        return {f"{index}.weight": (n, k, size, size)} | ({f"{index}.bias": (n,)} if bias else {})

    def block(index: int, pooled: bool = False) -> Shapes:
        shapes: Shapes = {}
        for i in (0, 2, 4):
            shapes |= conv(f"{index}.conv.{i}", 64, 64)
        if pooled:
            shapes |= conv(f"{index}.pool.0", 256, 64, size=1, bias=False)
            shapes |= {f"{index}.pool.1.weight": (256,), f"{index}.pool.1.bias": (256,)}
            shapes |= conv(f"{index}.pool.3", 64, 256, size=1, bias=False)
        return shapes

    encoder = conv("0", 64, 3) | block(1)
    for first in (2, 6, 10):
        encoder |= conv(str(first), 64, 64, bias=False)
        for i in range(first + 1, first + 4):
            encoder |= block(i, pooled=first == 10)
    encoder |= conv("14", 32, 64)

    decoder = conv("1", 64, 32)
    for first in (3, 8, 13):
        for i in range(first, first + 3):
            decoder |= block(i, pooled=first == 3)
        decoder |= conv(str(first + 4), 64, 64, bias=False)
    decoder |= block(18) | conv("19", 3, 64)
    return encoder, decoder


# Values


def fill(shapes: Shapes, seed: int = 0, name: str = "", dtype: torch.dtype = torch.float32) -> StateDict:
    """Random values of a trained model's scale; a tensor depends on (seed, name, key, shape) alone."""

    def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{key}".encode()))
        noise = torch.randn(shape, generator=generator)
        if key.endswith(".bias"):
            return 0.02 * noise
        if len(shape) == 1:  # a norm
            return 1.0 + 0.1 * noise
        if key.endswith((*EMBEDDINGS, "_token")):
            return noise
        return noise * torch.tensor(shape[1:]).prod() ** -0.5

    return {key: value(key, shape).to(dtype) for key, shape in shapes.items()}


def ideogram4(
    branch: str = "conditional", seed: int = 0, size: Ideogram4Size = SMALL, dtype: torch.dtype = torch.float32
) -> StateDict:
    """One branch; the two branches of a seed have different weights, as in the real model."""
    return fill(ideogram4_shapes(size), seed, f"ideogram4.{branch}", dtype)


def flux(seed: int = 0, dtype: torch.dtype = torch.float32, **size: int) -> StateDict:
    return fill(flux_shapes(**size), seed, "flux", dtype)


def lumina2(seed: int = 0, dtype: torch.dtype = torch.float32, **size: int) -> StateDict:
    return fill(lumina2_shapes(**size), seed, "lumina2", dtype)


def text_encoder(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> StateDict:
    return fill(text_encoder_shapes(), seed, "text_encoder", dtype)


def taef2(seed: int = 0) -> tuple[StateDict, StateDict]:
    encoder, decoder = taef2_shapes()
    return fill(encoder, seed, "taef2_encoder"), fill(decoder, seed, "taef2_decoder")


def linears(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """The modules that are linear layers: a two-dimensional `.weight` which is no embedding."""
    return [
        key.removesuffix(".weight")
        for key, tensor in state_dict.items()
        if key.endswith(".weight") and tensor.ndim == 2 and not key.endswith(EMBEDDINGS)
    ]


def block_linears(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """The linear layers inside transformer blocks, without the modulations: what every quantizer takes."""
    blocks = ("layers.", "double_blocks.", "single_blocks.", "noise_refiner.", "context_refiner.")
    return [name for name in linears(state_dict) if name.startswith(blocks) and "mod" not in name.split(".", 2)[2]]


# Safetensors layouts


def save(
    path: str | pathlib.Path, state_dict: StateDict, dtype: torch.dtype | None = None, metadata: dict | None = None
):
    """Writes a safetensors file, its floating-point tensors as `dtype` when that is given; returns the path."""
    from safetensors.torch import save_file

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype is not None:
        state_dict = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}
    save_file(
        {key: value.contiguous() for key, value in state_dict.items()}, path, {"format": "pt", **(metadata or {})}
    )
    return path


def with_prefix(state_dict: StateDict, prefix: str) -> StateDict:
    return {prefix + key: value for key, value in state_dict.items()}


def quantize_int8(weight: torch.Tensor, per_channel: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 [N, K] and its fp32 scale, [N, 1] per channel or a scalar per tensor."""
    weight = weight.float()
    absmax = weight.abs().amax(dim=1, keepdim=True) if per_channel else weight.abs().amax()
    scale = (absmax / INT8_MAX).clamp(min=1e-12)
    return (weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def comfy_quant(**configuration) -> torch.Tensor:
    """The host's marker: JSON as uint8."""
    return torch.tensor(list(json.dumps(configuration).encode()), dtype=torch.uint8)


def smoothing(name: str, k: int, seed: int = 0) -> torch.Tensor:
    """Factors of the spread that SmoothQuant finds: mostly 0.3 to 3."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"smooth/{seed}/{name}".encode()))
    return torch.exp(0.6 * torch.randn(k, generator=generator))


def int8_transformer_lab(
    branches: Mapping[str, StateDict],
    *,
    smooth: str | None = None,
    protect: Iterable[str] = ("layers.1.feed_forward.w2",),
    scale_shape: str = "N",
    seed: int = 0,
) -> StateDict:
    """Both branches in one file, linears only: `<branch>.<module>.wq/.ws/.smooth/.bias`, protected ones bf16 `.weight`.

    smooth: None, "divide" (x / smooth meets wq = W * smooth) or "multiply" (x * smooth meets wq = W / smooth).
    scale_shape: "N" or "N1".
    """
    protect, out = set(protect), {}
    for branch, state_dict in branches.items():
        for name in linears(state_dict):
            weight, bias, target = state_dict[f"{name}.weight"], state_dict.get(f"{name}.bias"), f"{branch}.{name}"
            if name in protect:
                out[f"{target}.weight"] = weight.to(torch.bfloat16)
            else:
                if smooth is not None:
                    factors = smoothing(target, weight.shape[1], seed)
                    out[f"{target}.smooth"] = factors
                    weight = {"divide": torch.mul, "multiply": torch.div}[smooth](weight.float(), factors)
                quantized, scale = quantize_int8(weight)
                out[f"{target}.wq"] = quantized
                out[f"{target}.ws"] = scale if scale_shape == "N1" else scale.flatten()
            if bias is not None:
                out[f"{target}.bias"] = bias.to(torch.bfloat16)
    return out


def int8_native(
    state_dict: StateDict,
    *,
    per_channel: bool = True,
    convrot: bool = False,
    group_size: int = 256,
    marker: bool = True,
    modules: Iterable[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StateDict:
    """The host's own INT8: int8 `.weight`, fp32 `.weight_scale`, the `comfy_quant` marker; other tensors as `dtype`.

    Rotation leaves a module alone whose K is not a multiple of the group size.
    """
    out = {key: value.to(dtype) for key, value in state_dict.items()}
    for name in block_linears(state_dict) if modules is None else modules:
        weight, configuration = state_dict[f"{name}.weight"].float(), {"format": "int8_tensorwise"}
        if convrot and weight.shape[1] % group_size == 0:
            from comfy_kitchen.tensor import TensorWiseINT8Layout

            quantized, params = TensorWiseINT8Layout.quantize(
                weight, per_channel=True, convrot=True, convrot_groupsize=group_size
            )
            scale = params.scale
            configuration |= {"convrot": True, "convrot_groupsize": group_size}
        else:
            quantized, scale = quantize_int8(weight, per_channel)
        out[f"{name}.weight"], out[f"{name}.weight_scale"] = quantized, scale.float()
        if marker:
            out[f"{name}.comfy_quant"] = comfy_quant(**configuration)
    return out


def int8_fast(state_dict: StateDict, *, per_channel: bool = True, modules: Iterable[str] | None = None) -> StateDict:
    """int8 `.weight` and `.weight_scale` without any marker."""
    return int8_native(state_dict, per_channel=per_channel, modules=modules, marker=False)


def fp8_official(
    state_dict: StateDict,
    *,
    scale_shape: str = "N",
    modules: Iterable[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StateDict:
    """The official FP8 release: e4m3 `.weight` and a per-channel fp32 `.weight_scale`, [N] or [N, 1] ("N1")."""
    out = {key: value.to(dtype) for key, value in state_dict.items()}
    for name in block_linears(state_dict) if modules is None else modules:
        weight = state_dict[f"{name}.weight"].float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
        out[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        out[f"{name}.weight_scale"] = scale if scale_shape == "N1" else scale.flatten()
    return out


def fp8_scaled(
    state_dict: StateDict,
    *,
    marker: str = "comfy_quant",
    modules: Iterable[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StateDict:
    """Per-tensor e4m3. marker "comfy_quant": `.weight_scale` and a marker a module; "scaled_fp8": the older
    `.scale_weight` with one empty `scaled_fp8` tensor a file."""
    out = {key: value.to(dtype) for key, value in state_dict.items()}
    for name in block_linears(state_dict) if modules is None else modules:
        weight = state_dict[f"{name}.weight"].float()
        scale = (weight.abs().amax() / FP8_MAX).clamp(min=1e-12)
        out[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        if marker == "scaled_fp8":
            out[f"{name}.scale_weight"] = scale
        else:
            out[f"{name}.weight_scale"] = scale
            out[f"{name}.comfy_quant"] = comfy_quant(format="float8_e4m3fn")
    if marker == "scaled_fp8":
        out["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return out


# GGUF

# Byte offsets of the fp16 factors in a block, for types that gguf-py unpacks but does not pack.
_FP16_FACTORS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
GGUF_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


def random_blocks(ggml_type: str, n: int, k: int, seed: int = 0):
    """Valid random bytes [N, row bytes] of a block type, as a numpy array; the values have a weight's scale, K^-0.5."""
    import gguf
    import numpy as np

    block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    blocks = np.random.default_rng(seed).integers(0, 256, (n * k // block_size, type_size), dtype=np.uint8)

    def set_factors(value: float) -> None:
        for offset in _FP16_FACTORS[ggml_type]:
            blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)

    set_factors(2.0**-10)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[ggml_type])
    set_factors(2.0**-10 * k**-0.5 / values.std())
    return blocks.reshape(n, k // block_size * type_size)


def ggml_bytes(values: torch.Tensor, ggml_type: str, seed: int = 0):
    """`values` [N, K] packed as a GGML type, as a numpy array [N, row bytes]. Packers: gguf-py's, then ours; a type
    that neither packs gets random valid blocks, which hold other values than those asked for."""
    import gguf
    import numpy as np

    try:
        packed = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[ggml_type])
        return packed.view(np.uint8).reshape(*values.shape[:-1], -1)
    except NotImplementedError:
        pass
    try:
        from lowbit.formats.ggml import quantize, type_from_name
    except ModuleNotFoundError:  # the pack is not registered under its name: a script that needs gguf-py's types only
        pass
    else:
        if type_from_name(ggml_type).can_quantize:
            return quantize(values, ggml_type).numpy()
    return random_blocks(ggml_type, values.numel() // values.shape[-1], values.shape[-1], seed)


def write_gguf(
    path: str | pathlib.Path,
    branches: StateDict | Mapping[str, StateDict],
    *,
    linear: str = "Q8_0",
    rest: str = "F16",
    norms: str | None = None,
    every_weight: bool = False,
    modules: Iterable[str] | None = None,
    choose: Callable[[str, torch.Tensor], str] | None = None,
    prefix: str = "",
    architecture: str | None = "ideogram4",
) -> pathlib.Path:
    """Writes a GGUF file; returns the path.

    branches: one state dict, or {"cond.": …, "uncond.": …}. `linear` is the type of the linears (`modules`: of those
    only), `rest` of the other tensors, `norms` of the one-dimensional ones when it differs; `every_weight` packs every
    `.weight` as `linear`, norms and embeddings too; `choose(key, tensor)` decides alone when given. A row that is no
    multiple of the type's block falls back to Q8_0, then F16. architecture=None: no `general.architecture`.
    """
    import gguf
    import numpy as np

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if all(isinstance(value, torch.Tensor) for value in branches.values()):
        branches = {"": branches}

    def ggml_type(key: str, tensor: torch.Tensor, quantized: set[str]) -> str:
        if choose is not None:
            wanted = choose(key, tensor)
        elif key.removesuffix(".weight") in quantized or (every_weight and key.endswith(".weight")):
            wanted = linear
        else:
            wanted = norms if norms is not None and tensor.ndim == 1 else rest
        for candidate in (wanted, "Q8_0"):
            if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[candidate]][0] == 0:
                return candidate
        return "F16"

    # The writer always stores an architecture; one that nobody asked for is taken out again before it reaches the disk.
    writer = gguf.GGUFWriter(str(path), architecture or "")
    if architecture is None:
        for pairs in writer.kv_data:
            pairs.pop("general.architecture", None)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for branch, state_dict in branches.items():
        quantized = set(linears(state_dict) if modules is None else modules)
        for key, tensor in state_dict.items():
            chosen = ggml_type(key, tensor, quantized)
            name = prefix + branch + key
            if chosen in ("F32", "F16"):
                writer.add_tensor(name, tensor.to(getattr(torch, {"F32": "float32", "F16": "float16"}[chosen])).numpy())
            else:
                packed = ggml_bytes(tensor, chosen, seed=zlib.crc32(name.encode()))
                writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_q8_cr(
    path: str | pathlib.Path, state_dict: StateDict, *, rotated: bool = True, prefix: str = ""
) -> pathlib.Path:
    """ComfyUI-GGUF's Q8_CR: the host's rotated INT8 in GGUF, its markers as metadata; returns the path.

    rotated=False: as its first converters wrote it, with markers that speak of a rotation which was not done.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), "ideogram")
    stored = int8_native(state_dict, convrot=rotated, dtype=torch.float32)
    for key, tensor in stored.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "comfy_quant":
            writer.add_tensor(prefix + key, tensor.numpy())
        else:
            marker = json.loads(bytes(tensor.tolist())) | {"convrot": True, "convrot_groupsize": 256}
            marker |= {"weight_rotated": True} if rotated else {}
            writer.add_string(f"comfy.gguf.quant.{prefix}{module}.weight", json.dumps(marker))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return pathlib.Path(path)


# Files where the host looks for them


def write_stand_ins(base_directory: str | pathlib.Path, seed: int = 0) -> dict[str, str]:
    """The small model files of the stock Ideogram 4 graph under `base_directory`/models; returns role -> file name.

    Files that this version of the module has written before are kept.
    """
    models = pathlib.Path(base_directory) / "models"
    stamp, made_by = (
        models / "stand_ins.stamp",
        f"{seed} {hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()}",
    )
    fresh = stamp.exists() and stamp.read_text() == made_by
    names = {
        "conditional": "small_ideogram4_bf16.safetensors",
        "unconditional": "small_ideogram4_unconditional_bf16.safetensors",
        "text_encoder": "small_qwen3vl.safetensors",
        "vae": "taef2",
    }

    def ensure(path: pathlib.Path, make: Callable[[], StateDict], dtype: torch.dtype | None = None) -> None:
        if not (fresh and path.exists()):
            save(path, make(), dtype)

    for branch in ("conditional", "unconditional"):
        path = models / "diffusion_models" / names[branch]
        ensure(path, lambda branch=branch: ideogram4(branch, seed), torch.bfloat16)
    ensure(models / "text_encoders" / names["text_encoder"], lambda: text_encoder(seed))
    ensure(models / "vae_approx" / "taef2_encoder.safetensors", lambda: taef2(seed)[0])
    ensure(models / "vae_approx" / "taef2_decoder.safetensors", lambda: taef2(seed)[1])
    stamp.write_text(made_by)
    return names
