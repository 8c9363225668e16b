"""INT8 files: what they hold, whatever they were made from, and that they say how they were made."""

import hashlib
import json

import pytest
import torch
from host_harness import small_models as small
from lowbit.formats import Int8Weight, int8
from lowbit.loaders.branch import load_branch, open_branches
from lowbit.tests.convert.making import (
    BLOCK_LINEARS,
    BRANCHES,
    bf16,
    floats_of,
    meant_by_int8,
    metadata_of,
    sqnr_db,
    to_gguf,
    to_int8,
)
from safetensors.torch import load_file

SOURCES = {
    "bf16": lambda folder, floats: small.save(folder / "m.safetensors", floats, torch.bfloat16),
    "fp16": lambda folder, floats: small.save(folder / "m.safetensors", floats, torch.float16),
    "fp32": lambda folder, floats: small.save(folder / "m.safetensors", floats),
    "fp8_official": lambda folder, floats: small.save(folder / "m.safetensors", small.fp8_official(floats)),
    "fp8_scaled": lambda folder, floats: small.save(folder / "m.safetensors", small.fp8_scaled(floats)),
    "fp8_scaled_old": lambda folder, floats: small.save(
        folder / "m.safetensors", small.fp8_scaled(floats, marker="scaled_fp8")
    ),
    "prefixed": lambda folder, floats: small.save(
        folder / "m.safetensors", small.with_prefix(floats, small.HOST_PREFIX), torch.bfloat16
    ),
    "q8_0": lambda folder, floats: small.write_gguf(folder / "m.gguf", floats, linear="Q8_0"),
    "every_weight_q4_0": lambda folder, floats: small.write_gguf(
        folder / "m.gguf", floats, linear="Q4_0", every_weight=True
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_becomes_int8_of_what_it_means(tmp_path, kind):
    source = SOURCES[kind](tmp_path, small.ideogram4())
    (written,) = to_int8(source, tmp_path / "out.safetensors")
    assert (written.quantized, written.protected) == (len(BLOCK_LINEARS), 0)
    assert written.size_bytes == (tmp_path / "out.safetensors").stat().st_size
    source_floats, got = floats_of(source), floats_of(tmp_path / "out.safetensors")
    assert got.keys() == source_floats.keys()
    stored, weights = load_branch(source).weights, load_branch(tmp_path / "out.safetensors").weights
    for key, value in source_floats.items():
        if key.removesuffix(".weight") in BLOCK_LINEARS:
            expected = int8.quantize_weight(value)
            assert torch.equal(weights[key].data, expected.data) and torch.equal(weights[key].scale, expected.scale)
        else:
            stays = isinstance(stored[key], torch.Tensor) and stored[key].dtype == torch.float16
            dtype = torch.float16 if stays else torch.bfloat16
            assert weights[key].dtype == dtype and torch.equal(got[key], value.to(dtype).float()), key
    others = meant_by_int8(tmp_path / "out.safetensors")
    assert others.keys() == got.keys() and all(torch.equal(others[key], got[key]) for key in got)


def test_markers_and_shapes_are_the_hosts(tmp_path, fp8_files):
    to_int8(fp8_files["conditional"], tmp_path / "plain.safetensors")
    to_int8(fp8_files["conditional"], tmp_path / "rotated.safetensors", rotate=True)
    for name, marker in (
        ("plain", {"format": "int8_tensorwise"}),
        ("rotated", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}),
    ):
        tensors = load_file(tmp_path / f"{name}.safetensors")
        markers = {key: json.loads(bytes(t.tolist())) for key, t in tensors.items() if key.endswith("comfy_quant")}
        assert markers == {f"{module}.comfy_quant": marker for module in BLOCK_LINEARS}
        for module in BLOCK_LINEARS:
            N = tensors[f"{module}.weight"].shape[0]
            assert tensors[f"{module}.weight"].dtype == torch.int8
            assert tensors[f"{module}.weight_scale"].shape == (N, 1)
            assert tensors[f"{module}.weight_scale"].dtype == torch.float32


def test_rotation_takes_the_largest_group_that_fits(tmp_path):
    from lowbit.convert.int8 import rotation_group

    assert [rotation_group(K) for K in (4608, 12288, 320, 272, 100)] == [256, 256, 64, 16, 0]
    floats = small.ideogram4()
    for layer in (0, 1):  # w2 with K = 320 and an outlier column
        floats[f"layers.{layer}.feed_forward.w2.weight"] = torch.randn(256, 320)
        floats[f"layers.{layer}.feed_forward.w2.weight"][:, 3] *= 30
    source = small.save(tmp_path / "m.safetensors", floats)
    to_int8(source, tmp_path / "plain.safetensors")
    to_int8(source, tmp_path / "rotated.safetensors", rotate=True)
    key = "layers.0.feed_forward.w2.weight"
    assert load_branch(tmp_path / "rotated.safetensors").weights[key].rotation_group == 64
    error = {n: sqnr_db(floats[key], floats_of(tmp_path / f"{n}.safetensors")[key]) for n in ("plain", "rotated")}
    assert error["rotated"] > error["plain"] + 3


def test_two_branches_in_two_files_and_in_one(tmp_path, fp8_files):
    both = {"unconditional": str(fp8_files["unconditional"])}
    apart = to_int8(fp8_files["conditional"], tmp_path / "two.safetensors", **both)
    (together,) = to_int8(fp8_files["conditional"], tmp_path / "one.safetensors", one_file=True, **both)
    assert [w.path for w in apart] == [str(tmp_path / n) for n in ("two.safetensors", "two_uncond.safetensors")]
    assert together.quantized == 2 * len(BLOCK_LINEARS)
    assert open_branches(tmp_path / "one.safetensors").names == BRANCHES
    for branch, written in zip(BRANCHES, apart, strict=True):
        (alone,) = to_int8(fp8_files[branch], tmp_path / f"alone_{branch}.safetensors")
        expected = floats_of(alone.path)
        for got in (floats_of(written.path), floats_of(together.path, branch)):
            assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    # And from a file with both: apart again, and on to one file.
    (again,) = to_int8(together.path, tmp_path / "again.safetensors", one_file=True)
    tensors, expected = load_file(again.path), load_file(together.path)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    split = to_int8(together.path, tmp_path / "split.safetensors")
    assert len(split) == 2 and torch.equal(
        floats_of(split[1].path)["layers.0.attention.o.weight"],
        floats_of(together.path, "unconditional")["layers.0.attention.o.weight"],
    )


def test_int8_that_is_asked_for_again_keeps_its_codes(tmp_path, fp8_files):
    (first,) = to_int8(fp8_files["conditional"], tmp_path / "a.safetensors")
    per_tensor = small.save(tmp_path / "t.safetensors", small.int8_native(small.ideogram4(), per_channel=False))
    (second,) = to_int8(first.path, tmp_path / "b.safetensors")
    (third,) = to_int8(per_tensor, tmp_path / "c.safetensors")
    for source, result in ((first.path, second.path), (per_tensor, third.path)):
        expected, got = load_branch(source).weights, load_branch(result).weights
        for key, weight in expected.items():
            if isinstance(weight, Int8Weight):
                assert torch.equal(got[key].data, weight.data)
                assert torch.equal(got[key].dequantize(), weight.dequantize())
    (rotated,) = to_int8(first.path, tmp_path / "d.safetensors", rotate=True)
    assert sqnr_db(*(floats_of(p)["layers.0.attention.o.weight"] for p in (first.path, rotated.path))) > 35


def test_protected_layers_stay(tmp_path, fp8_files):
    to_int8(fp8_files["conditional"], tmp_path / "m.safetensors", protected=("feed_forward.w2", "layers.1.attention.?"))
    weights = load_branch(tmp_path / "m.safetensors").weights
    kept = {name for name in BLOCK_LINEARS if isinstance(weights[f"{name}.weight"], torch.Tensor)}
    assert kept == {"layers.0.feed_forward.w2", "layers.1.feed_forward.w2", "layers.1.attention.o"}
    meant = floats_of(fp8_files["conditional"])
    for name in kept:
        assert torch.equal(weights[f"{name}.weight"], meant[f"{name}.weight"].bfloat16())


LEFTOVERS = ("weight_scale", "scale_weight", "input_scale", "scale_input")


@pytest.mark.parametrize("leaf", LEFTOVERS)
def test_what_lies_beside_a_float_weight_is_no_part_of_its_quantization(tmp_path, leaf):
    """An FP8 file some of whose layers were left as BF16, with the scales that all had."""
    floats = small.ideogram4()
    mixed = small.fp8_scaled(floats, modules=BLOCK_LINEARS[1:])
    name = BLOCK_LINEARS[0]
    clean = small.save(tmp_path / "clean.safetensors", mixed)
    source = small.save(tmp_path / "m.safetensors", mixed | {f"{name}.{leaf}": torch.ones(1)})
    (expected,), (written,) = to_int8(clean, tmp_path / "a.safetensors"), to_int8(source, tmp_path / "b.safetensors")
    expected, got = load_file(expected.path), load_file(written.path)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert load_branch(written.path).weights[f"{name}.weight"].format_name == "int8"
    (protected,) = to_int8(source, tmp_path / "p.safetensors", protected=(name,))
    assert f"{name}.{leaf}" in load_file(protected.path)  # what the layer has stays with it
    (as_gguf,) = to_gguf(source, tmp_path / "m.gguf")
    assert load_branch(as_gguf.path).weights[f"{name}.{leaf}"].tolist() == [1]


def test_a_layer_with_a_tensor_that_nobody_knows_stays_as_it_is(tmp_path):
    name = BLOCK_LINEARS[0]
    source = small.save(tmp_path / "m.safetensors", small.ideogram4() | {f"{name}.unknown": torch.ones(1)})
    (written,) = to_int8(source, tmp_path / "out.safetensors")
    weights = load_branch(written.path).weights
    assert weights[f"{name}.weight"].dtype == torch.bfloat16 and f"{name}.unknown" in weights
    assert all(weights[f"{other}.weight"].format_name == "int8" for other in BLOCK_LINEARS[1:])


@pytest.mark.parametrize("convert, name", [(to_int8, "out.safetensors"), (to_gguf, "out.gguf")])
def test_a_scale_that_comfyui_may_count_is_refused_beside_a_float_weight(tmp_path, convert, name):
    floats = small.fp8_scaled(small.ideogram4(), marker="scaled_fp8", modules=BLOCK_LINEARS[1:])
    key = f"{BLOCK_LINEARS[0]}.scale_weight"
    source = small.save(tmp_path / "m.safetensors", floats | {key: torch.tensor(0.5)})
    with pytest.raises(
        ValueError, match=r"m.safetensors: found `scale_weight` other than 1 beside a weight that is not FP8"
    ):
        convert(source, tmp_path / name)
    assert convert(small.save(source, floats | {key: torch.tensor(1.0)}), tmp_path / name)
    del floats["scaled_fp8"]  # then ComfyUI counts none
    assert convert(small.save(source, floats | {key: torch.tensor(0.5)}), tmp_path / f"b_{name}")


def test_same_input_same_bytes_and_the_recipe_says_which(tmp_path, fp8_files):
    source = fp8_files["conditional"]
    copy = tmp_path / "sub"
    copy.mkdir()
    copied = copy / "another_name.safetensors"
    copied.write_bytes(source.read_bytes())
    (one,) = to_int8(source, tmp_path / "a.safetensors", rotate=True, protected=("w2",))
    to_int8(copied, copy / "b.safetensors", rotate=True, protected=("w2",))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == (copy / "b.safetensors").read_bytes()
    assert str(tmp_path).encode() not in content
    recipe = json.loads(metadata_of(one.path)["lowbit.recipe"])
    assert recipe["source_sha256"] == {"only": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert recipe["format"] == "int8_tensorwise" and recipe["rotate"] is True and recipe["protected"] == ["w2"]
    assert recipe["tool"] == "lowbit" and recipe["version"].count(".") == 2


def test_what_the_source_says_about_the_model_is_kept(tmp_path):
    """What it says about its own bytes is not."""
    said = {"modelspec.title": "A model", "license": "Apache-2.0", "_quantization_metadata": '{"layers": {}}'}
    said |= {"modelspec.hash_sha256": "0x12ab", "sshs_model_hash": "12ab", "sshs_legacy_hash": "34cd"}
    source = small.save(tmp_path / "m.safetensors", small.ideogram4(), torch.bfloat16, said)
    (written,) = to_int8(source, tmp_path / "out.safetensors")
    metadata = metadata_of(written.path)
    assert metadata.pop("lowbit.recipe") and metadata == {
        "format": "pt", "modelspec.title": "A model", "license": "Apache-2.0",
    }  # fmt: skip


def test_tensors_lie_on_multiples_of_their_elements(tmp_path):
    floats = small.ideogram4()
    floats["odd"] = torch.randn(3)
    floats["numbers"] = torch.arange(5)
    floats["flag"] = torch.tensor(True)
    source = small.save(tmp_path / "m.safetensors", floats, torch.bfloat16)
    to_int8(source, tmp_path / "out.safetensors")
    from lowbit.loaders import open_checkpoint

    tensors = open_checkpoint(tmp_path / "out.safetensors").tensors
    assert all(t.offset % t.dtype.itemsize == 0 for t in tensors.values())
    loaded = load_file(tmp_path / "out.safetensors")
    assert torch.equal(loaded["numbers"], floats["numbers"]) and loaded["flag"].dtype == torch.bool


def test_the_size_of_the_pieces_does_not_matter(tmp_path, fp8_files, monkeypatch):
    """Without rotation, whose sums take another order for another number of rows."""
    from lowbit.convert import source

    to_int8(fp8_files["conditional"], tmp_path / "a.safetensors")
    monkeypatch.setattr(source, "CHUNK_ELEMENTS", 1000)
    to_int8(fp8_files["conditional"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


CONVERSIONS = pytest.mark.parametrize("convert, name", [(to_int8, "out.safetensors"), (to_gguf, "out.gguf")])


@CONVERSIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["layers.1.attention.o.weight", "input_proj.bias", "layers.0.attention_norm1.weight"])
def test_values_that_are_not_finite_name_file_and_tensor(tmp_path, convert, name, key, value):
    floats = small.ideogram4()
    floats[key].view(-1)[3] = value
    source = small.save(tmp_path / "bad.safetensors", floats)
    text = rf"bad\.safetensors: found '{key}' with values that are not finite \(found NaN.*The file is damaged"
    with pytest.raises(ValueError, match=text):
        convert(source, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@CONVERSIONS
def test_finite_values_that_do_not_fit_the_type_are_no_damage(tmp_path, convert, name):
    change = {"input_proj.weight": torch.full((256, 128), 3.4e38)}
    source = small.save(tmp_path / "m.safetensors", small.ideogram4() | change)
    text = (
        r"'input_proj\.weight' with finite values that BF16 cannot hold \(a value of 3\.4e\+38 does not fit bfloat16\)"
    )
    with pytest.raises(ValueError, match=text) as refused:
        convert(source, tmp_path / name)
    assert "damaged" not in str(refused.value) and "policy file" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_scales_that_are_not_finite_are_no_more_passed_on_than_values(tmp_path, fp8_files):
    (first,) = to_int8(fp8_files["conditional"], tmp_path / "a.safetensors")
    tensors = load_file(first.path)
    tensors["layers.0.attention.o.weight_scale"][5] = float("nan")
    source = small.save(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=r"'layers\.0\.attention\.o\.weight' with values that are not finite"):
        to_int8(source, tmp_path / "out.safetensors")


def test_refusals_before_anything_is_written(tmp_path, fp8_files):
    floats = {branch: small.ideogram4(branch) for branch in BRANCHES}
    linears_only = small.save(tmp_path / "tl.safetensors", small.int8_transformer_lab(floats))
    encoder = small.save(tmp_path / "norms.safetensors", {"a.weight": torch.ones(8), "b.weight": torch.ones(8, 8)})
    cases = [
        (linears_only, {}, "only linear layers.*Convert the FP8 or BF16 release"),
        (encoder, {}, "no linear layer that is worth quantizing, expected a diffusion transformer"),
        (tmp_path / "gone.safetensors", {}, "no such file"),
        (fp8_files["conditional"], {"protected": ("w7",)}, "'w7' fits no layer.*Names look like layers"),
        (fp8_files["conditional"], {"protected": ("*.w7",)}, "'\\*.w7' fits no layer"),
        (fp8_files["conditional"], {"device": "cuda"}, "no CUDA device"),
    ]
    for source, options, text in cases:
        if options.get("device") and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=text):
            to_int8(source, tmp_path / "out.safetensors", **options)
    with pytest.raises(ValueError, match=r"expected \.safetensors"):
        to_int8(fp8_files["conditional"], tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_a_pair_is_two_files_of_one_model(tmp_path, fp8_files):
    source = fp8_files["conditional"]
    with pytest.raises(ValueError, match="itself, expected the file of the other branch"):
        to_int8(source, tmp_path / "m.safetensors", unconditional=str(source))
    other = small.save(tmp_path / "other.safetensors", {"blocks.0.weight": torch.ones(512, 512).bfloat16()})
    with pytest.raises(ValueError, match=r"found 0 of 1 weights as in .*expected the unconditional branch of the same"):
        to_int8(source, tmp_path / "m.safetensors", unconditional=str(other))


def test_a_conversion_that_quantizes_nothing_is_refused(tmp_path, fp8_files):
    with pytest.raises(ValueError, match=r"found all 10 linear layers of .* protected, expected some to quantize"):
        to_int8(fp8_files["conditional"], tmp_path / "m.safetensors", protected=("*",))


def test_a_device_that_does_not_exist_is_refused(tmp_path, fp8_files):
    with pytest.raises(ValueError, match="device: found 'gpu', expected cpu, cuda or a certain GPU such as cuda:1"):
        to_int8(fp8_files["conditional"], tmp_path / "m.safetensors", device="gpu")


def test_bf16_and_fp8_sources_differ_only_by_fp8(tmp_path):
    (written,) = to_int8(bf16(tmp_path), tmp_path / "out.safetensors")
    floats, got = small.ideogram4(), floats_of(written.path)
    for name in BLOCK_LINEARS:
        assert sqnr_db(floats[f"{name}.weight"], got[f"{name}.weight"]) > 38
