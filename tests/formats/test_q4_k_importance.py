"""Q4_K with the importance of input channels: what it gains where it counts, and what it leaves alone."""

import pytest
import torch
from lowbit.formats import ggml

CLASSES = {
    "gaussian": slice(0, 16),
    "heavy_tailed": slice(16, 32),
    "outlier_columns": slice(32, 40),
    "ramp": slice(43, 44),
    "absolute": slice(44, 45),
    "large": slice(46, 47),
    "lone_spike": slice(47, 48),
    "rest": slice(48, 96),
}
SEEDS = range(4)


def importance(K: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Mean squares of activations whose logarithm is normal."""
    return torch.exp(spread * torch.randn(K, generator=torch.Generator().manual_seed(seed)))


def loud_channels(K: int, seed: int) -> torch.Tensor:
    """One channel in a hundred is ten times as loud as the others, as in inputs of `feed_forward.w2`."""
    weights, generator = importance(K, 0.5, seed), torch.Generator().manual_seed(100 + seed)
    weights[torch.randperm(K, generator=generator)[: K // 100]] *= 100
    return weights


KINDS = {
    "0.3": lambda seed: importance(768, 0.3, seed),
    "0.5": lambda seed: importance(768, 0.5, seed),
    "1.0": lambda seed: importance(768, 1.0, seed),
    "2.0": lambda seed: importance(768, 2.0, seed),
    "loud": lambda seed: loud_channels(768, seed),
}


def weighted_sqnr_db(values: torch.Tensor, blocks: torch.Tensor, weights: torch.Tensor) -> float:
    error = ggml.dequantize(blocks, "Q4_K").double() - values
    return float(10 * torch.log10((values.double() ** 2 * weights).sum() / (error**2 * weights).sum()))


# Least gain of four importances in dB, in the order of KINDS: over what the C library writes, which is what a publisher
# would use instead, and over ourselves without importance. Floors lie a little under what was measured. Of the ramp
# most blocks lie far from 0 and use two or three codes: at 0.3 unrounded scales would gain 0.21 dB over C.
OVER_C = {
    "gaussian": (0.30, 0.43, 1.03, 3.6, 1.95),
    "heavy_tailed": (0.34, 0.44, 1.01, 3.6, 2.1),
    "outlier_columns": (0.38, 0.43, 0.74, 1.9, 1.65),
    "ramp": (0.07, 0.11, 0.20, 0.43, 0.31),
    "absolute": (0.47, 0.55, 1.1, 3.6, 2.2),
    "large": (0.26, 0.32, 0.89, 3.2, 1.9),
    "lone_spike": (0.41, 0.43, 0.82, 2.8, 0.9),
    "rest": (0.31, 0.44, 1.06, 3.5, 2.1),
}
OVER_NONE = {
    "gaussian": (0.04, 0.16, 0.74, 3.2, 1.65),
    "heavy_tailed": (0.05, 0.16, 0.75, 3.3, 1.7),
    "outlier_columns": (0.04, 0.07, 0.38, 1.6, 1.35),
    "ramp": (0.0, 0.02, 0.32, 0.89, 0.13),
    "absolute": (0.03, 0.13, 0.66, 3.3, 1.4),
    "large": (0.04, 0.11, 0.54, 2.4, 1.85),
    "lone_spike": (-1e-4, 0.04, 0.39, 2.2, 0.25),
    "rest": (0.05, 0.17, 0.82, 3.3, 1.85),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", CLASSES)
def test_weighted_error_falls(golden, rows, kind):
    values = torch.from_numpy(golden["src"])[CLASSES[rows]]
    blocks_of_c, without = torch.from_numpy(golden["Q4_K_bytes"])[CLASSES[rows]], ggml.quantize(values, "Q4_K")
    over_c, over_none = [], []
    for seed in SEEDS:
        weights = KINDS[kind](seed)
        got_db = weighted_sqnr_db(values, ggml.quantize(values, "Q4_K", weights), weights)
        over_c.append(got_db - weighted_sqnr_db(values, blocks_of_c, weights))
        over_none.append(got_db - weighted_sqnr_db(values, without, weights))
    column = list(KINDS).index(kind)
    assert min(over_c) > OVER_C[rows][column], over_c
    assert min(over_none) > OVER_NONE[rows][column], over_none


def unrounded_error(values: torch.Tensor, weights: torch.Tensor) -> float:
    """The least weighted squared error, summed, of blocks of 32 whose scale and min may be any numbers >= 0.

    values, weights: float64 [n, 32]. From 2,025 starts a block, each improved twice; twice as many: 0.01 dB less.
    """
    low = values.amin(dim=1, keepdim=True).clamp(max=0)
    span = values.amax(dim=1, keepdim=True) - low
    total = weights.sum(dim=1, keepdim=True)
    mean = (weights * values).sum(dim=1, keepdim=True) / total
    least = torch.full_like(mean, torch.inf)
    for low_code in torch.linspace(-3, 1.4, 45, dtype=torch.float64):
        scale = span / (torch.linspace(13.6, 18, 45, dtype=torch.float64) - low_code)  # [n, starts]
        minimum = (low_code * scale - low).clamp(min=0)
        for _ in range(2):
            shifted = values[:, None, :] + minimum[..., None]
            codes = (shifted / scale[..., None]).round().clamp(0, 15)
            weighted = weights[:, None, :] * codes
            q, qq, qx = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * values[:, None, :]).sum(-1)
            scale = (qx - q * mean) / (qq - q * q / total)
            minimum = scale * q / total - mean
            scale, minimum = torch.where(minimum < 0, qx / qq, scale), minimum.clamp(min=0)
            differences = codes * scale[..., None] - minimum[..., None] - values[:, None, :]
            error = (weights[:, None, :] * differences**2).sum(-1)
            least = torch.minimum(least, error.amin(dim=1, keepdim=True))
    return float(least.sum())


@pytest.mark.parametrize("spread, seed, below_db", [
    (0.0, 0, 0.11), (0.3, 0, 0.11), (0.3, 1, 0.11), (0.5, 0, 0.12), (0.5, 1, 0.12), (1.0, 0, 0.19), (1.0, 1, 0.19),
])  # fmt: skip
@pytest.mark.parametrize("rows", ["gaussian", "heavy_tailed"])
def test_error_is_near_the_least_possible(golden, rows, spread, seed, below_db):
    """Six bits for scale and min cost little, and a narrow importance cannot gain 0.2 dB over none at all."""
    values, weights = torch.from_numpy(golden["src"])[CLASSES[rows]][:6], importance(768, spread, seed)
    signal = (values.double() ** 2 * weights).sum()
    of_elements = weights.double().expand_as(values).reshape(-1, 32)
    bound_db = float(10 * torch.log10(signal / unrounded_error(values.double().reshape(-1, 32), of_elements)))
    got_db = weighted_sqnr_db(values, ggml.quantize(values, "Q4_K", weights), weights)
    assert bound_db - below_db < got_db < bound_db
    if spread == 0.3:
        assert bound_db - weighted_sqnr_db(values, ggml.quantize(values, "Q4_K"), weights) < 0.2


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
    from lowbit.formats.ggml import q4_k

    values, weights = torch.from_numpy(golden["src"])[:8].bfloat16(), importance(768, 1.0)
    expected = ggml.quantize(values.float(), "Q4_K", weights)
    assert torch.equal(ggml.quantize(values.view(2, 4, 768), "Q4_K", weights).view(8, -1), expected)
    monkeypatch.setattr(q4_k, "PIECE", 5)
    assert torch.equal(ggml.quantize(values, "Q4_K", weights), expected)
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
