"""Smoothing: powers of two, folded so that nothing is lost, and worth it for INT8."""

import dataclasses
import json

import pytest
import torch
from host_harness import small_models as small
from lowbit.convert.record import LayerActivations, read_activation_record, write_activation_record
from lowbit.convert.smoothing import find_folds, smoothing_factors
from lowbit.convert.source import floats_of as rows_of
from lowbit.loaders.branch import load_branch
from lowbit.tests.convert.making import BLOCK_LINEARS, floats_of, meant_by_int8, metadata_of, spiky_record, to_int8

EVERYTHING = slice(0, None)


def folded(weights: dict[str, torch.Tensor], factors) -> dict[str, torch.Tensor]:
    """The float model with the factors folded in."""
    result = dict(weights)
    for key, factor in factors.items():
        shape = weights[key].shape
        result[key] = factor.apply(rows_of(weights[key], EVERYTHING), EVERYTHING).reshape(shape)
    return result


@pytest.fixture
def record(tmp_path):
    return read_activation_record(spiky_record(tmp_path / "record.safetensors"))


def test_folds_of_the_blocks():
    folds = find_folds(small.ideogram4())
    assert [fold.producer for fold in folds[:4]] == [
        "layers.0.attention_norm1", "layers.0.attention.qkv", "layers.0.ffn_norm1", "layers.0.feed_forward.w3",
    ]  # fmt: skip
    assert len(folds) == 8
    consumers = [name for fold in folds for name in fold.consumers]
    assert sorted(consumers) == sorted(BLOCK_LINEARS)
    assert [fold.first_row for fold in folds[:4]] == [0, 512, 0, 0]
    assert not find_folds(small.flux())


def test_shared_heads_and_biases_are_left_alone():
    floats = small.ideogram4()
    floats["layers.0.attention.qkv.weight"] = torch.randn(512, 256)  # two heads of q, one of k and v
    floats["layers.1.feed_forward.w3.bias"] = torch.randn(512)
    producers = {fold.producer for fold in find_folds(floats)}
    assert "layers.0.attention.qkv" not in producers and "layers.1.feed_forward.w3" not in producers
    assert "layers.1.attention.qkv" in producers and "layers.0.feed_forward.w3" in producers


def test_factors_are_powers_of_two_and_cancel(record):
    weights = small.ideogram4()
    factors = smoothing_factors(weights, BLOCK_LINEARS, record, 0.5)
    for factor in factors.values():
        for values in (factor.rows, factor.columns):
            if values is not None:
                assert torch.equal(torch.frexp(values).mantissa, torch.full_like(values, 0.5))
    assert len({float(value) for value in factors["layers.0.attention.qkv.weight"].columns}) > 4
    w1, w3 = (factors[f"layers.0.feed_forward.{name}.weight"].columns for name in ("w1", "w3"))
    norm = factors["layers.0.ffn_norm1.weight"].columns
    assert torch.equal(w1, w3) and torch.equal(w1 * norm, torch.ones(256))
    rows, columns = factors["layers.0.attention.qkv.weight"].rows, factors["layers.0.attention.o.weight"].columns
    assert torch.equal(rows[:512], torch.ones(512)) and torch.equal(rows[512:] * columns, torch.ones(256))


@pytest.mark.parametrize("alpha, flat", [(0.0, "weights"), (1.0, "activations")])
def test_alpha_says_what_becomes_flat(record, alpha, flat):
    """All of the difficulty in the activations, or all of it in the weights."""
    weights = small.ideogram4()
    weights["layers.0.feed_forward.w2.weight"] = weights["layers.0.feed_forward.w2.weight"] * torch.exp(
        torch.randn(512)
    )
    factors = smoothing_factors(weights, BLOCK_LINEARS, record, alpha)
    columns = factors["layers.0.feed_forward.w2.weight"].columns
    absmax = {
        "weights": (weights["layers.0.feed_forward.w2.weight"] * columns).abs().amax(dim=0),
        "activations": record["layers.0.feed_forward.w2"].absmax / columns,
    }
    spread = {name: float(values.log2().amax() - values.log2().amin()) for name, values in absmax.items()}
    assert spread[flat] <= 1.001
    assert all(values > 3 for name, values in spread.items() if name != flat)


def test_channels_without_activations_or_weights_stay(record):
    weights = small.ideogram4()
    name = "layers.0.feed_forward.w2"
    record[name] = dataclasses.replace(record[name], absmax=record[name].absmax.clone())
    record[name].absmax[7] = 0
    weights[f"{name}.weight"][:, 9] = 0
    columns = smoothing_factors(weights, BLOCK_LINEARS, record, 0.5)[f"{name}.weight"].columns
    assert columns[7] == columns[9] == 1 and torch.isfinite(columns).all()
    record[name].absmax.zero_()
    assert torch.equal(
        smoothing_factors(weights, BLOCK_LINEARS, record, 0.5)[f"{name}.weight"].columns, torch.ones(512)
    )


def test_a_block_computes_the_same_numbers_with_folded_factors(record):
    """The FFN and the attention of a block, by hand, in float32: equal bit for bit."""
    weights = {key: value for key, value in small.ideogram4().items() if key.startswith("layers.0.")}
    both = [weights, folded(weights, smoothing_factors(weights, BLOCK_LINEARS, record, 0.5))]
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(1))

    def block(w):
        def get(name):
            return w[f"layers.0.{name}.weight"]

        def norm(values, weight):
            return values / values.square().mean(dim=-1, keepdim=True).sqrt() * weight

        qkv = (norm(x, get("attention_norm1")) * 1.7) @ get("attention.qkv").T
        q, k, v = qkv.view(17, 3, 2, 128).permute(1, 2, 0, 3)
        attended = torch.softmax(q @ k.transpose(1, 2) / 128**0.5, dim=-1) @ v
        out = attended.transpose(0, 1).reshape(17, 256) @ get("attention.o").T
        y = norm(x + out, get("ffn_norm1")) * 0.3
        hidden = torch.nn.functional.silu(y @ get("feed_forward.w1").T) * (y @ get("feed_forward.w3").T)
        return out, hidden @ get("feed_forward.w2").T

    for expected, actual in zip(*map(block, both), strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(both[0]["layers.0.ffn_norm1.weight"], both[1]["layers.0.ffn_norm1.weight"])


def test_the_file_holds_the_folded_model(tmp_path, fp8_files):
    """Norms and protected layers exactly, INT8 within its rounding of the folded weight."""
    path = spiky_record(tmp_path / "record.safetensors")
    (written,) = to_int8(
        fp8_files["conditional"], tmp_path / "out.safetensors", records=(str(path),), protected=("layers.0.*.w1",)
    )
    weights = floats_of(fp8_files["conditional"])
    factors = smoothing_factors(weights, set(BLOCK_LINEARS), read_activation_record(path), 0.5)
    expected, got = folded(weights, factors), meant_by_int8(written.path)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if key.removesuffix(".weight") in BLOCK_LINEARS and key != "layers.0.feed_forward.w1.weight":
            step = value.abs().amax(dim=1, keepdim=True) / 127
            assert ((got[key] - value).abs() <= 0.5001 * step).all()
        else:
            assert torch.equal(got[key], value.bfloat16().float()), key
    norm = "layers.0.ffn_norm1.weight"
    ratio = got[norm] / weights[norm].bfloat16().float()
    assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5)) and ratio.unique().numel() > 2
    recipe = json.loads(metadata_of(written.path)["lowbit.recipe"])
    assert recipe["alpha"] == 0.5 and len(recipe["activation_record_sha256"]) == 1


@pytest.mark.parametrize("key", ["layers.0.ffn_norm1.weight", "layers.0.feed_forward.w3.weight"])
def test_values_that_only_factors_make_too_large_say_so(tmp_path, key):
    """A norm, and a protected layer: no policy file and no further protection helps with either."""
    floats = small.ideogram4()
    floats[key] = floats[key].sign() * 60_000
    source = small.save(tmp_path / "m.safetensors", floats, torch.float16)
    options = {"protected": ("layers.0.*.w3",)}
    assert to_int8(source, tmp_path / "plain.safetensors", **options)
    record = str(spiky_record(tmp_path / "record.safetensors"))
    text = (
        rf"'{key}' with values that F16 cannot hold once they are smoothed \(.* does not fit float16\).*"
        r"\. Lower the alpha of smoothing \(--smooth-alpha\), or leave the activation record out\."
    )
    with pytest.raises(ValueError, match=text):
        to_int8(source, tmp_path / "smooth.safetensors", records=(record,), **options)


def test_smoothing_makes_int8_products_of_spiky_activations_better(tmp_path):
    """The product of w2 with activations quantized per token, as W8A8 computes it."""
    path = spiky_record(tmp_path / "record.safetensors", spread=2.0)
    record = read_activation_record(path)
    source = small.save(tmp_path / "m.safetensors", small.ideogram4())
    (plain,) = to_int8(source, tmp_path / "plain.safetensors")
    (smooth,) = to_int8(source, tmp_path / "smooth.safetensors", records=(str(path),))
    factors = smoothing_factors(small.ideogram4(), BLOCK_LINEARS, record, 0.5)

    def quantized(x):
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        return (x / scale).round() * scale

    for name in BLOCK_LINEARS:
        K = record[name].absmax.shape[0]
        x = torch.randn(64, K, generator=torch.Generator().manual_seed(2)) * record[name].mean_square.sqrt()
        key = f"{name}.weight"
        rows = factors[key].rows
        restore = 1.0 if rows is None else rows.unsqueeze(1)
        y = x @ small.ideogram4()[key].T
        errors = [
            (quantized(x) @ floats_of(plain.path)[key].T - y).norm(),
            (quantized(x / factors[key].columns) @ (floats_of(smooth.path)[key] / restore).T - y).norm(),
        ]
        assert errors[1] < 0.7 * errors[0], name


def test_what_cannot_be_smoothed_is_said(tmp_path, fp8_files):
    record = spiky_record(tmp_path / "record.safetensors")
    flux = small.save(tmp_path / "flux.safetensors", small.flux(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"only layers that the model does not have, such as 'layers\.0\.attention"):
        to_int8(flux, tmp_path / "out.safetensors", records=(str(record),))
    wrong = spiky_record(tmp_path / "wrong.safetensors", channels=100)
    with pytest.raises(ValueError, match=r"100 input channels for 'layers.*, which has 256 in the model"):
        to_int8(fp8_files["conditional"], tmp_path / "out.safetensors", records=(str(wrong),))
    layers = {
        name: LayerActivations(torch.ones(256), torch.ones(256), 1.0) for name in small.block_linears(small.flux())
    }
    with pytest.raises(ValueError, match="smoothing has nothing to fold into"):
        smoothing_factors(small.flux(), list(layers), layers, 0.5)
    with pytest.raises(ValueError, match="activation records: found 2, expected 1: one for each branch to convert"):
        to_int8(fp8_files["conditional"], tmp_path / "out.safetensors", records=(str(record),) * 2)
    with pytest.raises(ValueError, match=r"between 0 and 1, found 1\.5"):
        to_int8(fp8_files["conditional"], tmp_path / "out.safetensors", records=(str(record),), alpha=1.5)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_record_of_some_layers_says_how_many_it_smoothed(tmp_path, fp8_files):
    path = tmp_path / "record.safetensors"
    whole = read_activation_record(spiky_record(path))
    source, both = fp8_files["conditional"], {"unconditional": str(fp8_files["unconditional"])}

    def written(names, **options):
        write_activation_record(path, {name: whole[name] for name in names}, overwrite=True)
        records = (str(path),) * (2 if "unconditional" in options else 1)
        return to_int8(source, tmp_path / "out.safetensors", records=records, overwrite=True, **options)

    assert "10 linear layers quantized (10 of them smoothed)" in str(written(whole)[0])
    # w1 shares its input with w3, which the record lacks; qkv's rows are divided for `o`, which smooths `o` alone.
    some = ["layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "layers.1.attention.o"]
    assert "10 linear layers quantized (2 of them smoothed)" in str(written(some)[0])
    (protected,) = written(some, protected=("layers.0.feed_forward.w2",))
    assert "9 linear layers quantized (1 of them smoothed), 1 layer protected" in str(protected)
    (together,) = written(some, one_file=True, **both)
    assert (together.quantized, together.smoothed) == (20, 4)
    assert [w.smoothed for w in written(some, **both)] == [2, 2]
    (plain,) = to_int8(source, tmp_path / "plain.safetensors")
    assert plain.smoothed is None and "smoothed" not in str(plain)


def test_a_record_that_smooths_nothing_is_refused(tmp_path, fp8_files):
    path = tmp_path / "record.safetensors"
    whole = read_activation_record(spiky_record(path))
    write_activation_record(path, {"layers.0.feed_forward.w1": whole["layers.0.feed_forward.w1"]}, overwrite=True)
    with pytest.raises(ValueError, match=r"lacks all layers that can be smoothed, such as layers\.0\.attention\.qkv"):
        to_int8(fp8_files["conditional"], tmp_path / "out.safetensors", records=(str(path),))
    assert not (tmp_path / "out.safetensors").exists()


def test_two_branches_have_a_record_each(tmp_path, fp8_files):
    records = tuple(str(spiky_record(tmp_path / f"{seed}.safetensors", seed=seed)) for seed in (0, 1))
    both = {"unconditional": str(fp8_files["unconditional"])}
    first, second = to_int8(fp8_files["conditional"], tmp_path / "two.safetensors", records=records, **both)
    for written, branch, record in zip((first, second), fp8_files, records, strict=True):
        (alone,) = to_int8(fp8_files[branch], tmp_path / f"{branch}.safetensors", records=(record,))
        expected, got = load_branch(alone.path).weights, load_branch(written.path).weights
        norm = "layers.1.attention_norm1.weight"
        assert torch.equal(expected[norm], got[norm])
        w2 = "layers.1.feed_forward.w2.weight"
        assert torch.equal(expected[w2].data, got[w2].data)
