"""Layouts told apart, the base checkpoint compared, and every refusal with its text."""

import json

import pytest
import torch
from host_harness import small_models as small
from lowbit.formats import Fp8Weight, GgmlWeight, Int8Weight
from lowbit.loaders.base_checkpoint import merge_base
from lowbit.loaders.branch import load_branch, open_branches
from lowbit.loaders.errors import CheckpointError
from lowbit.loaders.mapped_file import MappedFile
from lowbit.loaders.markers import MAX_MARKER_BYTES, markers_of_gguf, markers_of_metadata
from lowbit.loaders.safetensors_int8 import read_weights

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
    path, keys = "model.safetensors", {key: key for key in tensors}
    return read_weights(path, tensors, markers_of_metadata(path, metadata or {}, keys, keys))


def test_int8_with_and_without_a_marker_are_one_weight():
    plain, marked = read(int8_tensors()), read({**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise")})
    assert list(plain) == list(marked) == ["m.weight"]
    assert isinstance(plain["m.weight"], Int8Weight) and torch.equal(plain["m.weight"].data, marked["m.weight"].data)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, N)])
def test_a_per_channel_scale_of_any_shape_is_n_by_1(shape):
    tensors = int8_tensors()
    tensors["m.weight_scale"] = tensors["m.weight_scale"].reshape(shape)
    assert torch.equal(read(tensors)["m.weight"].scale, int8_tensors()["m.weight_scale"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_scale_of_a_square_weight_is_of_its_rows_or_refused(dtype):
    tensors = {"m.weight": torch.zeros(K, K).to(dtype), "m.weight_scale": torch.rand(K, 1)}
    assert read(dict(tensors))["m.weight"].per_channel
    tensors["m.weight_scale"] = tensors["m.weight_scale"].reshape(1, K)
    with pytest.raises(CheckpointError, match="for the rows or for the columns of a square weight"):
        read(tensors)


@pytest.mark.parametrize("shape", [(1, K), (K,), (N, 2), (N, 1, 1), (1, 1, 1), (0,)])
def test_a_scale_of_another_shape_is_refused(shape):
    with pytest.raises(CheckpointError, match=r"contradicts itself .* one number or"):
        read({**int8_tensors(), "m.weight_scale": torch.ones(shape)})


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_bytes_are_what_their_marker_says(dtype):
    values = torch.randn(N, K).to(dtype)
    name = str(dtype).removeprefix("torch.")
    tensors = {"m.weight": values.view(torch.uint8), "m.weight_scale": torch.ones(())}
    weight = read({**tensors, "m.comfy_quant": marker(format=name)})["m.weight"]
    assert weight.data.dtype == dtype
    assert torch.equal(weight.dequantize(), values.float())


def test_a_marker_of_signed_bytes_is_read():
    tensors = {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise").view(torch.int8)}
    assert isinstance(read(tensors)["m.weight"], Int8Weight)


def test_what_belongs_to_activations_is_left_out():
    tensors = {
        **int8_tensors(),
        "m.input_scale": torch.ones(()),
        "m.scale_input": torch.ones(()),
        "m.bias": torch.ones(N),
    }
    assert list(read(tensors)) == ["m.weight", "m.bias"]


@pytest.mark.parametrize(
    "leaf", ["weight_zero_point", "weight_scale_2", "weight_scale_inv", "pre_quant_scale", "smooth"]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_an_unknown_tensor_beside_a_quantized_weight_is_refused(leaf, dtype):
    tensors = {"m.weight": torch.zeros(N, K).to(dtype), "m.weight_scale": torch.ones(()), f"m.{leaf}": torch.ones(N)}
    with pytest.raises(
        CheckpointError, match=f"the tensor '{leaf}', whose meaning is unknown, beside .* in m"
    ) as refused:
        read(tensors)
    assert "download the file again or take another quantization of the model." in str(refused.value)


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
        "a weight of dtype float32 marked as INT8 in m",
    ),
    "group_does_not_divide": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=1024)},
        "contradicts itself",
    ),
    "fp8_of_the_other_kind": (
        {
            "m.weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
            "m.weight_scale": torch.ones(()),
            "m.comfy_quant": marker(format="float8_e5m2"),
        },
        "a weight of dtype float8_e4m3fn marked as float8_e5m2 in m",
    ),
    "bytes_without_a_marker": (
        {"m.weight": torch.zeros(N, K, dtype=torch.uint8), "m.weight_scale": torch.ones(())},
        "a weight of dtype uint8 that nothing explains in m",
    ),
    "integer_scale": (
        {**int8_tensors(), "m.weight_scale": torch.ones(N, 1, dtype=torch.uint8)},
        "a tensor `weight_scale` of dtype uint8 in m",
    ),
    "weight_without_dimensions": (
        {**int8_tensors(), "m.weight": torch.tensor(1, dtype=torch.int8)},
        "a quantized weight `weight` of shape [] in m",
    ),
    "blocks_without_dimensions": (
        {"m.weight": torch.tensor(1, dtype=torch.uint8), "m.comfy_quant": marker(format="gguf_q4_k")},
        "a quantized weight `weight` of shape [] in m",
    ),
    "wq_without_dimensions": (
        {"m.wq": torch.tensor(1, dtype=torch.int8), "m.ws": torch.ones(1)},
        "a quantized weight `wq` of shape [] in m",
    ),
    "empty_weight": (
        {"m.weight": torch.zeros(0, K, dtype=torch.int8), "m.weight_scale": torch.ones(())},
        "a quantized weight `weight` of shape [0, 256] in m",
    ),
    "marker_of_floats": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise").float()},
        "a quantization marker of float32 [29] instead of at most 65,536 bytes in m",
    ),
    "marker_of_two_dimensions": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise")[None]},
        "a quantization marker of uint8 [1, 29]",
    ),
    "endless_marker": (
        {**int8_tensors(), "m.comfy_quant": torch.zeros(1, dtype=torch.uint8).expand(200 * 2**20)},
        "a quantization marker of uint8 [209715200]",
    ),
    "nested_marker": (
        {**int8_tensors(), "m.comfy_quant": torch.full((MAX_MARKER_BYTES,), ord("["), dtype=torch.uint8)},
        "a quantization marker that is no JSON",
    ),
    "rotation_of_null": (
        {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise", convrot=None)},
        "`convrot` of None in the quantization marker in m",
    ),
    **{
        f"group_{size}": (
            {**int8_tensors(), "m.comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=size)},
            "a rotation group (`convrot_groupsize`) of ",
        )
        for size in (None, [256], float("inf"), 256.0, "256", True, 0, -4, 2**70)
    },
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


@pytest.mark.parametrize(
    "name, said",
    [
        ("nvfp4", "NVFP4"),
        ("mxfp8", "MXFP8"),
        ("convrot_w4a4", "INT4 (ConvRot)"),
        ("asym_w4a8_int8", "INT4 (W4A8)"),
        ("awq_w4a16", "INT4 (AWQ)"),
    ],
)
def test_a_format_of_the_hosts_that_is_not_read_is_named(name, said):
    packed = torch.zeros(N, K // 2, dtype=torch.uint8)
    scale = torch.ones(N, K // 16).to(torch.float8_e4m3fn)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": torch.ones(())}
    with pytest.raises(CheckpointError) as refused:
        read({**tensors, "m.comfy_quant": marker(format=name)})
    text = f"found the layer m in {said}, which Lowbit does not read, expected INT8, FP8, GGUF or unquantized layers. "
    assert f"{text}Load the file with ComfyUI's Load Diffusion Model node" in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", "1", "{}", '{"layers": 1}', '{"layers": {"m": []}}', "[" * 10**5])
def test_metadata_that_cannot_be_read_is_refused(text):
    with pytest.raises(CheckpointError, match="quantization metadata that cannot be read"):
        read(int8_tensors(), {"_quantization_metadata": text})


# Markers in the metadata of whole files


ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}


def file_with_markers(tmp_path, prefix, markers, extra=None):
    tensors = {prefix + key: tensor for key, tensor in int8_tensors().items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": markers})}
    return small.save(tmp_path / "model.safetensors", {**tensors, **(extra or {})}, metadata=metadata)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("named", ["", "model.diffusion_model.", "diffusion_model."])
def test_markers_are_found_by_the_name_with_and_without_prefix(tmp_path, prefix, named):
    path = file_with_markers(tmp_path, prefix, {f"{named}m": ROTATED})
    assert load_branch(path).weights["m.weight"].rotation_group == 64


def test_each_branch_has_its_own_markers(tmp_path):
    branches = ("conditional", "unconditional")
    tensors = {f"{branch}.{key}": tensor for branch in branches for key, tensor in int8_tensors().items()}
    markers = {"conditional.m": {"format": "int8_tensorwise"}, "unconditional.m": ROTATED}
    metadata = {"_quantization_metadata": json.dumps({"layers": markers})}
    file = open_branches(small.save(tmp_path / "two.safetensors", tensors, metadata=metadata))
    assert [file.load(branch).weights["m.weight"].rotation_group for branch in branches] == [0, 64]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_markers_that_fit_no_module_are_refused(tmp_path, prefix):
    path = file_with_markers(tmp_path, prefix, {f"{prefix}other.m": ROTATED})
    with pytest.raises(
        CheckpointError, match=r"quantization metadata for modules such as '.*other\.m', which the file"
    ):
        load_branch(path)


def test_a_quantized_text_encoder_in_the_same_file_changes_nothing(tmp_path):
    broken = {
        "text_encoders.t5.m.weight": torch.zeros(4, 4, dtype=torch.uint8),
        "text_encoders.t5.m.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        "m.weight": torch.zeros(4, 4, dtype=torch.int8),
        "vae.decoder.weight": torch.zeros(4),
    }
    path = file_with_markers(tmp_path, "model.diffusion_model.", {"m": ROTATED, "text_encoders.t5.m": 7}, broken)
    weights = load_branch(path).weights
    assert list(weights) == ["m.weight"] and weights["m.weight"].rotation_group == 0


def test_all_in_one_checkpoints_are_recognized_by_the_diffusion_model(tmp_path, floats):
    tensors = small.with_prefix(floats["conditional"], "model.diffusion_model.")
    path = small.save(tmp_path / "all.safetensors", {**tensors, "vae.decoder.weight": torch.zeros(4)})
    file = open_branches(path)
    assert file.is_ideogram4 and file.names == ("only",)
    assert file.load().weights.keys() == floats["conditional"].keys()


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


def test_a_base_of_linears_alone_is_refused(tmp_path, floats):
    path = small.save(tmp_path / "q.safetensors", small.int8_transformer_lab(floats))
    with pytest.raises(CheckpointError) as refused:
        load_branch(path, "unconditional", path)
    text = "q.safetensors: found a base checkpoint of linear layers alone, without norms and embeddings"
    assert str(refused.value).startswith(text) and "as base_checkpoint_unconditional." in str(refused.value)


def test_a_base_that_is_not_needed_is_ignored_with_a_warning(tmp_path, floats, caplog):
    path = small.save(tmp_path / "whole.safetensors", small.int8_native(floats["conditional"]))
    base_path = small.save(tmp_path / "base.safetensors", floats["unconditional"])
    assert load_branch(path, base_path=base_path).weights.keys() == load_branch(path).weights.keys()
    assert "whole.safetensors is complete: the base checkpoint base.safetensors is ignored" in caplog.text
    with pytest.raises(CheckpointError, match=r"^gone\.safetensors: found no such file"):
        load_branch(path, base_path=tmp_path / "gone.safetensors")


def test_branches_of_an_opened_file_lie_on_one_mapping(tmp_path, floats):
    opened = []

    class CountingFile(MappedFile):
        def __init__(self, path):
            super().__init__(path)
            opened.append(path)

    path = small.write_gguf(tmp_path / "two.gguf", {"cond.": floats["conditional"], "uncond.": floats["unconditional"]})
    file = open_branches(path, CountingFile)
    assert file.names == ("conditional", "unconditional") and file.unconditional_source() == "unconditional"
    for name in file.names:
        assert file.load(name).weights.keys() == floats[name].keys()
    assert len(opened) == 1


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
    assert open_branches(two).unconditional_source() == "unconditional"
    flux = small.write_gguf(tmp_path / "flux.gguf", small.flux())
    assert open_branches(flux).unconditional_source() is None


def test_same_file_of_a_one_branch_ideogram4_is_refused(tmp_path, floats):
    one = small.write_gguf(tmp_path / "ideogram4_uncond-Q4_0.gguf", floats["unconditional"])
    with pytest.raises(CheckpointError) as refused:
        open_branches(one).unconditional_source()
    found = "found one branch alone (going by the names, the unconditional one), expected both branches"
    assert found in str(refused.value)
    half = small.write_gguf(tmp_path / "half.gguf", {"cond.": floats["conditional"]})
    with pytest.raises(CheckpointError, match="one branch alone"):
        open_branches(half).unconditional_source()
    with pytest.raises(CheckpointError, match="only the conditional branch, expected the unconditional branch"):
        load_branch(half, "unconditional")


# Markers in the metadata of GGUF files


def q8_cr(tensors=None, stored_prefix="", **fields):
    """What `read_weights` makes of a GGUF file's INT8 tensors, with this marker of m."""
    tensors = int8_tensors() if tensors is None else tensors
    keys = {key: stored_prefix + key for key in tensors}
    metadata = {f"comfy.gguf.quant.{stored_prefix}m.weight": json.dumps({"format": "int8_tensorwise"} | fields)}
    return read_weights("model.gguf", tensors, markers_of_gguf("model.gguf", metadata, keys, tensors))


@pytest.mark.parametrize("stored_prefix", ["", "cond.", "model.diffusion_model."])
@pytest.mark.parametrize(
    "fields, group",
    [
        ({}, 0),
        ({"convrot": True, "weight_rotated": True}, 256),
        ({"convrot": True, "weight_rotated": True, "convrot_groupsize": 64}, 64),
        ({"convrot": True, "convrot_groupsize": 64}, 0),  # written before its converter rotated weights
        ({"convrot": True, "weight_rotated": True, "convrot_groupsize": 96}, 0),  # no whole groups: not rotated
        ({"convrot": False, "weight_rotated": True}, 0),
    ],
)
def test_a_gguf_s_int8_weight_is_rotated_as_its_marker_means(stored_prefix, fields, group):
    weight = q8_cr(stored_prefix=stored_prefix, **fields)["m.weight"]
    assert isinstance(weight, Int8Weight) and weight.rotation_group == group and weight.per_channel


@pytest.mark.parametrize("name, said", [("int4_cr", "INT4 (Q4_CR)"), ("int4_pytorch", "INT4 (Q4_PT)")])
def test_other_formats_of_comfyui_gguf_are_named(name, said):
    with pytest.raises(CheckpointError) as refused:
        q8_cr(format=name)
    assert f"the layer m in {said}, which Lowbit does not read" in str(refused.value)
    assert "Load the file with ComfyUI-GGUF, or take" in str(refused.value)


def test_codes_in_a_gguf_without_their_scale_are_no_weights():
    with pytest.raises(CheckpointError, match="an int8 weight without its scale in m"):
        read_weights("model.gguf", {"m.weight": torch.zeros(N, K, dtype=torch.int8)})


@pytest.mark.parametrize("text", ["{", "[]", "1", "[" * 10**5, 7])
def test_a_gguf_s_marker_that_cannot_be_read_is_refused(text):
    keys, metadata = {key: key for key in int8_tensors()}, {"comfy.gguf.quant.m.weight": text}
    with pytest.raises(CheckpointError, match=r"found the quantization marker .* for the tensor m"):
        markers_of_gguf("model.gguf", metadata, keys, int8_tensors())


def test_a_marker_of_int8_for_ggml_blocks_is_refused():
    blocks = GgmlWeight(torch.zeros(N, K // 32 * 34, dtype=torch.uint8), (N, K), "Q8_0")
    with pytest.raises(CheckpointError, match="expected a JSON object, for a matrix of type I8"):
        q8_cr({"m.weight": blocks})
