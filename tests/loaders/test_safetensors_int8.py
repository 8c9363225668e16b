"""Layouts told apart, the base checkpoint compared, and every refusal with its text."""

import json

import pytest
import torch
from host_harness import small_models as small
from lowbit.formats import Fp8Weight, GgmlWeight, Int8Weight
from lowbit.loaders.branch import load_branch, unconditional_source
from lowbit.loaders.errors import CheckpointError
from lowbit.loaders.safetensors_int8 import merge_base, read_weights

K, N = 256, 64


def marker(**fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def int8_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.weight": torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8),
        "m.weight_scale": torch.rand(N, 1, generator=generator) + 0.5,
    }


def read(tensors, metadata=None):
    return read_weights("model.safetensors", tensors, metadata or {})


def test_int8_with_and_without_a_marker_are_one_weight():
    plain, marked = read(int8_tensors()), read({**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise")})
    assert list(plain) == list(marked) == ["m.weight"]
    assert isinstance(plain["m.weight"], Int8Weight) and torch.equal(plain["m.weight"].data, marked["m.weight"].data)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, N)])
def test_a_per_channel_scale_of_any_shape_is_n_by_1(shape):
    tensors = int8_tensors()
    tensors["m.weight_scale"] = tensors["m.weight_scale"].reshape(shape)
    assert torch.equal(read(tensors)["m.weight"].scale, int8_tensors()["m.weight_scale"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_per_tensor_scale_of_any_shape_is_one_number(shape):
    tensors = {**int8_tensors(), "m.weight_scale": torch.full(shape, 0.25)}
    assert read(tensors)["m.weight"].scale.shape == ()


def test_convrot_marker_in_both_places():
    for fields in ({"convrot": True, "convrot_groupsize": 64}, {"params": {"convrot": True, "convrot_groupsize": 64}}):
        tensors = {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise", **fields)}
        assert read(tensors)["m.weight"].rotation_group == 64


def test_fp8_in_each_layout():
    data = torch.randn(N, K).to(torch.float8_e4m3fn)
    per_channel = read({"m.weight": data, "m.weight_scale": torch.rand(N)})["m.weight"]
    old = read({"m.weight": data, "m.scale_weight": torch.ones(()), "scaled_fp8": torch.empty(0)})
    marked = {"m.weight": data, "m.weight_scale": torch.ones(()), "m.input_scale": torch.ones(())}
    marked = read({**marked, "m.comfy_quant": marker(format="float8_e4m3fn")})
    in_header = json.dumps({"layers": {"m": {"format": "float8_e4m3fn"}}})
    from_header = read({"m.weight": data, "m.weight_scale": torch.ones(())}, {"_quantization_metadata": in_header})
    plain = read({"m.weight": data})
    assert isinstance(per_channel, Fp8Weight) and per_channel.per_channel
    for weights in (old, marked, from_header, plain):
        assert list(weights) == ["m.weight"] and isinstance(weights["m.weight"], Fp8Weight)


def test_gguf_blocks_in_a_saved_file():
    blocks = torch.randint(0, 256, (4, 144), dtype=torch.uint8)
    weight = read({"m.weight": blocks, "m.comfy_quant": marker(format="gguf_q4_k")})["m.weight"]
    assert isinstance(weight, GgmlWeight) and (weight.shape, weight.ggml_type) == ((4, 256), "Q4_K")


def test_plain_tensors_pass_through():
    tensors = {"pos_embed": torch.randn(3), "m.weight": torch.randn(4, 4), "m.bias": torch.randn(4)}
    assert read(tensors).keys() == tensors.keys()


REFUSED = {
    "no_scale": ({"m.weight": torch.zeros(N, K, dtype=torch.int8)}, "an int8 weight without its scale in m"),
    "no_ws": ({"m.wq": torch.zeros(N, K, dtype=torch.int8)}, "`wq` without its scale `ws` in m"),
    "unknown_format": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int3_super")},
        "the unknown quantization type 'int3_super' in m, expected one of int8_tensorwise",
    ),
    "unknown_gguf": (
        {"m.weight": torch.zeros(1, 1, dtype=torch.uint8), "m.comfy_quant": marker(format="gguf_iq1_s")},
        "IQ1_S",
    ),
    "scale_of_another_shape": (
        {**int8_tensors(), "m.weight_scale": torch.rand(N + 1)},
        "a quantized weight that contradicts itself",
    ),
    "marker_no_json": (
        {**int8_tensors(), "m.comfy_quant": torch.tensor([123, 255], dtype=torch.uint8)},
        "a quantization marker that is no JSON",
    ),
    "marker_no_object": ({**int8_tensors(), "m.comfy_quant": torch.tensor([49], dtype=torch.uint8)}, "marker 1 in m"),
    "marker_without_weight": (
        {"m.comfy_quant": marker(format="int8_tensorwise")},
        "a quantization marker 'int8_tensorwise' without a weight in m",
    ),
    "marked_float": (
        {
            "m.weight": torch.zeros(N, K),
            "m.weight_scale": torch.ones(()),
            "m.comfy_quant": marker(format="int8_tensorwise"),
        },
        "a weight of dtype torch.float32 marked as INT8 in m",
    ),
    "group_does_not_divide": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=1024)},
        "contradicts itself",
    ),
    "ragged_blocks": (
        {"m.weight": torch.zeros(2, 143, dtype=torch.uint8), "m.comfy_quant": marker(format="gguf_q4_k")},
        "a Q4_K row has a multiple of 144 bytes",
    ),
}


@pytest.mark.parametrize("tensors, text", REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_is_refused_with_a_sentence(tensors, text):
    with pytest.raises(CheckpointError) as refused:
        read(dict(tensors))
    assert str(refused.value).startswith("model.safetensors: found ") and text in str(refused.value)


def test_metadata_that_is_no_json_is_refused():
    with pytest.raises(CheckpointError, match="quantization metadata that cannot be read"):
        read(int8_tensors(), {"_quantization_metadata": "{"})


# The base checkpoint


@pytest.fixture(scope="module")
def floats():
    return {branch: small.ideogram4(branch) for branch in ("conditional", "unconditional")}


def as_bf16(floats):
    return {key: value.bfloat16() for key, value in floats.items()}


@pytest.mark.parametrize("smooth", [None, "divide", "multiply"])
@pytest.mark.parametrize("base", [small.fp8_official, as_bf16], ids=["fp8", "bf16"])
def test_base_supplies_the_rest_and_tells_how_smoothing_reads(tmp_path, floats, smooth, base, caplog):
    path = small.save(tmp_path / "q.safetensors", small.int8_transformer_lab(floats, smooth=smooth))
    base_path = small.save(tmp_path / "base.safetensors", base(floats["unconditional"]))
    with caplog.at_level("INFO"):
        weights = load_branch(path, "unconditional", base_path).weights
    assert weights.keys() == floats["unconditional"].keys()
    quantized = weights["layers.0.attention.qkv.weight"]
    original = floats["unconditional"]["layers.0.attention.qkv.weight"]
    assert float((quantized.dequantize() - original).norm() / original.norm()) < 0.05
    if smooth:
        how = {"divide": "divided", "multiply": "multiplied"}[smooth]
        assert f"activations are {how} by the smoothing factors" in caplog.text
        factors = small.smoothing("unconditional.layers.0.attention.qkv", 256)
        torch.testing.assert_close(quantized.smooth, 1 / factors if smooth == "divide" else factors)


def test_linears_alone_need_a_base(tmp_path, floats):
    path = small.save(tmp_path / "ideogram4-int8.safetensors", small.int8_transformer_lab(floats))
    with pytest.raises(CheckpointError) as refused:
        load_branch(path, "conditional")
    assert "ideogram4-int8.safetensors: found only linear layers, without norms and embeddings, expected a base" in str(
        refused.value
    )


@pytest.mark.parametrize(
    "base, text",
    [
        (lambda floats: floats["unconditional"], "weights that differ from those of"),
        (lambda floats: small.flux(), "no tensor adaln_proj.weight (18 tensors lacking in all)"),
        (
            lambda floats: small.ideogram4(size=small.Ideogram4Size(ffn=768)),
            "layers.0.feed_forward.w2.weight of shape (256, 768), expected (256, 512)",
        ),
        (lambda floats: {k: v * 1.2 for k, v in floats["conditional"].items()}, "weights that differ from those of"),
        (lambda floats: {k: v * float("nan") for k, v in floats["conditional"].items()}, "weights that differ"),
    ],
    ids=["other_branch", "other_model", "other_size", "other_scale", "nan"],
)
def test_a_wrong_base_is_refused(tmp_path, floats, base, text):
    path = small.save(tmp_path / "q.safetensors", small.int8_transformer_lab(floats, protect=()))
    base_path = small.save(tmp_path / "base.safetensors", base(floats))
    with pytest.raises(CheckpointError) as refused:
        load_branch(path, "conditional", base_path)
    assert str(refused.value).startswith("base.safetensors: found ") and text in str(refused.value)


def test_smoothing_that_reads_equally_well_both_ways_is_refused(floats):
    """Factors so near 1 that INT8 error hides the direction, yet not 1."""
    original = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    factors = torch.full((K,), 1.0005)
    quantized, scale = small.quantize_int8(original)
    weights = {"m.weight": Int8Weight(quantized, (N, K), scale, factors)}
    with pytest.raises(CheckpointError, match="smoothing factors that fit the base checkpoint equally well both ways"):
        merge_base("q.safetensors", weights, "base.safetensors", {"m.weight": original})


# Where the negative model comes from


def test_same_file_means_the_unconditional_branch_where_there_is_one(tmp_path, floats):
    two = small.write_gguf(tmp_path / "two.gguf", {"cond.": floats["conditional"], "uncond.": floats["unconditional"]})
    assert unconditional_source(two) == "unconditional"
    flux = small.write_gguf(tmp_path / "flux.gguf", small.flux())
    assert unconditional_source(flux) is None


def test_same_file_of_a_one_branch_ideogram4_is_refused(tmp_path, floats):
    one = small.write_gguf(tmp_path / "ideogram4_uncond-Q4_0.gguf", floats["unconditional"])
    with pytest.raises(CheckpointError) as refused:
        unconditional_source(one)
    found = "found one branch alone (going by the names, the unconditional one), expected both branches"
    assert found in str(refused.value)
    half = small.write_gguf(tmp_path / "half.gguf", {"cond.": floats["conditional"]})
    with pytest.raises(CheckpointError, match="one branch alone"):
        unconditional_source(half)
    with pytest.raises(CheckpointError, match="only the conditional branch, expected the unconditional branch"):
        load_branch(half, "unconditional")
