"""The linear layers of an Ideogram 4 transformer, y[M, N] = x[M, K] @ w[N, K].T, and how many tokens they see."""

from __future__ import annotations

import dataclasses

TOKENS = (4352, 16640)  # 1024x1024: 4096 image tokens and 256 of text; 2048x2048: 16384 and 256
SMALL_M = 16  # up to here a call is bound by reading the weight


@dataclasses.dataclass(frozen=True)
class Layer:
    """tokens: the values of M that only this layer sees; empty for a layer that sees all tokens of the image."""

    name: str
    N: int
    K: int
    bias: bool = False
    tokens: tuple[int, ...] = ()


LAYERS = (
    Layer("qkv", 13824, 4608),
    Layer("o", 4608, 4608),
    Layer("w1", 12288, 4608),  # and w3
    Layer("w2", 4608, 12288),
    Layer("llm_cond_proj", 4608, 53248, bias=True, tokens=(256,)),
    Layer("adaln_modulation", 18432, 512, bias=True, tokens=(1, 2, 16)),
)
BLOCK_LAYERS = tuple(layer for layer in LAYERS if not layer.tokens)

HIDDEN, FFN, ADALN, HEADS = 4608, 12288, 512, 18
