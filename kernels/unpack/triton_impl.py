"""w = the C library's float32 values of GGML blocks, rounded once to the dtype wanted: one pass over the bytes.

One template serves every type; a type brings a decoder. The blocks of a weight lie one after another, so rows do not
matter here: a program decodes a few tiles of UNITS units. A unit is what one row of a tile covers, PLANES runs of RUN
elements each, SPLIT units side by side:

    element of (unit, plane, i) = (unit // SPLIT * PLANES + plane) * SPLIT * RUN + unit % SPLIT * RUN + i

Codes that share a byte lie in different planes of a unit. A decoder returns all planes at once, so it loads the bytes
of the codes once, as wide as the type's size allows. A tile has as many units as let each thread store 16 bytes at a
time, and a thread decodes as many tiles as make STORES of them.

The product of a float16 scale, a block scale and a code has at most 24 significant bits in every type. So it is exact,
and a fused multiply-add gives what the C library's product and sum do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from ...formats import ggml
from ...formats.ggml.iq4 import TABLE
from ..capability import interpreted, triton_refusal
from ..scratch import scratch

if TYPE_CHECKING:
    from . import UnpackCall

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_WARPS = 4
STORES = 4  # of 16 bytes, by one thread


def supports(call: UnpackCall) -> str | None:
    """The reason this implementation cannot run the call, or None."""
    if reason := blocks_refusal(call.blocks, call.ggml_type):
        return reason
    return None if call.dtype in DTYPES else f"writes bf16, fp16 and fp32, not {call.dtype}"


def blocks_refusal(blocks: torch.Tensor, ggml_type: str) -> str | None:
    """What every kernel on GGML blocks refuses, or None."""
    if reason := triton_refusal(blocks.device):
        return reason
    return None if ggml_type in DECODERS else f"has no decoder for {ggml_type}, only for {', '.join(DECODERS)}"


def run(call: UnpackCall) -> torch.Tensor:
    blocks = aligned(call.blocks)
    # The interpreter cuts a float32 off to bfloat16 where a device rounds it.
    dtype = torch.float32 if interpreted() else call.dtype
    shape = (blocks.shape[0], ggml.logical_K(call.ggml_type, blocks.shape[1]))
    w = (scratch if call.in_scratch else empty)(shape, dtype, blocks.device)
    if w.numel():
        launch(blocks, call.ggml_type, w, STORES, NUM_WARPS)
    return w.to(call.dtype)


def launch(blocks: torch.Tensor, ggml_type: str, w: torch.Tensor, stores: int, num_warps: int) -> None:
    decoder = DECODERS[ggml_type]
    units = w.numel() // decoder.unit_elements
    tile = decoder.tile(w.element_size(), stores, num_warps)
    with torch.cuda.device_of(w):
        _unpack_kernel[(triton.cdiv(units, tile["UNITS"] * tile["TILES"]),)](
            blocks, w, units, num_warps=num_warps, **tile, **decoder.constants(ggml_type)
        )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def aligned(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks one after another from an address that is a multiple of 16: a copy where they lie otherwise."""
    blocks = blocks.contiguous()
    return blocks if blocks.data_ptr() % 16 == 0 else blocks.clone()


class Decoder(NamedTuple):
    """How a type's blocks are cut into units, and the function that decodes them.

    decode(block, unit, i) -> a tuple of PLANES float32 [UNITS, RUN]; block: pointers [UNITS, 1] to the first bytes of
    the blocks, multiples of the largest power of two in the type's size; unit: [UNITS, 1], counted within the block;
    i: [1, RUN].
    """

    decode: triton.JITFunction
    run: int
    planes: int
    split: int = 1

    @property
    def unit_elements(self) -> int:
        return self.run * self.planes

    def tile(self, element_size: int, stores: int, num_warps: int) -> dict:
        """Tiles whose units give each thread 16 bytes of a plane to store, and as many of them as make `stores`."""
        return {"UNITS": 16 // element_size * 32 * num_warps // self.run, "TILES": max(1, stores // self.planes)}

    def constants(self, ggml_type: str) -> dict:
        """What a kernel has to know of the type."""
        stored = ggml.TYPES[ggml_type]
        return {
            "DECODE": self.decode,
            "TYPE_SIZE": stored.type_size,
            "BLOCK_UNITS": stored.block_size // self.unit_elements,
            "RUN": self.run,
            "PLANES": self.planes,
            "SPLIT": self.split,
        }


@triton.jit(do_not_specialize=["units"])
def _unpack_kernel(
    blocks_ptr,
    w_ptr,
    units,
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
    w_ptr += start.to(tl.int64) * (PLANES * RUN)
    i = tl.arange(0, RUN)[None, :]
    for tile in tl.static_range(TILES):
        # Units beyond the end are the last one again, decoded and stored once more: no load or store needs a mask.
        unit = tl.minimum(tile * UNITS + tl.arange(0, UNITS)[:, None], units - 1 - start)
        values = DECODE(blocks_ptr + unit // BLOCK_UNITS * TYPE_SIZE, unit % BLOCK_UNITS, i)
        w_ptrs = w_ptr + first_element(unit, RUN, PLANES, SPLIT) + i
        for plane in tl.static_range(PLANES):
            tl.store(w_ptrs + plane * SPLIT * RUN, values[plane].to(w_ptr.dtype.element_ty))


@triton.jit
def first_element(unit, RUN: tl.constexpr, PLANES: tl.constexpr, SPLIT: tl.constexpr):
    """The element of plane 0 where each unit begins."""
    return unit // SPLIT * (SPLIT * PLANES * RUN) + unit % SPLIT * RUN


# Decoders: the layouts are drawn in formats/ggml


@triton.jit
def _float16(ptr):
    return tl.load(ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _bytes(ptr):
    return tl.load(ptr).to(tl.int32)


@triton.jit
def _signed_bytes(ptr):
    return tl.load(ptr.to(tl.pointer_type(tl.int8))).to(tl.float32)


@triton.jit
def _q8_0(block, unit, i):
    return (_signed_bytes(block + 2 + i) * _float16(block),)


@triton.jit
def _q4_0(block, unit, i):
    scale = _float16(block)
    nibbles = _bytes(block + 2 + i)
    return ((nibbles & 15).to(tl.float32) - 8.0) * scale, ((nibbles >> 4).to(tl.float32) - 8.0) * scale


@triton.jit
def _q4_1(block, unit, i):
    scale, offset = _float16(block), _float16(block + 2)
    nibbles = _bytes(block + 4 + i)
    return tl.fma((nibbles & 15).to(tl.float32), scale, offset), tl.fma((nibbles >> 4).to(tl.float32), scale, offset)


@triton.jit
def _five_bits(high_ptr, i):
    """The codes of a Q5_0 or Q5_1 block: 4 bytes of high bits, then the nibbles."""
    high_ptr = high_ptr.to(tl.pointer_type(tl.uint16))
    nibbles = _bytes(high_ptr.to(tl.pointer_type(tl.uint8)) + 4 + i)
    low = (nibbles & 15) | (((tl.load(high_ptr).to(tl.int32) >> i) & 1) << 4)
    high = (nibbles >> 4) | (((tl.load(high_ptr + 1).to(tl.int32) >> i) & 1) << 4)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _q5_0(block, unit, i):
    scale = _float16(block)
    low, high = _five_bits(block + 2, i)
    return (low - 16.0) * scale, (high - 16.0) * scale


@triton.jit
def _q5_1(block, unit, i):
    scale, offset = _float16(block), _float16(block + 2)
    low, high = _five_bits(block + 4, i)
    return tl.fma(low, scale, offset), tl.fma(high, scale, offset)


@triton.jit
def _q2_k_plane(block, half, side, two, PLANE: tl.constexpr):
    scale_codes = _bytes(block + 8 * half + 2 * PLANE + side)
    scale = _float16(block + 80) * (scale_codes & 15).to(tl.float32)
    minimum = _float16(block + 82) * (scale_codes >> 4).to(tl.float32)
    return tl.fma(((two >> (2 * PLANE)) & 3).to(tl.float32), scale, -minimum)


@triton.jit
def _q2_k(block, unit, i):
    half, side = unit // 2, unit % 2
    two = _bytes(block + 16 + 32 * half + 16 * side + i)
    return (
        _q2_k_plane(block, half, side, two, 0),
        _q2_k_plane(block, half, side, two, 1),
        _q2_k_plane(block, half, side, two, 2),
        _q2_k_plane(block, half, side, two, 3),
    )


@triton.jit
def _q3_k_plane(block, half, side, two, high, PLANE: tl.constexpr):
    scale_low = _bytes(block + 96 + 2 * PLANE + side) >> (4 * half)
    scale_high = _bytes(block + 104 + 2 * (PLANE % 2) + side) >> (4 * half + 2 * (PLANE // 2))
    six = (scale_low & 15) | ((scale_high & 3) << 4)
    code = ((two >> (2 * PLANE)) & 3) | (((high >> PLANE) & 1) << 2)
    return (code.to(tl.float32) - 4.0) * (_float16(block + 108) * (six.to(tl.float32) - 32.0))


@triton.jit
def _q3_k(block, unit, i):
    half, side = unit // 2, unit % 2
    two = _bytes(block + 32 + 32 * half + 16 * side + i)
    high = _bytes(block + 16 * side + i) >> (4 * half)
    return (
        _q3_k_plane(block, half, side, two, high, 0),
        _q3_k_plane(block, half, side, two, high, 1),
        _q3_k_plane(block, half, side, two, high, 2),
        _q3_k_plane(block, half, side, two, high, 3),
    )


@triton.jit
def _scales_of_half(block, half):
    """The sc of four neighbouring blocks in the bytes of one word [UNITS, 1], the m likewise (Q4_K and Q5_K)."""
    words = block.to(tl.pointer_type(tl.uint32))
    first, second, rest = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    sc = tl.where(half == 0, first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | ((first >> 2) & 0x30303030))
    m = tl.where(half == 0, second & 0x3F3F3F3F, ((rest >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030))
    return sc, m


@triton.jit
def _byte_of(words, BYTE: tl.constexpr):
    return ((words >> (8 * BYTE)) & 255).to(tl.float32)


@triton.jit
def _nibble_at(words, SHIFT: tl.constexpr):
    """Bits SHIFT ... SHIFT + 3 as float32: put into the mantissa of 2**(23 - SHIFT), where bit SHIFT counts 1.

    That power comes from a register: the compiler masks and sets in one instruction then, with two constants in two.
    """
    power = tl.num_programs(2) * ((150 - SHIFT) << 23)
    return ((words & (15 << SHIFT)) | power).to(tl.float32, bitcast=True) - float(1 << (23 - SHIFT))


@triton.jit
def _q4_k_plane(words, sc, m, d, dmin, PLANE: tl.constexpr):
    """words: uint32 [UNITS, 8] with the codes of this plane and of a neighbour -> float32 [UNITS, 32]."""
    shift: tl.constexpr = 4 * (PLANE % 2)
    upper = words >> 16
    bytes_02 = tl.join(_nibble_at(words, shift), _nibble_at(upper, shift))
    bytes_13 = tl.join(_nibble_at(words, shift + 8), _nibble_at(upper, shift + 8))
    codes = tl.reshape(tl.join(bytes_02, bytes_13), (words.shape[0], 32))
    return tl.fma(codes, d * _byte_of(sc, PLANE), -dmin * _byte_of(m, PLANE))


@triton.jit
def _q4_k(block, unit, i):
    d, dmin = _float16(block), _float16(block + 2)
    sc, m = _scales_of_half(block, unit)
    words = (block + 16 + 64 * unit).to(tl.pointer_type(tl.uint32)) + tl.arange(0, 8)[None, :]
    first, second = tl.load(words), tl.load(words + 8)
    return (
        _q4_k_plane(first, sc, m, d, dmin, 0),
        _q4_k_plane(first, sc, m, d, dmin, 1),
        _q4_k_plane(second, sc, m, d, dmin, 2),
        _q4_k_plane(second, sc, m, d, dmin, 3),
    )


@triton.jit
def _q5_k_plane(nibbles, high, sc, m, d, dmin, PLANE: tl.constexpr):
    code = nibbles | (((high >> PLANE) & 1) << 4)
    return tl.fma(code.to(tl.float32), d * _byte_of(sc, PLANE), -dmin * _byte_of(m, PLANE))


@triton.jit
def _q5_k(block, unit, i):
    d, dmin = _float16(block), _float16(block + 2)
    sc, m = _scales_of_half(block, unit)
    high = _bytes(block + 16 + i) >> (4 * unit)
    first, second = _bytes(block + 48 + 64 * unit + i), _bytes(block + 80 + 64 * unit + i)
    return (
        _q5_k_plane(first & 15, high, sc, m, d, dmin, 0),
        _q5_k_plane(first >> 4, high, sc, m, d, dmin, 1),
        _q5_k_plane(second & 15, high, sc, m, d, dmin, 2),
        _q5_k_plane(second >> 4, high, sc, m, d, dmin, 3),
    )


@triton.jit
def _q6_k_plane(block, half, side, nibbles, two, PLANE: tl.constexpr):
    scale = _float16(block + 208) * _signed_bytes(block + 192 + 8 * half + 2 * PLANE + side)
    code = nibbles | (((two >> (2 * PLANE)) & 3) << 4)
    return (code.to(tl.float32) - 32.0) * scale


@triton.jit
def _q6_k(block, unit, i):
    half, side = unit // 2, unit % 2
    first = _bytes(block + 64 * half + 16 * side + i)
    second = _bytes(block + 64 * half + 32 + 16 * side + i)
    two = _bytes(block + 128 + 32 * half + 16 * side + i)
    return (
        _q6_k_plane(block, half, side, first & 15, two, 0),
        _q6_k_plane(block, half, side, second & 15, two, 1),
        _q6_k_plane(block, half, side, first >> 4, two, 2),
        _q6_k_plane(block, half, side, second >> 4, two, 3),
    )


def _packed(values: tuple[int, ...]) -> tl.constexpr:
    return tl.constexpr(int.from_bytes(bytes(value & 255 for value in values), "little", signed=True))


# The table of IQ4 as two int64 of eight signed bytes: shifts look a value up without memory.
_TABLE_LOW = _packed(TABLE[:8])
_TABLE_HIGH = _packed(TABLE[8:])


@triton.jit
def _look_up(code):
    table = tl.where(code < 8, _TABLE_LOW, _TABLE_HIGH)
    return (table >> ((code & 7) * 8).to(tl.int64)).to(tl.int8).to(tl.float32)


@triton.jit
def _table_values(nibbles_ptr):
    """The values of the low and of the high nibbles."""
    # A zero that the compiler does not know of keeps it from packing pairs of codes, which costs the look-up a fifth.
    nibbles = _bytes(nibbles_ptr) | (tl.num_programs(2) - 1)
    return _look_up(nibbles & 15), _look_up(nibbles >> 4)


@triton.jit
def _iq4_nl(block, unit, i):
    scale = _float16(block)
    low, high = _table_values(block + 2 + i)
    return low * scale, high * scale


@triton.jit
def _iq4_xs(block, unit, i):
    six_high = tl.load((block + 2).to(tl.pointer_type(tl.uint16))).to(tl.int32) >> (2 * unit)
    six_low = _bytes(block + 4 + unit // 2) >> (4 * (unit % 2))
    scale = _float16(block) * (((six_low & 15) | ((six_high & 3) << 4)).to(tl.float32) - 32.0)
    low, high = _table_values(block + 8 + 16 * unit + i)
    return low * scale, high * scale


DECODERS = {
    "Q4_0": Decoder(_q4_0, run=16, planes=2),
    "Q4_1": Decoder(_q4_1, run=16, planes=2),
    "Q5_0": Decoder(_q5_0, run=16, planes=2),
    "Q5_1": Decoder(_q5_1, run=16, planes=2),
    "Q8_0": Decoder(_q8_0, run=32, planes=1),
    "Q2_K": Decoder(_q2_k, run=16, planes=4, split=2),
    "Q3_K": Decoder(_q3_k, run=16, planes=4, split=2),
    "Q4_K": Decoder(_q4_k, run=32, planes=4),
    "Q5_K": Decoder(_q5_k, run=32, planes=4),
    "Q6_K": Decoder(_q6_k, run=16, planes=4, split=2),
    "IQ4_NL": Decoder(_iq4_nl, run=16, planes=2),
    "IQ4_XS": Decoder(_iq4_xs, run=16, planes=2),
}
