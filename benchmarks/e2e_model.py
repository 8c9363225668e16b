"""Ideogram 4 with random weights.

Both branches have the real shapes. Their weights are made on the device from a seed, a tensor at a time, whenever one
is asked for: no master copy takes memory, and every file holds the same model. The statistics are a transformer's:
Gaussian weights of scale K^-0.5, and a few loud rows of w3, which are loud input channels of w2.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib

import torch
from host_harness import small_models

BRANCHES = ("conditional", "unconditional")
BLOCK_LINEAR = re.compile(r"layers\.\d+\.(attention\.(qkv|o)|feed_forward\.w[123])\.weight")
LOUDNESS = 20.0
LORA_RANK = 32
LORA_SIZE = 0.1  # of a LoRA's change, relative to the weight


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of `size`, and the weights of `seed`, bf16 on `device`."""

    size: small_models.Ideogram4Size
    device: torch.device
    seed: int = 1

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return small_models.ideogram4_shapes(self.size)

    @property
    def block_linears(self) -> list[str]:
        """The keys of the weights that files quantize."""
        return [key for key in self.shapes if self.is_block_linear(key)]

    @staticmethod
    def is_block_linear(key: str) -> bool:
        return BLOCK_LINEAR.fullmatch(key) is not None

    def weight(self, branch: str, key: str) -> torch.Tensor:
        shape, generator = self.shapes[key], self._generator(f"{branch}/{key}")
        values = torch.randn(shape, generator=generator, device=self.device)
        if key.endswith(".bias"):
            values *= 0.02
        elif len(shape) == 1:  # a norm
            values = 1.0 + 0.1 * values
        else:
            values *= shape[1] ** -0.5
        if key.endswith("feed_forward.w3.weight"):
            loud = torch.randperm(shape[0], generator=generator, device=self.device)[: max(2, shape[0] // 2048)]
            values[loud] *= LOUDNESS
        return values.to(torch.bfloat16)

    def lora(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a LoRA file on all linear layers of the blocks, bf16 on the CPU."""
        tensors = {}
        for key in self.block_linears:
            N, K = self.shapes[key]
            generator, name = self._generator(f"lora/{number}/{key}"), f"diffusion_model.{key.removesuffix('.weight')}"
            down = torch.randn(LORA_RANK, K, generator=generator, device=self.device) * K**-0.5
            up = torch.randn(N, LORA_RANK, generator=generator, device=self.device) * LORA_SIZE * LORA_RANK**-0.5
            tensors |= {f"{name}.lora_A.weight": down.bfloat16().cpu(), f"{name}.lora_B.weight": up.bfloat16().cpu()}
        return tensors

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed << 32 | zlib.crc32(name.encode()))
