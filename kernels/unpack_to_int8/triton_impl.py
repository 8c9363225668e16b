"""wq = round(w * (1 / row_scale)) with w the float32 values of GGML blocks, which never reach memory.

The decoders and their tiles are those of `unpack`. Without rotation a program goes through tiles of units, and each
unit finds its own row. With it a program decodes groups of 256 elements and rotates them by sums of four: H256 is H4 on
each of the four base-4 digits of an element's number. The sums are float32; on the tensor cores the values would have
to be split into bfloat16 parts, for as many instructions and fewer bits.

Row scales are found by a kernel of their own, one program a row: callers keep them, so it runs once a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..scratch import scratch
from ..unpack.triton_impl import DECODERS, aligned, blocks_refusal, empty, first_element

if TYPE_CHECKING:
    from . import UnpackToInt8Call

NUM_WARPS = 4
STORES = 4  # of 16 bytes, by one thread
ROTATION_GROUP = 256
ROTATED_GROUPS, ROTATED_WARPS = 8, 1  # of one program: a warp keeps its exchanges between threads to itself
ROW_SCALE_ELEMENTS = 2048  # of a row at a time


def supports(call: UnpackToInt8Call) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := blocks_refusal(call.blocks, call.ggml_type):
        return reason
    if call.rotation_group not in (0, ROTATION_GROUP):
        return f"rotates groups of {ROTATION_GROUP}, found {call.rotation_group}"
    return None


def run(call: UnpackToInt8Call) -> torch.Tensor:
    blocks = aligned(call.blocks)
    N = blocks.shape[0]
    wq = (scratch if call.in_scratch else empty)((N, call.K), torch.int8, blocks.device)
    if N and call.rotation_group:
        launch_rotated(blocks, call.ggml_type, call.row_scale.contiguous(), wq, ROTATED_GROUPS, ROTATED_WARPS)
    elif N:
        launch(blocks, call.ggml_type, call.row_scale.contiguous(), wq, STORES, NUM_WARPS)
    return wq


def find_row_scale(call: UnpackToInt8Call) -> torch.Tensor:
    blocks = aligned(call.blocks)
    row_scale = torch.empty((blocks.shape[0], 1), dtype=torch.float32, device=blocks.device)
    if blocks.shape[0]:
        launch_row_scale(blocks, call.ggml_type, row_scale, call.K, call.rotation_group)
    return row_scale


def launch(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, wq: torch.Tensor, stores: int, num_warps: int
) -> None:
    decoder = DECODERS[ggml_type]
    units = wq.numel() // decoder.unit_elements
    tile = decoder.tile(wq.element_size(), stores, num_warps)
    with torch.cuda.device_of(wq):
        _unpack_to_int8_kernel[(triton.cdiv(units, tile["UNITS"] * tile["TILES"]),)](
            blocks,
            row_scale,
            wq,
            units,
            ROW_UNITS=wq.shape[1] // decoder.unit_elements,
            num_warps=num_warps,
            enable_fp_fusion=False,  # `_code` rounds a rounded product, as the definition does
            **tile,
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
            GROUPS=groups,
            num_warps=num_warps,
            **DECODERS[ggml_type].constants(ggml_type),
        )


def launch_row_scale(
    blocks: torch.Tensor, ggml_type: str, row_scale: torch.Tensor, K: int, rotation_group: int
) -> None:
    decoder = DECODERS[ggml_type]
    part = rotation_group or decoder.unit_elements
    with torch.cuda.device_of(row_scale):
        _row_scale_kernel[(blocks.shape[0],)](
            blocks,
            row_scale,
            blocks.shape[1],
            K // part,
            ROTATE=rotation_group != 0,
            PARTS=ROW_SCALE_ELEMENTS // part,
            num_warps=ROTATED_WARPS if rotation_group else NUM_WARPS,
            **decoder.constants(ggml_type),
        )


@triton.jit(do_not_specialize=["units"])
def _unpack_to_int8_kernel(
    blocks_ptr,
    row_scale_ptr,
    wq_ptr,
    units,
    ROW_UNITS: tl.constexpr,  # by a constant, a division is two instructions instead of twenty
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
        # As in `unpack`, units beyond the end are the last one again.
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
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    start = tl.program_id(0) * GROUPS
    last = groups - 1 - start
    blocks_ptr += (start * (256 // (PLANES * RUN)) // BLOCK_UNITS).to(tl.int64) * TYPE_SIZE
    row = tl.arange(0, GROUPS * 4)[:, None]
    group = tl.minimum(row // 4, last)
    inverse = tl.div_rn(1.0, tl.load(row_scale_ptr + (start + group) // ROW_GROUPS))
    quarters = _rotated(blocks_ptr, last, inverse, DECODE, TYPE_SIZE, BLOCK_UNITS, RUN, PLANES, SPLIT, GROUPS)
    wq_ptrs = wq_ptr + start.to(tl.int64) * 256 + group * 256 + row % 4 * 16 + tl.arange(0, 16)[None, :]
    for quarter in tl.static_range(4):
        tl.store(wq_ptrs + quarter * 64, _code(quarters[quarter]))


@triton.jit(do_not_specialize=["row_bytes", "parts"])
def _row_scale_kernel(
    blocks_ptr,
    row_scale_ptr,
    row_bytes,
    parts,
    ROTATE: tl.constexpr,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Goes through a row by PARTS parts: groups with rotation, else units. Those beyond the end are the last again."""
    row = tl.program_id(0).to(tl.int64)
    blocks_ptr += row * row_bytes
    absmax = tl.zeros((PARTS * 4, 16) if ROTATE else (PARTS, RUN), tl.int32)
    for start in range(0, parts, PARTS):
        if ROTATE:
            block = blocks_ptr + start * (256 // (PLANES * RUN)) // BLOCK_UNITS * TYPE_SIZE
            last = parts - 1 - start
            quarters = _rotated(block, last, 1.0, DECODE, TYPE_SIZE, BLOCK_UNITS, RUN, PLANES, SPLIT, PARTS)
            for quarter in tl.static_range(4):
                absmax = tl.maximum(absmax, _magnitude_bits(quarters[quarter]))
        else:
            unit = tl.minimum(start + tl.arange(0, PARTS)[:, None], parts - 1)
            block = blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE
            values = DECODE(block, unit % BLOCK_UNITS, tl.arange(0, RUN)[None, :])
            for plane in tl.static_range(PLANES):
                absmax = tl.maximum(absmax, _magnitude_bits(values[plane]))
    value = tl.max(absmax).to(tl.float32, bitcast=True)
    scale = tl.where(value == value, tl.maximum(tl.div_rn(value, 127.0), 1e-30), value)
    tl.store(row_scale_ptr + row, scale)


@triton.jit
def _magnitude_bits(values):
    """The magnitudes as their bits: these order like the magnitudes, with NaN above all."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(scaled):
    """int8: rounded with halves to even. scaled: within [-127, 127] but for rounding, as the row's scale makes it."""
    # 1.5 * 2**23 leaves no fraction bits: adding it rounds, and the low byte of the sum is the code. It is offset by
    # 128, which an integer instruction takes back: see `store_codes` of quantize_per_token.
    return ((scaled + (12582912.0 + 128.0)).to(tl.int32, bitcast=True) ^ 128).to(tl.int8)


@triton.jit
def _rotated(
    blocks_ptr,
    last,
    factor,
    DECODE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    RUN: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rotated groups from blocks_ptr on times the factor ([GROUPS * 4, 1] or a number), those beyond `last` being it
    again: the four quarters of each group, float32 [GROUPS * 4, 16] with a row for every 16 elements."""
    group_units: tl.constexpr = 256 // (PLANES * RUN)
    unit = tl.arange(0, GROUPS * group_units)[:, None]
    unit = tl.minimum(unit // group_units, last) * group_units + unit % group_units
    values = DECODE(blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE, unit % BLOCK_UNITS, tl.arange(0, RUN)[None, :])
    if PLANES == 1:
        x = values[0]
    elif PLANES == 2:
        x = tl.join(values[0], values[1])
    else:
        x = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    # Into the order of elements: planes before the units that share them, and those before their runs.
    x = tl.permute(tl.reshape(x, (GROUPS * group_units // SPLIT, SPLIT, RUN, PLANES)), (0, 3, 1, 2))
    rows: tl.constexpr = GROUPS * 4
    x = tl.reshape(x, (rows, 64))
    for _ in tl.static_range(3):  # the last three digits, each one brought to the front of them
        x0, x1, x2, x3 = _split_digit(x, rows)
        y0, y1, y2, y3 = _times_h4(x0, x1, x2, x3, 1.0)
        x = tl.join(tl.join(y0, y2), tl.join(y1, y3))
        x = tl.reshape(tl.permute(tl.reshape(x, (rows, 16, 4)), (0, 2, 1)), (rows, 64))
    # [group, quarter, row, element] -> [group, row, element, quarter]
    x = tl.reshape(tl.permute(tl.reshape(x, (GROUPS, 4, 4, 16)), (0, 2, 3, 1)), (rows, 64))
    x0, x1, x2, x3 = _split_digit(x, rows)
    return _times_h4(x0, x1, x2, x3, factor * (1.0 / 16))


@triton.jit
def _split_digit(x, ROWS: tl.constexpr):
    """x[ROWS, 64] -> four tensors [ROWS, 16], one for each value of the last base-4 digit of the column."""
    even, odd = tl.split(tl.reshape(x, (ROWS, 32, 2)))
    x0, x2 = tl.split(tl.reshape(even, (ROWS, 16, 2)))
    x1, x3 = tl.split(tl.reshape(odd, (ROWS, 16, 2)))
    return x0, x1, x2, x3


@triton.jit
def _times_h4(x0, x1, x2, x3, scale):
    """Times 2 * scale * H4, the regular Hadamard matrix: all ones and -1 where the indices sum to 3, halved."""
    total = ((x0 + x1) + (x2 + x3)) * scale
    twice = 2.0 * scale
    return total - twice * x3, total - twice * x2, total - twice * x1, total - twice * x0
