"""Random operands, and how far a result is from what they mean."""

from __future__ import annotations

import torch

# More than four times the L2 cache of any card so far: what is this far back has left it.
COLD_BYTES = 256 * 2**20
MOST_COPIES = 32

LOUDNESS = 20.0
TOKEN_CHUNK = 2048


def normal(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Gaussian bf16 values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def activations(M: int, K: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Gaussian bf16 [M, K] with a few loud channels, as transformers have them: what per-token INT8 is worst at."""
    x = normal(M, K, device=device, seed=seed)
    loud = torch.randperm(K, generator=torch.Generator().manual_seed(seed))[: max(2, K // 2048)]
    x[:, loud.to(device)] *= LOUDNESS
    return x


def cold(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Copies of a tensor, enough that none is still in the L2 cache when its turn comes again."""
    count = min(MOST_COPIES, max(2, -(-COLD_BYTES // tensor.nbytes)))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def float32_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x[M, K] @ w[N, K].T + bias in float32, without TF32, a chunk of tokens at a time."""
    torch.set_float32_matmul_precision("highest")
    w, bias = w.float(), None if bias is None else bias.float()
    return torch.cat([torch.nn.functional.linear(tokens.float(), w, bias) for tokens in x.split(TOKEN_CHUNK)])


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """The Frobenius norm of the difference, relative to the reference's."""
    return float((y.float() - reference).norm() / reference.norm())
