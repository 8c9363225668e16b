"""The launch configurations of the INT8 product: what is worth trying for an architecture and a number of tokens.

The first of a list is used where nothing is tuned. Measured on an H200 (sm_90) and compiled for sm_80, 86 and 89
without spills; a block of sm_86, 89 and 120 has 99 KB of shared memory. Triton compiles no int8 product for sm_75: it
uses PyTorch's.
"""

from __future__ import annotations

import functools

import torch

from ..capability import device_capability, multiprocessors

MOST_PARTS = 16
PART_COST = 12


def config(
    block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, group_m: int = 8, tma: int = 0
) -> dict[str, int]:
    """Tile of y [block_m, block_n], step along K, warps and pipeline stages of a program; rows of tiles in a group at
    most; whether the bulk copy engine brings the operands."""
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": group_m,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "TMA": tma,
    }


# For each architecture: the largest bucket of M that a list serves, and the list. 99 KB of shared memory:
_CONSUMER = (
    (16, (config(16, 64, 256, 4, 4), config(16, 64, 128, 4, 4))),
    (32, (config(32, 64, 256, 4, 3), config(32, 128, 128, 4, 4))),
    (64, (config(64, 64, 128, 4, 4), config(64, 128, 128, 4, 3))),
    (512, (config(64, 128, 128, 4, 3), config(128, 128, 64, 4, 4), config(64, 64, 128, 4, 4))),
    (16384, (config(128, 256, 64, 8, 3), config(128, 128, 64, 4, 4), config(128, 256, 64, 8, 4))),
)
TABLE: dict[tuple[int, int], tuple] = {
    (8, 0): (
        *_CONSUMER[:3],
        (512, (config(64, 128, 128, 4, 3), config(128, 128, 64, 4, 4))),
        (16384, (config(128, 256, 64, 8, 4), config(128, 128, 64, 4, 4), config(128, 128, 128, 8, 3))),
    ),
    (8, 6): _CONSUMER,
    (8, 9): _CONSUMER,
    (9, 0): (
        *_CONSUMER[:2],
        (64, (config(64, 128, 128, 4, 4), config(64, 64, 128, 4, 4))),
        (512, (config(128, 128, 128, 4, 3, 17), config(64, 128, 128, 4, 4), config(128, 128, 128, 4, 3, 17, tma=1))),
        (16384, (config(128, 128, 128, 4, 3, 17, tma=1), config(128, 128, 128, 4, 3, 17))),
    ),
    (12, 0): _CONSUMER,
}


def candidates(device: torch.device, bucket: int) -> tuple[dict[str, int], ...]:
    """The configurations worth trying on this device for M in this bucket, the best guess first."""
    return _list_of(device_capability(device) if device.type == "cuda" else (8, 6), bucket)


@functools.lru_cache(maxsize=4096)
def parts_along_k(tiles: int, K: int, num_warps: int, device: torch.device) -> int:
    """Into how many sums along K a product of this many tiles is split, so that its last wave is nearly full.

    A part costs a round trip of its int32 sums through the cache: the time of PART_COST steps along K for each tile of
    the whole product (from 1, 3, 7 and 11 parts of 72 tiles with K = 53248 on an H200: 3 are best).
    """
    slots = multiprocessors(device) * (2 if num_warps <= 4 else 1)
    if tiles >= 2 * slots:
        return 1
    costs = {
        parts: -(-tiles * parts // slots) / parts + PART_COST * parts * tiles / K for parts in range(1, MOST_PARTS + 1)
    }
    return min(costs, key=costs.__getitem__)


@functools.cache
def _list_of(capability: tuple[int, int], bucket: int) -> tuple[dict[str, int], ...]:
    known = max((known for known in TABLE if known <= capability), default=(8, 0))
    if known[0] != capability[0]:  # a generation of its own, with at least what sm_80 programs can use
        known = (8, 6)
    return next(configs for largest, configs in TABLE[known] if bucket <= largest)
