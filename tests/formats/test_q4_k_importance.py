"""Q4_K with the importance of input channels: what it gains where it counts, and what it leaves alone."""

import pytest
import torch
from lowbit.formats import ggml

CLASSES = {"gaussian": slice(0, 16), "heavy_tailed": slice(16, 32), "outlier_columns": slice(32, 40)}


def importance(K: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Mean squares of activations whose logarithm is normal."""
    return torch.exp(spread * torch.randn(K, generator=torch.Generator().manual_seed(seed)))


def weighted_sqnr_db(values: torch.Tensor, blocks: torch.Tensor, weights: torch.Tensor) -> float:
    error = ggml.dequantize(blocks, "Q4_K").double() - values
    return float(10 * torch.log10((values.double() ** 2 * weights).sum() / (error**2 * weights).sum()))


# Narrower importances leave less to gain, and a huge weight in an outlier column dominates its block either way.
@pytest.mark.parametrize("rows, spread, gain_db", [
    ("gaussian", 1.0, 0.6), ("gaussian", 2.0, 2.5), ("heavy_tailed", 1.0, 0.6), ("heavy_tailed", 2.0, 2.5),
    ("outlier_columns", 1.0, 0.2), ("outlier_columns", 2.0, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_weighted_error_falls(golden, rows, spread, gain_db, seed):
    values = torch.from_numpy(golden["src"])[CLASSES[rows]]
    weights = importance(values.shape[1], spread, seed)
    without = weighted_sqnr_db(values, ggml.quantize(values, "Q4_K"), weights)
    with_importance = weighted_sqnr_db(values, ggml.quantize(values, "Q4_K", weights), weights)
    by_c = weighted_sqnr_db(values, torch.from_numpy(golden["Q4_K_bytes"])[CLASSES[rows]], weights)
    assert with_importance > without + gain_db
    assert with_importance > by_c + gain_db


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_no_super_block_is_worse_than_without(channels):
    """A few channels that count a million times as much as the others must not spoil the super-blocks they lie in."""
    generator = torch.Generator().manual_seed(channels)
    values, mean_square = torch.randn(64, 4608, generator=generator), torch.ones(4608)
    mean_square[torch.randperm(4608, generator=generator)[:channels]] = 1e6

    def errors(blocks):
        error = ggml.dequantize(blocks, "Q4_K").double() - values
        return (error**2 * mean_square).view(-1, 256).sum(dim=1)

    without, with_importance = (errors(ggml.quantize(values, "Q4_K", w)) for w in (None, mean_square))
    # The two are compared in float32: what it calls equal may differ by its rounding.
    assert (with_importance <= without * (1 + 1e-6)).all()
    assert with_importance.sum() < 0.1 * without.sum()


def test_equal_importance_is_no_worse_than_none(golden):
    """It searches further, so it may find better scales."""
    values, ones = torch.from_numpy(golden["src"])[:32], torch.ones(768)
    assert weighted_sqnr_db(values, ggml.quantize(values, "Q4_K", ones), ones) >= weighted_sqnr_db(
        values, ggml.quantize(values, "Q4_K"), ones
    )


def test_only_ratios_count_and_zeros_stand_for_nothing_known(golden):
    values, weights = torch.from_numpy(golden["src"])[:32], importance(768, 1.0)
    expected = ggml.quantize(values, "Q4_K", weights)
    assert torch.equal(ggml.quantize(values, "Q4_K", weights * 2.0**60), expected)
    assert torch.equal(ggml.quantize(values, "Q4_K", weights.double() * 2.0**-200), expected)
    everywhere_zero = ggml.quantize(values, "Q4_K", torch.zeros(768))
    assert torch.equal(everywhere_zero, ggml.quantize(values, "Q4_K", torch.ones(768)))


@pytest.mark.parametrize("kind", ["one_channel", "whole_block", "golden_oddities"])
def test_extreme_importance_keeps_unimportant_weights_sane(golden, kind):
    """A channel that calibration never used must not become nonsense: its error stays within the block's range."""
    values, weights = torch.from_numpy(golden["src"])[:16], torch.full((768,), 1e-30)
    if kind == "one_channel":
        weights[5] = 1e30
    elif kind == "whole_block":
        weights[:32] = 1.0
    else:
        values = torch.from_numpy(golden["src"])[40:48]
        weights = importance(768, 3.0)
    restored = ggml.dequantize(ggml.quantize(values, "Q4_K", weights), "Q4_K")
    assert torch.isfinite(restored).all()
    spans = values.view(-1, 32).amax(dim=1).clamp(min=0) - values.view(-1, 32).amin(dim=1).clamp(max=0)
    errors = (restored - values).abs().view(-1, 32).amax(dim=1)
    assert (errors <= spans + 1e-3 * values.abs().max()).all()


def test_rows_chunks_and_dtypes_do_not_matter(golden, monkeypatch):
    from lowbit.formats import chunks

    values, weights = torch.from_numpy(golden["src"])[:8].bfloat16(), importance(768, 1.0)
    expected = ggml.quantize(values.float(), "Q4_K", weights)
    assert torch.equal(ggml.quantize(values.view(2, 4, 768), "Q4_K", weights).view(8, -1), expected)
    monkeypatch.setattr(chunks, "chunk_elements", lambda device: 256)  # one super-block a chunk
    assert torch.equal(ggml.quantize(values, "Q4_K", weights), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"])
def test_other_types_ignore_it(golden, name):
    values = torch.from_numpy(golden["src"])[:32]
    assert torch.equal(ggml.quantize(values, name, importance(768, 2.0)), ggml.quantize(values, name))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_refuses_what_is_no_importance(name):
    values = torch.ones(2, 256)
    with pytest.raises(ValueError, match=r"floating point \[256\] \(K=256\), found float32 \[255\]"):
        ggml.quantize(values, name, torch.ones(255))
    with pytest.raises(ValueError, match=r"found int64 \[256\]"):
        ggml.quantize(values, name, torch.ones(256, dtype=torch.int64))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            ggml.quantize(values, name, torch.ones(256).index_fill(0, torch.tensor([3]), wrong))
