import pytest
import torch
from lowbit.formats import chunks, ggml, int8
from lowbit.kernels import unpack_to_int8 as op
from lowbit.kernels.dispatch import use_implementation
from lowbit.kernels.unpack_to_int8 import unpack_to_int8
from lowbit.tests.kernels.comparing import (
    INTERPRETER_WARNING,
    assert_grids_fit,
    assert_nearly_the_same_codes,
    assert_same_codes,
    by,
)
from lowbit.tests.kernels.test_unpack import ROWS, TYPES, golden, random_blocks

# NaN and infinite scales are meant.
pytestmark = pytest.mark.filterwarnings(INTERPRETER_WARNING, "ignore:invalid value encountered:RuntimeWarning")


def absmax_scale(values):
    """On the CPU: CUDA turns a division by a number into a product with its reciprocal."""
    return (values.abs().amax(1, keepdim=True).cpu() / 127).clamp(min=1e-30).to(values.device)


def codes(values, row_scale):
    return (values * (1.0 / row_scale)).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_int8_rows_are_the_rounded_values(implementation, ggml_type, device, poison_empty):
    blocks, values = (tensor[ROWS] for tensor in golden(ggml_type, device))
    wq, row_scale = by(implementation, unpack_to_int8, blocks, ggml_type)
    expected = absmax_scale(values)
    assert_same_codes((wq, row_scale), (codes(values, expected), expected))
    again, kept = by(implementation, unpack_to_int8, blocks, ggml_type, row_scale)
    assert torch.equal(again, wq) and kept is row_scale


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_a_given_scale_is_taken_as_it_is(implementation, device, poison_empty):
    """Three times what the row needs. Every other row's scale of a longer tensor: strided."""
    blocks, values = (tensor[:7] for tensor in golden("Q4_K", device))
    row_scale = (absmax_scale(values) * 3).repeat_interleave(2, dim=0)[::2]
    wq, kept = by(implementation, unpack_to_int8, blocks, "Q4_K", row_scale)
    assert torch.equal(wq, codes(values, row_scale)) and kept is row_scale
    assert int(wq.abs().amax()) == 42


@pytest.mark.parametrize("ggml_type", TYPES)
def test_random_bytes_give_the_same_rows(ggml_type, device, poison_empty):
    """Rows that end within a tile; a NaN or an infinity spoils its own row alone, and shows in that row's scale."""
    blocks = random_blocks(ggml_type, device)
    expected = by("reference", unpack_to_int8, blocks, ggml_type)
    wq, row_scale = by("triton_impl", unpack_to_int8, blocks, ggml_type)
    finite = expected[1].isfinite().squeeze(1)
    assert finite.any() and not finite.all() and torch.equal(row_scale.isfinite().squeeze(1), finite)
    assert_same_codes((wq[finite], row_scale[finite]), (expected[0][finite], expected[1][finite]))
    assert int(wq[finite].min()) >= -127


@pytest.mark.parametrize("rows, blocks", [(1, 8), (3, 1), (1, 67), (65, 2), (0, 2)])
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K", "Q6_K"])
def test_any_number_of_blocks(ggml_type, rows, blocks, device, poison_empty):
    finite = ggml.quantize(torch.randn(rows, blocks * 256, generator=torch.Generator().manual_seed(0)), "Q8_0")
    blocks = finite.to(device) if ggml_type == "Q8_0" else random_blocks(ggml_type, device, rows, blocks)
    expected = by("reference", unpack_to_int8, blocks, ggml_type)
    wq, row_scale = by("triton_impl", unpack_to_int8, blocks, ggml_type)
    kept = expected[1].isfinite().squeeze(1)
    assert_same_codes((wq[kept], row_scale[kept]), (expected[0][kept], expected[1][kept]))


def test_rows_of_zeros_get_zeros_and_a_positive_scale(device):
    blocks = torch.zeros(3, 288, dtype=torch.uint8, device=device)
    for implementation in op.OP.implementations:
        for rotation_group in (0, 256):
            wq, row_scale = by(implementation, unpack_to_int8, blocks, "Q4_K", None, rotation_group)
            assert not wq.any() and torch.equal(row_scale, torch.full_like(row_scale, 1e-30))


@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_blocks_may_lie_anyhow(implementation, ggml_type, device, poison_empty):
    blocks = next(iter(golden(ggml_type, device)))[:6]
    expected = by("reference", unpack_to_int8, blocks, ggml_type)
    at_odd_address = torch.cat((blocks.new_zeros(1), blocks.flatten()))[1:].view(blocks.shape)
    every_other_row = torch.stack((blocks, blocks), dim=1)[:, 0]
    for lying in (at_odd_address, every_other_row, blocks.t().contiguous().t()):
        assert_same_codes(by(implementation, unpack_to_int8, lying, ggml_type), expected)


def test_in_chunks_the_reference_gives_the_same(device, monkeypatch):
    blocks, _ = golden("Q4_K", device)
    whole = by("reference", unpack_to_int8, blocks, "Q4_K", None, 256)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 768 * 7)
    assert_same_codes(by("reference", unpack_to_int8, blocks, "Q4_K", None, 256), whole)


# Rotated


@pytest.mark.parametrize("rotation_group", [16, 64, 256])
def test_the_definition_rotates_the_values_first(rotation_group, device):
    blocks, values = golden("Q4_K", device)
    rotated = int8.rotate(values, rotation_group)
    expected = absmax_scale(rotated)
    assert_same_codes(
        by("reference", unpack_to_int8, blocks, "Q4_K", None, rotation_group), (codes(rotated, expected), expected)
    )


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rotated_rows_are_the_definitions(ggml_type, device, poison_empty):
    """Sums in another order: a code may differ by 1 where a value lies between two."""
    blocks = next(iter(golden(ggml_type, device)))[ROWS]
    expected = by("reference", unpack_to_int8, blocks, ggml_type, None, 256)
    found = by("triton_impl", unpack_to_int8, blocks, ggml_type, None, 256)
    assert_nearly_the_same_codes(found, expected)
    given = by("triton_impl", unpack_to_int8, blocks, ggml_type, expected[1], 256)
    assert_nearly_the_same_codes(given, expected)


@pytest.mark.parametrize("implementation", op.OP.implementations)
def test_rotated_activations_meet_the_same_weight(implementation, device):
    """x w.T and rotate(x) rotate(w).T are one product."""
    blocks, values = (tensor[:16] for tensor in golden("Q8_0", device))
    wq, row_scale = by(implementation, unpack_to_int8, blocks, "Q8_0", None, 256)
    x = torch.randn(8, 768, generator=torch.Generator().manual_seed(1)).to(device)
    y = int8.rotate(x, 256) @ (wq * row_scale).t()
    expected = x @ values.t()
    assert 1e-4 < float((y - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("rows, groups", [(1, 1), (5, 3), (2, 9), (1, 18)])
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_any_number_of_groups(ggml_type, rows, groups, device, poison_empty):
    blocks = random_blocks(ggml_type, device, rows, groups * (256 // ggml.TYPES[ggml_type].block_size))
    expected = by("reference", unpack_to_int8, blocks, ggml_type, None, 256)
    wq, row_scale = by("triton_impl", unpack_to_int8, blocks, ggml_type, None, 256)
    kept = expected[1].isfinite().squeeze(1)
    assert torch.equal(row_scale.isfinite().squeeze(1), kept)
    assert not kept.any() or int(wq[kept].min()) >= -127
    assert_nearly_the_same_codes((wq[kept], row_scale[kept]), (expected[0][kept], expected[1][kept]))


# Limits


@pytest.mark.triton
def test_what_triton_does_not_rotate_the_reference_does(device):
    blocks = next(iter(golden("Q4_K", device)))[:4]
    with use_implementation("triton_impl"):
        reason = op.OP.refusals(op.UnpackToInt8Call(blocks, "Q4_K", None, 64))["triton_impl"]
    assert reason == "rotates groups of 256, found 64"
    assert_same_codes(
        unpack_to_int8(blocks, "Q4_K", rotation_group=64), by("reference", unpack_to_int8, blocks, "Q4_K", None, 64)
    )


@pytest.mark.triton
@pytest.mark.parametrize("rotation_group", [0, 256])
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_K"])
def test_the_largest_linears_grids_fit(ggml_type, rotation_group, monkeypatch):
    stored = ggml.TYPES[ggml_type]
    blocks = torch.empty(4608, 53248 // stored.block_size * stored.type_size, dtype=torch.uint8, device="meta")
    row_scale = torch.empty(4608, 1, device="meta")
    assert_grids_fit(monkeypatch, op, op.UnpackToInt8Call(blocks, ggml_type, row_scale, rotation_group))


def test_what_does_not_fit_is_refused():
    blocks = torch.zeros(4, 144, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"needs uint8 blocks \[N, row bytes\], got torch.uint8 \(144,\)"):
        unpack_to_int8(blocks[0], "Q4_K")
    with pytest.raises(ValueError, match=r"needs uint8 blocks \[N, row bytes\], got torch.uint8 \(4, 0\)"):
        unpack_to_int8(blocks[:, :0], "Q4_K")
    with pytest.raises(ValueError, match=r"row_scale must be float32 \[4, 1\], got torch.float32 \(4,\)"):
        unpack_to_int8(blocks, "Q4_K", torch.ones(4))
    with pytest.raises(ValueError, match=r"row_scale must be float32 \[4, 1\], got torch.float16 \(4, 1\)"):
        unpack_to_int8(blocks, "Q4_K", torch.ones(4, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="rotation group 1024 does not divide K=256"):
        unpack_to_int8(blocks, "Q4_K", rotation_group=1024)
    with pytest.raises(ValueError, match="a rotation group has 4, 16, 64, 256"):
        unpack_to_int8(blocks, "Q4_K", rotation_group=32)
