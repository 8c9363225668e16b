"""Small stand-ins under the very file names that the shipped workflows ask for: they run as they are shipped."""

import pathlib

import torch

from . import small_models
from .small_models import Shapes

TEXT_ENCODER, VAE = "qwen3vl_8b_fp8_scaled.safetensors", "flux2-vae.safetensors"
FP8 = ("ideogram4_fp8_scaled.safetensors", "ideogram4_unconditional_fp8_scaled.safetensors")
INT8, Q4_K = "ideogram4-int8-w8a8.safetensors", "ideogram4-q4_k.gguf"
Q4_0 = ("ideogram4-Q4_0.gguf", "ideogram4_uncond-Q4_0.gguf")


def flux2_decoder_shapes(width: int = 32, latent_channels: int = 32) -> Shapes:
    """The decoder of the Flux 2 VAE, a quarter as wide; the host does not miss the encoder in order to decode."""

    def conv(name: str, n: int, k: int, size: int = 3) -> Shapes:
        return {f"{name}.weight": (n, k, size, size), f"{name}.bias": (n,)}

    def norm(name: str, n: int) -> Shapes:
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    def block(name: str, n: int, k: int) -> Shapes:
        shapes = norm(f"{name}.norm1", k) | conv(f"{name}.conv1", n, k)
        shapes |= norm(f"{name}.norm2", n) | conv(f"{name}.conv2", n, n)
        return shapes | (conv(f"{name}.nin_shortcut", n, k, size=1) if n != k else {})

    inner = 4 * width
    shapes = conv("post_quant_conv", latent_channels, latent_channels, size=1)
    shapes |= conv("decoder.conv_in", inner, latent_channels) | norm("decoder.mid.attn_1.norm", inner)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"decoder.mid.attn_1.{name}", inner, inner, size=1)
    for i in (1, 2):
        shapes |= block(f"decoder.mid.block_{i}", inner, inner)
    for level, factor in ((3, 4), (2, 4), (1, 2), (0, 1)):
        for i in range(3):
            shapes |= block(f"decoder.up.{level}.block.{i}", factor * width, inner)
            inner = factor * width
        if level:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", inner, inner)
    return shapes | norm("decoder.norm_out", inner) | conv("decoder.conv_out", 3, inner)


def write(base_directory: pathlib.Path) -> None:
    """Write what is not there yet under `base_directory`/models."""
    models = pathlib.Path(base_directory) / "models"
    folder = models / "diffusion_models"
    branches = {name: small_models.ideogram4(name) for name in ("conditional", "unconditional")}
    both = {"cond.": branches["conditional"], "uncond.": branches["unconditional"]}
    one = {"linear": "Q4_0", "architecture": None, "prefix": small_models.HOST_PREFIX}

    def vae():
        running = {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}
        return small_models.fill(flux2_decoder_shapes(), name="flux2_vae") | running

    writers = {folder / INT8: lambda path: small_models.save(path, small_models.int8_transformer_lab(branches))}
    writers[folder / Q4_K] = lambda path: small_models.write_gguf(path, both, linear="Q4_K")
    for fp8, q4_0, branch in zip(FP8, Q4_0, branches.values(), strict=True):
        writers[folder / fp8] = lambda path, floats=branch: small_models.save(path, small_models.fp8_scaled(floats))
        writers[folder / q4_0] = lambda path, floats=branch: small_models.write_gguf(path, floats, **one)
    writers[models / "text_encoders" / TEXT_ENCODER] = lambda path: small_models.save(path, small_models.text_encoder())
    writers[models / "vae" / VAE] = lambda path: small_models.save(path, vae())
    for path, write_file in writers.items():
        if not path.exists():
            write_file(path)
