"""Sound files of every layout pass, damaged ones are named, and both against their source in all arrangements."""

import dataclasses
import math
import re

import gguf
import numpy as np
import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from lowbit.evaluation import verify_report
from lowbit.evaluation.__main__ import ROOT
from lowbit.evaluation.folded import folded_smoothing
from lowbit.evaluation.metrics import EXACT_DB
from lowbit.evaluation.pairs import Files
from lowbit.evaluation.picture import draw
from lowbit.evaluation.tensor_check import FLOORS_DB, check_tensor
from lowbit.evaluation.verify import verify
from lowbit.formats import Fp8Weight, Int8Weight, QuantizedWeight, ggml, int8
from lowbit.loaders import CheckpointError
from lowbit.tests.convert import making
from safetensors.torch import load_file, save_file

BRANCHES = making.BRANCHES
FLOATS = {branch: small.ideogram4(branch) for branch in BRANCHES}
W2, QKV = "layers.1.feed_forward.w2.weight", "layers.0.attention.qkv.weight"
GOLDEN = np.load(ROOT / "tests" / "golden" / "ggml_blocks.npz")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {branch: small.save(folder / f"{branch}.safetensors", FLOATS[branch]) for branch in BRANCHES}


def int8_file(path, **options):
    return small.save(path.with_suffix(".safetensors"), small.int8_native(FLOATS["conditional"], **options))


def gguf_file(path, ggml_type):
    return small.write_gguf(path.with_suffix(".gguf"), FLOATS["conditional"], linear=ggml_type, every_weight=True)


# What normally distributed weights give, in dB: a floor has to lie well below it.
LAYOUTS = {
    "int8": (int8_file, {}, 42),
    "int8_per_tensor": (int8_file, {"per_channel": False}, 38),
    "int8_rotated": (int8_file, {"convrot": True}, 42),
    "int8_smooth": (lambda path: small.save(path, quantized.int8_smooth(FLOATS["conditional"])), {}, 35),
    "fp8": (lambda path: small.save(path, small.fp8_official(FLOATS["conditional"])), {}, 31),
    **{
        name: (gguf_file, {"ggml_type": name}, db)
        for name, db in {"Q8_0": 45, "Q5_1": 28, "Q5_0": 27, "Q4_K": 22, "Q4_1": 21, "Q4_0": 21}.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_files_pass_with_room_to_spare(tmp_path, sources, layout):
    write, options, expected_db = LAYOUTS[layout]
    path = write(tmp_path / "file.safetensors", **options)
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    assert not check.broken and len(check.tensors) == len(FLOATS["conditional"])
    stored = [tensor for tensor in check.tensors if tensor.format.startswith(("int8", "fp8", "gguf"))]
    worst = min(tensor.sqnr_db for tensor in stored if not (tensor.format == "gguf_q8_0" and layout != "Q8_0"))
    assert expected_db <= worst < expected_db + 4
    floor = next(floor for name, floor in FLOORS_DB.items() if stored[0].format.startswith(name))
    assert floor < worst - 7
    assert "Nothing looks broken." in verify_report.text([check])


def test_the_number_is_that_of_a_direct_computation(tmp_path, sources):
    path = int8_file(tmp_path / "a", convrot=True)
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    meant = making.floats_of(path)
    for tensor in check.tensors:
        if tensor.sqnr_db < EXACT_DB:
            expected = making.sqnr_db(FLOATS["conditional"][tensor.name], meant[tensor.name])
            assert tensor.sqnr_db == pytest.approx(expected, abs=0.01)
        else:
            assert torch.equal(meant[tensor.name], FLOATS["conditional"][tensor.name])
    assert [t.sqnr_db for t in check.tensors] == sorted(t.sqnr_db for t in check.tensors)


def damaged(path, sources, change):
    """A sound INT8 file after `change` of its stored tensors, checked."""
    stored = load_file(int8_file(path))
    change(stored)
    save_file(stored, path.with_suffix(".safetensors"), {"format": "pt"})
    (check,) = verify(Files(str(path.with_suffix(".safetensors")), str(sources["conditional"])))
    return check


DAMAGES = {
    "NaN or infinity": lambda t: t[f"{W2}_scale"][3].fill_(float("nan")),
    "all zero": lambda t: t[W2].zero_(),
    "missing in the quantized file": lambda t: [t.pop(key) for key in [k for k in t if k.startswith(W2[:-7])]],
    "shape [128, 512], in the source [256, 512]": lambda t: t.update(
        {W2: t[W2][:128].clone(), f"{W2}_scale": t[f"{W2}_scale"][:128].clone()}
    ),
    "expected at least 24 for int8": lambda t: t[f"{W2}_scale"].mul_(1.5),
    "dB, expected at least 24": lambda t: t[W2].copy_(t[W2].flip(0)),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_damage_is_named_and_nothing_else_is(tmp_path, sources, problem):
    check = damaged(tmp_path / "damaged", sources, DAMAGES[problem])
    (tensor,) = check.broken
    assert tensor.name == W2 and problem in tensor.problems[0]
    assert check.tensors[0] is tensor
    text = verify_report.text([check])
    assert (
        text.startswith(f"LOOKS BROKEN: 1 of {len(FLOATS['conditional'])} tensors.")
        and f"<- {tensor.problems[0]}" in text
    )
    (panel,) = verify_report.panels([check])
    assert panel.framed == {("layers.N.feed_forward.w2", 1)}
    assert min(panel.values, key=panel.values.get) == ("layers.N.feed_forward.w2", 1)
    assert draw([panel]).width > 300


def test_what_lies_beside_floats_and_ends_with_them_is_not_missing(tmp_path):
    name = "layers.1.feed_forward.w2"
    source = small.save(
        tmp_path / "source.safetensors", FLOATS["conditional"] | {f"{name}.weight_scale": torch.ones(1)}
    )
    making.to_int8(source, tmp_path / "out.safetensors")
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(source)))
    assert not check.broken and f"{name}.weight_scale" not in [tensor.name for tensor in check.tensors]


def test_a_tensor_that_the_source_lacks(tmp_path, sources):
    check = damaged(tmp_path / "a", sources, lambda t: t.update({"layers.9.ffn_norm1.weight": torch.ones(256)}))
    assert [(t.name, t.problems) for t in check.broken] == [("layers.9.ffn_norm1.weight", ("not in the source",))]


def test_a_broken_source_is_told_apart(tmp_path):
    floats = dict(FLOATS["conditional"])
    floats[W2] = floats[W2].clone()
    floats[W2][0, 0] = float("inf")
    source = small.save(tmp_path / "source.safetensors", floats)
    (check,) = verify(Files(str(int8_file(tmp_path / "a")), str(source)))
    assert [t.problems for t in check.broken] == [("the source has NaN or infinity",)]


@pytest.mark.parametrize("rotate", [False, True])
def test_smoothing_folded_into_weights_is_found_again(tmp_path, rotate):
    source = making.fp8(tmp_path)
    record = making.spiky_record(tmp_path / "record.safetensors")
    making.to_int8(source, tmp_path / "out.safetensors", rotate=rotate, records=(str(record),))
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(source)))
    assert not check.broken and check.smoothed == 14  # two norms and five linears of two blocks
    # Factors of a wide spread leave a row's largest values far above the others, which rotation mends.
    worst = min(t.sqnr_db for t in check.tensors if t.format.startswith("int8"))
    assert 42 < worst < 44 if rotate else 33 < worst < 36
    assert all(t.sqnr_db == EXACT_DB for t in check.tensors if "norm1" in t.name)
    assert "Smoothing is folded into 14 weights" in verify_report.text([check])


NORM, W1, W3 = "layers.0.ffn_norm1.weight", "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight"
# What looks like smoothing and is none: whose readers know nothing of it. And the other way round.
NO_SMOOTHING = {
    "one element 64 times": (NORM, lambda t: t[NORM][5].mul_(64)),
    "one element 256 times": (NORM, lambda t: t[NORM][5].mul_(256)),
    "one element 1024 times": (NORM, lambda t: t[NORM][5].mul_(1024)),
    "one element by 256": (NORM, lambda t: t[NORM][5].div_(256)),
    "every other element by 4": (NORM, lambda t: t[NORM][::2].div_(4)),
    "all elements twice": (NORM, lambda t: t[NORM].mul_(2)),
    "one row 32 times": (W3, lambda t: t[f"{W3}_scale"][7].mul_(32)),
    "one row of V by 16": (QKV, lambda t: t[f"{QKV}_scale"][515].div_(16)),
    "all rows by 2": (W3, lambda t: t[f"{W3}_scale"].div_(2)),
    "all columns by 2": (W1, lambda t: t[f"{W1}_scale"].div_(2)),
}


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("damage", NO_SMOOTHING)
def test_damage_that_looks_like_smoothing_is_named_where_it_is(tmp_path, damage, smooth):
    source = making.fp8(tmp_path)
    records = (str(making.spiky_record(tmp_path / "record.safetensors")),) if smooth else ()
    making.to_int8(source, tmp_path / "out.safetensors", records=records)
    stored, (name, change) = load_file(tmp_path / "out.safetensors"), NO_SMOOTHING[damage]
    change(stored)
    save_file(stored, tmp_path / "damaged.safetensors", {"format": "pt"})
    (check,) = verify(Files(str(tmp_path / "damaged.safetensors"), str(source)))
    assert [t.name for t in check.broken] == [name]
    assert check.smoothed == (14 if smooth else 0)


def test_damage_that_looks_like_smoothing_in_a_gguf_file(tmp_path, sources):
    floats = dict(FLOATS["conditional"])
    floats[NORM] = floats[NORM].clone()
    floats[NORM][5] *= 256
    path = small.write_gguf(tmp_path / "damaged.gguf", floats, linear="Q4_K", norms="F32")
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    assert [t.name for t in check.broken] == [NORM] and not check.smoothed


def test_smoothing_counts_where_rounding_leaves_little_of_the_columns(tmp_path):
    """Columns of tiny values, of which a quantized reader keeps nothing or a few steps, contradict nothing."""
    floats, generator = dict(FLOATS["conditional"]), torch.Generator().manual_seed(0)
    for name in making.BLOCK_LINEARS:
        w = floats[f"{name}.weight"]
        sizes = torch.exp(2 * torch.randn(w.shape[1], generator=generator))
        sizes[::17], sizes[3::17] = 1e-4, 0
        floats[f"{name}.weight"] = w * sizes
    source = small.save(tmp_path / "source.safetensors", floats)
    record = making.spiky_record(tmp_path / "record.safetensors", spread=3.0)
    making.to_int8(source, tmp_path / "out.safetensors", alpha=0.8, records=(str(record),))
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(source)))
    assert not check.broken and check.smoothed == 14


# Rows, blocks and codes of a tensor: damage that its SQNR hides

QKV_ROWS, QKV_ROW_BYTES = 768, 144  # in Q4_K: a block of 256 values a row


def gguf_with_damaged_rows(path, change):
    """A Q4_K file after `change` of the bytes of qkv, [768, 144]."""
    gguf_file(path, "Q4_K")
    path = path.with_suffix(".gguf")
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == QKV)
    stored = bytearray(path.read_bytes())
    size = QKV_ROWS * QKV_ROW_BYTES
    rows = torch.frombuffer(stored, dtype=torch.uint8, offset=tensor.data_offset, count=size)
    change(rows.view(QKV_ROWS, QKV_ROW_BYTES))
    path.write_bytes(stored)
    return path


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda rows: rows[:34].zero_(), "34 of 768 blocks are zeros"),
        (lambda rows: rows[7].zero_(), "1 of 768 blocks is zero"),
        (lambda rows: rows[:15].copy_(rows[347:362].clone()), "15 of 768 blocks hold other values"),
        (lambda rows: rows[7].copy_(rows[8].clone()), "1 of 768 blocks holds other values"),
    ],
    ids=["hole", "row of zeros", "other blocks", "another block"],
)
def test_a_few_damaged_rows_are_counted(tmp_path, sources, change, problem):
    path = gguf_with_damaged_rows(tmp_path / "file", change)
    (check,) = verify(Files(str(path), str(sources["conditional"])))
    (tensor,) = check.broken
    assert tensor.name == QKV and tensor.problems == (problem,) and tensor.sqnr_db > FLOORS_DB["gguf_q4"]
    text = verify_report.text([check])
    assert text.startswith("LOOKS BROKEN: 1 of ") and f"<- {problem}" in text


def test_rows_and_the_whole_are_both_told(tmp_path, sources):
    def change(stored):
        stored[W2][:50] = 0
        stored[f"{W2}_scale"][200] *= 32

    check = damaged(tmp_path / "a", sources, change)
    (tensor,) = check.broken
    assert re.match(r"-?\d+\.\d dB, expected at least 24 for int8", tensor.problems[0])
    assert tensor.problems[1:] == ("50 of 256 rows are zeros", "1 of 256 rows holds other values")


def test_holes_in_every_weight_are_damage_of_this_file(tmp_path, sources):
    def change(stored):
        for name in making.BLOCK_LINEARS:
            stored[f"{name}.weight"][3] = 0

    check = damaged(tmp_path / "a", sources, change)
    assert len(check.broken) == len(making.BLOCK_LINEARS) and not check.foreign
    assert all(f"1 of {FLOATS['conditional'][t.name].shape[0]} rows is zero" in t.problems for t in check.broken)


def test_a_copy_of_the_same_type_has_the_same_values():
    """One wrong bit of a norm is worth 40 dB, and nothing explains it. Another type rounds."""
    values = FLOATS["conditional"]["layers.1.ffn_norm2.weight"]
    source = values.to(torch.bfloat16)
    copy = source.clone()
    assert check_tensor("norm", copy, source).problems == check_tensor("norm", copy, values).problems == ()
    copy[7] *= 1.1
    assert check_tensor("norm", copy, source).problems == ("other values than the source, which has the same type",)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_of_no_dimensions(shape):
    """A GGUF file has it as [1]."""
    assert check_tensor("scalar", torch.full(shape, 1.5), torch.tensor(1.5)).problems == ()
    assert check_tensor("scalar", torch.full(shape, 9.0), torch.tensor(1.5)).problems != ()


def test_an_element_of_a_large_norm():
    """Of so many elements a lone one hardly shows in the SQNR."""
    norm = 1 + 0.1 * torch.randn(4608, generator=torch.Generator().manual_seed(0))
    stored = norm.to(torch.bfloat16)
    assert not check_tensor("norm.weight", stored, norm).problems
    stored[5] /= 256
    assert check_tensor("norm.weight", stored, norm).problems == ("1 of 4608 elements holds other values",)
    stored[5] = 0
    assert check_tensor("norm.weight", stored, norm).problems == ("1 of 4608 elements is zero",)


def hard_weights() -> dict[str, torch.Tensor]:
    """Weights [384, 1024] whose rows, columns or elements differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    w, rows = 0.03 * normal(384, 1024), torch.arange(384).unsqueeze(1)
    spike, spike_and_rows = w.clone(), w * torch.exp(normal(384, 1))
    spike[100, 3] = spike_and_rows[100, 3] = -300
    columns = w * torch.exp(normal(384, 1))
    columns[:, 7] = 5
    return {
        "normal": w,
        "cauchy": w / normal(384, 1024).abs(),
        "rows": w * torch.exp(2 * normal(384, 1)),
        "rows_and_columns": w * torch.exp(2 * normal(384, 1)) * torch.exp(2 * normal(1, 1024)),
        "few_loud_rows": spike_and_rows.where(rows % 50 != 7, 30 * w),
        "tiny_rows": w.where(rows % 10 > 0, 1e-5 * w),
        "mostly_tiny_rows": w.where(rows % 10 == 0, 1e-4 * w),
        "zero_rows": w.where(rows % 3 > 0, 0),
        "spike": spike,
        "spike_and_rows": spike_and_rows,
        "column": columns,
        "sparse": w.where(torch.rand(384, 1024, generator=generator) < 0.03, 0),
        "almost_nothing": 1e-5 * w,
    }


SMOOTH = torch.exp2((2 * torch.randn(1024, generator=torch.Generator().manual_seed(1))).round())


def fp8(w, dtype, per_channel):
    absmax = w.abs().amax(dim=1, keepdim=True) if per_channel else w.abs().max()
    scale = (absmax / torch.finfo(dtype).max).clamp(min=1e-12)
    return Fp8Weight(data=(w / scale).to(dtype), shape=tuple(w.shape), scale=scale)


QUANTIZERS = {
    **{
        f"int8_{scale}_{group}_{kind}": lambda w, per_channel=scale == "channel", group=group, smooth=smooth: (
            int8.quantize_weight(w, per_channel, smooth, group)
        )
        for scale in ("channel", "tensor")
        for group in (0, 256)
        for kind, smooth in (("plain", None), ("smooth", SMOOTH))
    },
    **{
        f"fp8_{dtype}_{per_channel}": lambda w, dtype=dtype, per_channel=per_channel: fp8(w, dtype, per_channel)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        for per_channel in (False, True)
    },
    **{
        name: lambda w, name=name: ggml.GgmlWeight(ggml.quantize(w, name), tuple(w.shape), name)
        for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K")
    },
    "fp16": lambda w: w.half(),
    "bf16": lambda w: w.bfloat16(),
}


def part_problems(actual, expected) -> list[str]:
    return [problem for problem in check_tensor("w", actual, expected).problems if " of " in problem]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_row_of_a_sound_weight_is_broken(quantizer):
    """Small rows round to zeros where they share a scale with large ones, which is no damage."""
    for name, w in hard_weights().items():
        assert not part_problems(QUANTIZERS[quantizer](w), w), name


@pytest.mark.parametrize("ggml_type", sorted({key.split("_bytes")[0] for key in GOLDEN if key.endswith("_bytes")}))
def test_rows_of_every_block_type(ggml_type):
    """As ggml makes them of hard rows: sound; with blocks of zeros or of other rows: broken."""
    source, stored = torch.from_numpy(GOLDEN["src"]), torch.from_numpy(GOLDEN[f"{ggml_type}_bytes"])

    def problems(stored):
        return part_problems(ggml.GgmlWeight(stored, tuple(source.shape), ggml_type), source)

    assert not problems(stored)
    hole, others = stored.clone(), stored.clone()
    hole[60:63], others[60:63] = 0, stored[70:73]
    blocks, of_rows = (
        source.numel() // ggml.TYPES[ggml_type].block_size,
        3 * source.shape[1] // ggml.TYPES[ggml_type].block_size,
    )
    assert problems(hole) == [f"{of_rows} of {blocks} blocks are zeros"]
    # Q2_K misses some sparse blocks by more than they hold, which looks the same.
    found = "".join(problems(others))
    assert re.fullmatch("" if ggml_type == "Q2_K" else rf"\d+ of {blocks} blocks hold other values", found)


@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q8_0", "Q4_K"])
def test_tiny_weights_round_to_the_smallest_scales(ggml_type):
    w = 3e-6 * torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    w[::100] *= 4
    assert not part_problems(ggml.GgmlWeight(ggml.quantize(w, ggml_type), (1024, 256), ggml_type), w)


@pytest.mark.parametrize("ggml_type", ["Q4_0", "Q8_0", "Q4_K"])
def test_one_block_of_a_long_row(ggml_type):
    """It is a sixteenth of its row's energy at most."""
    w = 0.03 * torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    blocks = w.numel() // ggml.TYPES[ggml_type].block_size
    stored = ggml.quantize(w, ggml_type).view(blocks, -1)

    def problems(change):
        damaged = stored.clone()
        change(damaged)
        return part_problems(ggml.GgmlWeight(damaged.view(64, -1), (64, 4096), ggml_type), w)

    assert problems(lambda blocks: blocks[37].zero_()) == [f"1 of {blocks} blocks is zero"]
    assert problems(lambda blocks: blocks[37].copy_(stored[5])) == [f"1 of {blocks} blocks holds other values"]


def wrong_codes(weight: Int8Weight, count: int) -> Int8Weight:
    """The highest bit of some codes is another."""
    data = weight.data.clone()
    data.view(-1)[torch.randperm(data.numel(), generator=torch.Generator().manual_seed(0))[:count]] ^= -128
    return dataclasses.replace(weight, data=data)


SOURCES = ["bf16", *(name for name in QUANTIZERS if "fp8" in name), "int8_tensor_0_plain", "Q5_1"]


@pytest.mark.parametrize("quantizer", ["int8_channel_0_plain", "int8_channel_256_plain", "int8_tensor_256_plain"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_wrong_scale_of_what_a_quantized_source_became(quantizer, source):
    source = QUANTIZERS[source](hard_weights()["normal"])
    w = source.dequantize() if isinstance(source, QuantizedWeight) else source.float()
    sound = QUANTIZERS[quantizer](w)
    assert not check_tensor("w", sound, source).problems
    assert check_tensor("w", wrong_codes(sound, 16), source).problems == ("16 of 393216 codes are wrong",)
    if sound.per_channel:
        scale = sound.scale.clone()
        scale[7] *= 1.5
        (problem,) = check_tensor("w", dataclasses.replace(sound, scale=scale), source).problems
        assert re.fullmatch(r"\d+ of 393216 codes are wrong", problem)


@pytest.mark.parametrize("count, problem", [(1, "1 of 393216 codes is wrong"), (16, "16 of 393216 codes are wrong")])
@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name.startswith("int8")])
def test_a_few_wrong_codes_are_counted(quantizer, count, problem):
    w = hard_weights()["normal"]
    sound = QUANTIZERS[quantizer](w)
    problems = check_tensor("w", wrong_codes(sound, count), w).problems
    # Where smoothing has made a column small, one code of it is worth a row.
    assert problems == (problem,) or ("smooth" in quantizer and "hold" in problems[-1])


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name.startswith("int8")])
@pytest.mark.parametrize("source", ["int8_tensor_0_plain", "Q5_1", *(name for name in QUANTIZERS if "fp8" in name)])
def test_rounding_of_the_source_is_no_wrong_code(quantizer, source):
    """Of an INT8 file that was made from the original, against another quantization of it."""
    for name, w in hard_weights().items():
        assert not [p for p in part_problems(QUANTIZERS[quantizer](w), QUANTIZERS[source](w)) if "codes" in p], name


def test_a_clipped_outlier_is_no_wrong_code():
    """Some quantizers choose a scale that leaves the largest values out."""
    w = hard_weights()["normal"]
    w[5, 7], w[5, 9] = 0.15, -0.2
    assert not check_tensor("w", int8.quantize_weight(w.clamp(-0.1, 0.1)), w).problems


# Numbers whose squares float32 does not hold


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30], ids=str)
def test_squares_of_large_and_tiny_weights(size):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
    assert check_tensor("w", w.clone(), w).sqnr_db == EXACT_DB
    assert not check_tensor("w", w.bfloat16(), w).problems
    wrong = check_tensor("w", -w, w)
    assert wrong.sqnr_db == pytest.approx(-20 * math.log10(2)) and wrong.problems[0].startswith("-6.0 dB, expected")
    assert check_tensor("w", torch.zeros_like(w), w).problems == ("all zero",)


def test_a_large_weight_of_the_source_is_no_infinity(tmp_path):
    floats = dict(FLOATS["conditional"])
    floats[W2] = floats[W2].clone()
    floats[W2][0, 0] = 3e38
    source = small.save(tmp_path / "source.safetensors", floats)
    (check,) = verify(Files(str(int8_file(tmp_path / "a")), str(source)))
    assert [t.problems for t in check.broken] == [
        ("0.0 dB, expected at least 24 for int8", "1 of 256 rows holds other values")
    ]


def test_smoothing_is_found_where_squares_overflow():
    """In units of 1e25: a source that is smoothed, whose readers agree."""
    names = ("attention_norm1", "ffn_norm1", "attention.qkv", "attention.o")
    names += tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))
    source = {f"layers.0.{name}.weight": FLOATS["conditional"][f"layers.0.{name}.weight"].clone() for name in names}
    factors = torch.exp2(torch.randint(-2, 3, (512,), generator=torch.Generator().manual_seed(0)))
    source[W3] *= 1e25
    quantized = dict(source)
    quantized[W3] = source[W3] / factors.unsqueeze(1)
    quantized["layers.0.feed_forward.w2.weight"] = source["layers.0.feed_forward.w2.weight"] * factors
    found = folded_smoothing(quantized, source)
    assert torch.equal(found[W3].rows, 1 / factors) and len(found) == 2


# Arrangements of branches and files


def two_branches(path, sources):
    return str(small.write_gguf(path, {"cond.": FLOATS["conditional"], "uncond.": FLOATS["unconditional"]}))


def test_two_branches_in_one_file_against_two_files(tmp_path, sources):
    path = two_branches(tmp_path / "both.gguf", sources)
    checks = verify(Files(path, str(sources["conditional"]), None, str(sources["unconditional"])))
    assert [check.name for check in checks] == list(BRANCHES) and not any(check.broken for check in checks)
    with pytest.raises(CheckpointError, match="found no unconditional branch, expected the branches of both"):
        verify(Files(path, str(sources["conditional"])))


def test_another_branch_is_told_from_damage(tmp_path, sources):
    """One sentence instead of a table of nonsense: norms of two branches that differ look like smoothing."""
    path = two_branches(tmp_path / "both.gguf", sources)
    swapped = verify(Files(path, str(sources["unconditional"]), None, str(sources["conditional"])))
    assert all(check.foreign and not check.smoothed and len(check.broken) > 30 for check in swapped)
    lines = verify_report.text(swapped).splitlines()
    for line, branch, other in zip(lines[:2], BRANCHES, reversed(BRANCHES), strict=True):
        assert re.match(
            rf"NOT MADE FROM THIS SOURCE: 19 quantized weights of both\.gguf, {branch} branch are not those of "
            rf"{other}\.safetensors \(median -[23]\.\d dB\)\. The files seem to belong to different models or branches"
            r": compare it with the file that it was made from\. If this is that file",
            line,
        )
    assert "Smoothing" not in "".join(lines) and "worst first" not in "".join(lines) and len(lines) < 20


@pytest.mark.parametrize("layout", ["int8", "int8_smooth", "fp8", "Q4_0"])
def test_another_model_of_the_same_shapes_is_told_from_damage(tmp_path, layout):
    write, options, _ = LAYOUTS[layout]
    path = write(tmp_path / "file.safetensors", **options)
    source = small.save(tmp_path / "source.safetensors", small.ideogram4(seed=1))
    (check,) = verify(Files(str(path), str(source)))
    assert check.foreign and verify_report.text([check]).startswith("NOT MADE FROM THIS SOURCE: ")


def test_a_smoothed_file_against_another_branch(tmp_path):
    record = making.spiky_record(tmp_path / "record.safetensors")
    making.to_int8(making.fp8(tmp_path), tmp_path / "out.safetensors", records=(str(record),))
    (check,) = verify(Files(str(tmp_path / "out.safetensors"), str(making.fp8(tmp_path, "unconditional"))))
    assert check.foreign and not check.smoothed


def test_unquantized_files_of_two_branches(sources):
    (check,) = verify(Files(str(sources["conditional"]), str(sources["unconditional"])))
    assert len(check.foreign) == 20 and not check.smoothed
    text = verify_report.text([check])
    assert text.startswith(
        "NOT MADE FROM THIS SOURCE: 20 weights of conditional.safetensors, conditional branch are not"
    )
    assert "different models or branches" in text and "Smoothing" not in text and "worst first" not in text
    (same,) = verify(Files(str(sources["conditional"]), str(sources["conditional"])))
    assert not same.foreign and verify_report.text([same]).startswith("Nothing looks broken.")


def test_another_model_is_refused_and_a_file_that_lacks_weights_is_not(tmp_path, sources):
    larger = small.ideogram4(size=small.Ideogram4Size(heads=4, ffn=1024))
    for name, floats, found in (("flux", small.flux(), "0 of 52"), ("larger", larger, "7 of 42")):
        path = small.write_gguf(tmp_path / f"{name}.gguf", floats)
        text = (
            rf"{name}\.gguf: found {found} weights with a name and shape that conditional\.safetensors has too.*another"
        )
        with pytest.raises(CheckpointError, match=text):
            verify(Files(str(path), str(sources["conditional"])))
    few = {name: FLOATS["conditional"][name] for name in (W2, "adaln_proj.weight", "layers.0.ffn_norm1.weight")}
    (check,) = verify(Files(str(small.save(tmp_path / "few.safetensors", few)), str(sources["conditional"])))
    assert {t.problems for t in check.broken} == {("missing in the quantized file",)} and len(check.broken) == 39


def test_a_few_bad_weights_or_empty_ones_are_damage(tmp_path, sources):
    def most_scaled(stored):
        for name in making.BLOCK_LINEARS[:-2]:
            stored[f"{name}.weight_scale"].mul_(1.5)

    def all_zero(stored):
        for name in making.BLOCK_LINEARS:
            stored[f"{name}.weight"].zero_()

    for change, count in ((most_scaled, 8), (all_zero, 10)):
        check = damaged(tmp_path / change.__name__, sources, change)
        assert not check.foreign and len(check.broken) == count
        assert verify_report.text([check]).startswith(f"LOOKS BROKEN: {count} of ")


def test_a_source_of_a_branch_that_is_not_compared_is_refused(tmp_path, sources):
    path = small.write_gguf(tmp_path / "m.gguf", FLOATS["conditional"])
    with pytest.raises(ValueError, match=r"unconditional source: found no unconditional branch in m\.gguf to compare"):
        verify(Files(str(path), str(sources["conditional"]), None, str(sources["unconditional"])))


def test_two_files_against_two_branches_in_one_and_against_two_files(tmp_path, sources):
    paths = [
        str(small.write_gguf(tmp_path / f"{name}.gguf", FLOATS[branch]))
        for name, branch in (("m", "conditional"), ("m_uncond", "unconditional"))
    ]
    both = two_branches(tmp_path / "both.gguf", sources)
    for files in (
        Files(paths[0], both, paths[1]),
        Files(paths[0], str(sources["conditional"]), paths[1], str(sources["unconditional"])),
    ):
        assert [check.name for check in verify(files) if not check.broken] == list(BRANCHES)
    (alone,) = verify(Files(paths[1], both))  # its name says which branch it is
    assert not alone.broken
    (other,) = verify(Files(paths[0], both))  # and a name that says nothing stands for the conditional one
    assert not other.broken and (alone.name, other.name) == ("unconditional", "conditional")


@pytest.mark.parametrize("smooth", [None, "divide", "multiply"])
def test_linears_alone_take_the_rest_from_their_source(tmp_path, sources, smooth):
    path = small.save(tmp_path / "tl.safetensors", small.int8_transformer_lab(FLOATS, smooth=smooth))
    checks = verify(Files(str(path), str(sources["conditional"]), None, str(sources["unconditional"])))
    assert len(checks) == 2
    for check in checks:
        assert not check.broken and check.linears_only
        assert "The file holds linear layers alone" in verify_report.text([check])
        kinds = {tensor.name: tensor.format for tensor in check.tensors}
        assert kinds["input_proj.weight"].startswith("int8") and kinds[W2] == "bf16"


def test_an_unconditional_branch_may_lack_what_only_text_needs(tmp_path, sources):
    floats = {key: value for key, value in FLOATS["unconditional"].items() if not key.startswith("llm_cond")}
    both = small.write_gguf(tmp_path / "both.gguf", {"cond.": FLOATS["conditional"], "uncond.": floats})
    checks = verify(Files(str(both), str(sources["conditional"]), None, str(sources["unconditional"])))
    assert not any(check.broken for check in checks)
    alone = small.write_gguf(tmp_path / "m_uncond.gguf", floats)
    assert not verify(Files(str(alone), str(sources["unconditional"])))[0].broken
    (wrong,) = verify(Files(str(small.write_gguf(tmp_path / "m.gguf", floats)), str(sources["conditional"])))
    assert ("llm_cond_norm.weight", ("missing in the quantized file",)) in [(t.name, t.problems) for t in wrong.broken]


def test_progress_counts_the_bytes_of_the_quantized_file(tmp_path, sources):
    heard = []
    verify(Files(str(int8_file(tmp_path / "a")), str(sources["conditional"])), "cpu", heard.append)
    assert [p.done_bytes for p in heard] == sorted(p.done_bytes for p in heard)
    assert heard[-1].done_bytes == heard[-1].total_bytes > 1_000_000 and {p.stage for p in heard} == {"comparing"}
