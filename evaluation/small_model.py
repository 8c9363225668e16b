"""A small transformer for experiments, named and built as Ideogram 4 is but for text, modulation and positions; its
outlier channels are planted, so the truth about its fragile layers is known."""

from __future__ import annotations

import torch

HIDDEN, FFN, HEADS = 256, 512, 4


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(0, 1).flatten(1))


class FeedForward(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = torch.nn.Linear(HIDDEN, FFN, bias=False)
        self.w2 = torch.nn.Linear(FFN, HIDDEN, bias=False)
        self.w3 = torch.nn.Linear(HIDDEN, FFN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.add_module(name, torch.nn.RMSNorm(HIDDEN, eps=1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.3 * self.attention_norm2(self.attention(self.attention_norm1(x)))
        return x + 0.3 * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class SmallModel(torch.nn.Module):
    """x[M, HIDDEN] -> [M, HIDDEN]; weights of a trained model's scale, by seed."""

    def __init__(self, layers: int, seed: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(layers))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_norm = parameter.dim() == 1
                parameter.copy_(1 + 0.1 * noise if is_norm else noise * parameter.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plant_outliers(model: SmallModel, strengths: dict[int, float], channels: int = 3, seed: int = 0) -> list[str]:
    """Make some input channels of `feed_forward.w2` loud, in the layers and by the factors given; returns their names.

    The rows of w3 that make these channels grow, the columns of w2 that read them shrink: the model computes the same.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, strength in strengths.items():
            loud = torch.randperm(FFN, generator=generator)[:channels]
            feed_forward = model.layers[index].feed_forward
            feed_forward.w3.weight[loud] *= strength
            feed_forward.w2.weight[:, loud] /= strength
    return [f"layers.{index}.feed_forward.w2" for index in strengths]


def noisy_inputs(tokens: int, seed: int, noise_levels: tuple[float, ...] = (1.0, 0.7, 0.4, 0.1)) -> list[torch.Tensor]:
    """What a sampler would show the model: something smooth in less and less noise, [tokens, HIDDEN] each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, HIDDEN, tokens // 8, generator=generator)
    clean = torch.nn.functional.interpolate(coarse, size=tokens, mode="linear")[0].t()
    return [(1 - level) * clean + level * torch.randn(tokens, HIDDEN, generator=generator) for level in noise_levels]
