"""wq = clamp(round(w * (1 / row_scale)), -127, 127) with w the float32 values of GGML blocks, which never reach memory.

The decoders and their tiles are those of `unpack`. Without rotation a program goes through tiles of units, and each
unit finds its own row. With it a program decodes whole groups of 256 elements, puts them in order, rotates and rounds.
Row scales are found by a kernel of their own, one program a row: callers keep them, so it runs once a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...formats import ggml
from ..quantize_per_token.triton_impl import HADAMARD_DTYPE, ROTATION_GROUP, absmax_bits, rotate_features, scale_of
from ..unpack.triton_impl import DECODERS, aligned, blocks_refusal, first_element

if TYPE_CHECKING:
    from . import UnpackToInt8Call

NUM_WARPS = 4
TILES = 2
GROUPS = 16  # of one program, with rotation
ROW_SCALE_TILE = 2048  # elements that a program looks at at once


def supports(call: UnpackToInt8Call) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := blocks_refusal(call.blocks, call.ggml_type):
        return reason
    if call.rotation_group not in (0, ROTATION_GROUP):
        return f"rotates groups of {ROTATION_GROUP}, found {call.rotation_group}"
    return None


def run(call: UnpackToInt8Call) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = aligned(call.blocks)
    N, K = blocks.shape[0], ggml.logical_K(call.ggml_type, blocks.shape[1])
    wq = torch.empty((N, K), dtype=torch.int8, device=blocks.device)
    row_scale = call.row_scale
    if row_scale is None:
        row_scale = torch.empty((N, 1), dtype=torch.float32, device=blocks.device)
        if N:
            launch_row_scale(blocks, call.ggml_type, row_scale, K, call.rotation_group)
    if N and call.rotation_group:
        launch_rotated(blocks, call.ggml_type, row_scale.contiguous(), wq, GROUPS, NUM_WARPS)
    elif N:
        launch(blocks, call.ggml_type, row_scale.contiguous(), wq, TILES, NUM_WARPS)
    return wq, row_scale


def launch(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, wq: torch.Tensor, tiles: int, num_warps: int
) -> None:
    decoder = DECODERS[ggml_type]
    units = wq.numel() // decoder.unit_elements
    tile_units = decoder.tile_units(1, num_warps)
    with torch.cuda.device_of(wq):
        _unpack_to_int8_kernel[(triton.cdiv(units, tile_units * tiles),)](
            blocks,
            row_scale,
            wq,
            units,
            ROW_UNITS=wq.shape[1] // decoder.unit_elements,
            UNITS=tile_units,
            TILES=tiles,
            num_warps=num_warps,
            enable_fp_fusion=False,
            **decoder.constants(ggml_type),
        )


def launch_rotated(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, wq: torch.Tensor, groups: int, num_warps: int
) -> None:
    all_groups = wq.numel() // ROTATION_GROUP
    with torch.cuda.device_of(wq):
        _unpack_rotated_to_int8_kernel[(triton.cdiv(all_groups, groups),)](
            blocks,
            row_scale,
            wq,
            all_groups,
            ROW_GROUPS=wq.shape[1] // ROTATION_GROUP,
            HADAMARD_DTYPE=HADAMARD_DTYPE,
            GROUPS=groups,
            num_warps=num_warps,
            **DECODERS[ggml_type].constants(ggml_type),
        )


def launch_row_scale(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, K: int, rotation_group: int
) -> None:
    decoder = DECODERS[ggml_type]
    chunk = ROTATION_GROUP if rotation_group else decoder.unit_elements
    with torch.cuda.device_of(row_scale):
        _row_scale_kernel[(blocks.shape[0],)](
            blocks,
            row_scale,
            blocks.shape[1],
            K // chunk,
            ROTATE=rotation_group != 0,
            HADAMARD_DTYPE=HADAMARD_DTYPE,
            CHUNKS=ROW_SCALE_TILE // chunk,
            num_warps=NUM_WARPS,
            **decoder.constants(ggml_type),
        )


@triton.jit(do_not_specialize=["units"])
def _unpack_to_int8_kernel(
    blocks_ptr,
    row_scale_ptr,
    wq_ptr,
    units,
    ROW_UNITS: tl.constexpr,  # a constant, because a division by it is then two instructions
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    UNITS: tl.constexpr,
    TILES: tl.constexpr,
):
    start = tl.program_id(0) * (TILES * UNITS)
    blocks_ptr += (start // BLOCK_UNITS).to(tl.int64) * TYPE_SIZE
    wq_ptr += start.to(tl.int64) * (PLANES * RUN)
    i = tl.arange(0, RUN)[None, :]
    for tile in tl.static_range(TILES):
        # As in `unpack`: units beyond the end are the last one again.
        unit = tl.minimum(tile * UNITS + tl.arange(0, UNITS)[:, None], units - 1 - start)
        inverse = tl.div_rn(1.0, tl.load(row_scale_ptr + (start + unit) // ROW_UNITS))
        values = DECODE(blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE, unit % BLOCK_UNITS, i)
        wq_ptrs = wq_ptr + first_element(unit, RUN, PLANES, SPLIT) + i
        for plane in tl.static_range(PLANES):
            tl.store(wq_ptrs + plane * SPLIT * RUN, _code(values[plane] * inverse))


@triton.jit(do_not_specialize=["groups"])
def _unpack_rotated_to_int8_kernel(
    blocks_ptr,
    row_scale_ptr,
    wq_ptr,
    groups,
    ROW_GROUPS: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    start = tl.program_id(0) * GROUPS
    GROUP_UNITS: tl.constexpr = 256 // (PLANES * RUN)
    blocks_ptr += (start * GROUP_UNITS // BLOCK_UNITS).to(tl.int64) * TYPE_SIZE
    last = groups - 1 - start
    values = _rotated_groups(
        blocks_ptr, last, HADAMARD_DTYPE, DECODE, TYPE_SIZE, BLOCK_UNITS, RUN, PLANES, SPLIT, GROUPS
    )
    group = tl.minimum(tl.arange(0, GROUPS), last)[:, None]
    inverse = tl.div_rn(1.0, tl.load(row_scale_ptr + (start + group) // ROW_GROUPS))
    codes = _code(tl.reshape(values, (GROUPS, 256)) * inverse)
    tl.store(wq_ptr + start.to(tl.int64) * 256 + group * 256 + tl.arange(0, 256)[None, :], codes)


@triton.jit(do_not_specialize=["row_bytes", "chunks"])
def _row_scale_kernel(
    blocks_ptr,
    row_scale_ptr,
    row_bytes,
    chunks,
    ROTATE: tl.constexpr,
    HADAMARD_DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A chunk is a group with rotation, else a unit. Chunks beyond the row's end are its last one again."""
    row = tl.program_id(0).to(tl.int64)
    blocks_ptr += row * row_bytes
    absmax = tl.zeros((), tl.int32)
    for start in range(0, chunks, CHUNKS):
        if ROTATE:
            GROUP_UNITS: tl.constexpr = 256 // (PLANES * RUN)
            group_ptr = blocks_ptr + start * GROUP_UNITS // BLOCK_UNITS * TYPE_SIZE
            values = _rotated_groups(
                group_ptr,
                chunks - 1 - start,
                HADAMARD_DTYPE,
                DECODE,
                TYPE_SIZE,
                BLOCK_UNITS,
                RUN,
                PLANES,
                SPLIT,
                CHUNKS,
            )
            absmax = tl.maximum(absmax, absmax_bits(values))
        else:
            unit = tl.minimum(start + tl.arange(0, CHUNKS)[:, None], chunks - 1)
            block = blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE
            values = DECODE(block, unit % BLOCK_UNITS, tl.arange(0, RUN)[None, :])
            for plane in tl.static_range(PLANES):
                absmax = tl.maximum(absmax, absmax_bits(values[plane]))
    tl.store(row_scale_ptr + row, scale_of(absmax))


@triton.jit
def _code(scaled):
    """int8: rounded with halves to even, within [-127, 127]."""
    # 1.5 * 2**23 leaves no fraction bits: adding it rounds, and the low byte of the sum is the code.
    return (tl.clamp(scaled, -127.0, 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _rotated_groups(
    blocks_ptr,
    last,
    HADAMARD_DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """GROUPS groups from blocks_ptr on, those beyond `last` being it again, rotated: float32 [GROUPS, 16, 16]."""
    GROUP_UNITS: tl.constexpr = 256 // (PLANES * RUN)
    unit = tl.arange(0, GROUPS * GROUP_UNITS)[:, None]
    unit = tl.minimum(unit // GROUP_UNITS, last) * GROUP_UNITS + unit % GROUP_UNITS
    values = DECODE(blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE, unit % BLOCK_UNITS, tl.arange(0, RUN)[None, :])
    if PLANES == 1:
        x = values[0]
    elif PLANES == 2:
        x = tl.join(values[0], values[1])
    else:
        x = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    # Into the order of the elements: planes before the units that share them, and those before their runs.
    x = tl.permute(tl.reshape(x, (GROUPS * GROUP_UNITS // SPLIT, SPLIT, RUN, PLANES)), (0, 3, 1, 2))
    return rotate_features(tl.reshape(x, (GROUPS * 256,)), GROUPS * 256, HADAMARD_DTYPE)
