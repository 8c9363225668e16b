"""GGUF files: what gguf-py and our loader read from them, their types and metadata."""

import json

import gguf
import numpy as np
import pytest
import torch
from host_harness import small_models as small
from lowbit.formats import GgmlWeight, ggml
from lowbit.loaders.branch import load_branch, open_branches
from lowbit.tests.convert.making import (
    BLOCK_LINEARS,
    BRANCHES,
    bf16,
    floats_of,
    meant_by_gguf,
    spiky_record,
    sqnr_db,
    to_gguf,
    to_int8,
)


def types_of(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def field(path, name: str):
    found = gguf.GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


def policy_file(folder, **policy):
    path = folder / "policy.json"
    path.write_text(json.dumps(policy))
    return path


@pytest.mark.parametrize("policy", ["q8_0", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_gguf_py_reads_the_meant_values(tmp_path, fp8_files, policy):
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy)
    assert written.quantized == len(BLOCK_LINEARS) and written.size_bytes == (tmp_path / "m.gguf").stat().st_size
    source, got = floats_of(fp8_files["conditional"]), meant_by_gguf(written.path)
    assert got.keys() == source.keys()
    for key, value in source.items():
        if key.removesuffix(".weight") in BLOCK_LINEARS:
            expected = ggml.dequantize(ggml.quantize(value, policy.upper()), policy.upper())
            assert torch.equal(got[key], expected), key
        else:
            assert torch.equal(got[key], value.bfloat16().float()), key
    ours = floats_of(written.path)
    assert all(torch.equal(ours[key], got[key]) for key in got)


@pytest.mark.parametrize("policy, floor_db", [("q4_k", 23.0), ("q5_k", 29.2), ("q6_k", 35.5), ("q8_0", 45.3)])
def test_every_bit_halves_the_error(tmp_path, policy, floor_db):
    """Of the normally distributed weights of the small model: floors lie 0.1 to 0.2 dB under what was measured."""
    source = small.save(tmp_path / "m.safetensors", small.ideogram4())
    (written,) = to_gguf(source, tmp_path / "m.gguf", policy)
    before, after = floats_of(source), meant_by_gguf(written.path)
    reached = [sqnr_db(before[f"{name}.weight"], after[f"{name}.weight"]) for name in BLOCK_LINEARS]
    assert floor_db < min(reached) and max(reached) < floor_db + 1.0, reached


def test_every_bit_halves_the_error_of_a_sample(tmp_path, comfy_host):
    """What the small model samples has about 8 dB more than its weights, whatever their type."""
    from lowbit.host.model import LoadRequest, load_model

    floats = {branch: small.ideogram4(branch) for branch in BRANCHES}
    sources = {branch: str(small.save(tmp_path / f"{branch}.safetensors", floats[branch])) for branch in BRANCHES}
    expected = comfy_host.sample(*(comfy_host.load_state_dict(each, dtype=torch.float32) for each in floats.values()))
    for policy, weights_db in (("q4_k", 23.2), ("q5_k", 29.3), ("q6_k", 35.7), ("q8_0", 45.4)):
        path = policy_file(tmp_path, default=policy, rest="F32")
        written = [to_gguf(source, tmp_path / f"{name}-{policy}.gguf", path)[0] for name, source in sources.items()]
        models = [load_model(LoadRequest(each.path, compute_mode="exact", dtype="fp32")) for each in written]
        assert 7.0 < sqnr_db(expected, comfy_host.sample(*models)) - weights_db < 9.5, policy


def test_q8_0_has_the_bytes_of_gguf_py(tmp_path):
    (written,) = to_gguf(bf16(tmp_path), tmp_path / "m.gguf", "q8_0")
    source = floats_of(bf16(tmp_path))
    for tensor in gguf.GGUFReader(written.path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected = gguf.quants.quantize(source[tensor.name].numpy(), gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(tensor.data, expected)


@pytest.mark.parametrize(
    "policy, number", [("q8_0", 7), ("q4_k", 14), ("q5_k", 16), ("q6_k", 18), ("q5_1", 9), ("f16", 1), ("bf16", 32)]
)
def test_metadata(tmp_path, fp8_files, policy, number):
    if policy in ("f16", "bf16"):
        policy = policy_file(tmp_path, default=policy.upper(), rest=policy.upper())
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy)
    assert field(written.path, "general.architecture") == "ideogram4"
    assert field(written.path, "general.file_type") == number
    assert field(written.path, "general.quantization_version") == gguf.GGML_QUANT_VERSION
    recipe = json.loads(field(written.path, "lowbit.recipe"))
    assert recipe["tool"] == "lowbit" and len(recipe["source_sha256"]["only"]) == 64
    reader = gguf.GGUFReader(written.path)
    assert reader.alignment == 32 and all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


@pytest.mark.parametrize(
    "floats, architecture, named",
    [(small.flux(), None, "flux"), (small.lumina2(), None, "lumina2"), (small.flux(), "my_flux", "my_flux")],
    ids=["flux", "lumina2", "named"],
)
def test_architectures(tmp_path, floats, architecture, named):
    source = small.save(tmp_path / "m.safetensors", floats, torch.float16)
    (written,) = to_gguf(source, tmp_path / "m.gguf", architecture=architecture)
    assert field(written.path, "general.architecture") == named
    types = types_of(written.path)
    linears = {f"{name}.weight" for name in small.block_linears(floats)}
    assert types == {key: "Q8_0" if key in linears else "F16" for key in floats}  # F16 stays F16


def test_an_unknown_architecture_is_left_out(tmp_path):
    floats = {"blocks.0.a.weight": torch.randn(256, 256), "x.weight": torch.randn(4)}
    (written,) = to_gguf(small.save(tmp_path / "m.safetensors", floats), tmp_path / "m.gguf")
    assert field(written.path, "general.architecture") is None
    assert types_of(written.path) == {"blocks.0.a.weight": "Q8_0", "x.weight": "F32"}


@pytest.mark.parametrize("name", ["", "my flux", "Flux", "flux\n"])
def test_an_architecture_that_is_no_name_is_refused(tmp_path, fp8_files, name):
    with pytest.raises(ValueError, match=r"architecture: found .*, expected a name of small letters"):
        to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", architecture=name)


# Shapes that ComfyUI-GGUF does not read as BF16: bare parameters, vectors, other convolutions than those of images,
# HiDream's gates of experts, which are no linear layers. And such that it does.
AS_F32 = {
    "blocks.0.norm.weight": (20_000,), "blocks.0.a.bias": (256,), "blocks.0.modulation": (1, 6, 3072),
    "token": (1, 256), "patch.weight": (160, 16, 1, 2, 4), "audio.weight": (160, 64, 3), "scalar": (),
    "blocks.0.ff_i.gate.weight": (4, 2560),
}  # fmt: skip
AS_BF16 = {"blocks.0.small.weight": (128, 256), "image.weight": (160, 16, 4, 4), "embedding.weight": (100, 200)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_other_programs_do_not_read_as_bf16_is_f32(tmp_path, dtype):
    floats = {"blocks.0.a.weight": torch.randn(256, 256)} | {k: torch.randn(s) for k, s in (AS_F32 | AS_BF16).items()}
    source = small.save(tmp_path / "m.safetensors", floats, dtype)
    (written,) = to_gguf(source, tmp_path / "m.gguf")
    types = types_of(written.path)
    assert types.pop("blocks.0.a.weight") == "Q8_0"
    by_default = dict.fromkeys(AS_F32, "F32") | dict.fromkeys(AS_BF16, "BF16")
    assert types == (by_default if dtype != torch.float16 else dict.fromkeys(types, "F16"))  # F16 all read
    got = load_branch(written.path).weights
    for key in types:
        expected = floats[key].to(dtype).to(got[key].dtype)
        assert torch.equal(got[key], expected.reshape(got[key].shape)), key
    (written,) = to_gguf(source, tmp_path / "r.gguf", policy_file(tmp_path, default="Q8_0", rest="BF16"))
    assert {key: types_of(written.path)[key] for key in types} == dict.fromkeys(types, "BF16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_empty_tensors(tmp_path, dtype):
    """Of other types gguf-py fails on them."""
    empty = {"__index_timestep_zero__": (0,), "blocks.0.b.weight": (0, 256), "blocks.0.c.weight": (256, 0)}
    floats = {"blocks.0.a.weight": torch.randn(256, 256)} | {key: torch.zeros(shape) for key, shape in empty.items()}
    source = small.save(tmp_path / "m.safetensors", floats, dtype)
    policy = policy_file(tmp_path, default="Q8_0", layers={"blocks.0.*": "Q4_0"}, rest="BF16")
    (written,) = to_gguf(source, tmp_path / "m.gguf", policy)
    assert types_of(written.path) == {"blocks.0.a.weight": "Q4_0"} | dict.fromkeys(empty, "F32")
    meant, got = meant_by_gguf(written.path), load_branch(written.path).weights
    assert all(tuple(meant[key].shape) == tuple(got[key].shape) == shape for key, shape in empty.items())
    assert str(written).endswith("1 linear layer quantized (1 Q4_0)")


def test_a_name_that_occurs_twice_is_refused():
    from lowbit.convert.file_layout import OutputTensor
    from lowbit.convert.gguf_header import gguf_layout
    from lowbit.convert.safetensors_header import safetensors_layout

    tensors = [OutputTensor(name, (4,), "F32", 16) for name in ("a", "b", "c")]
    for lay_out in (gguf_layout, safetensors_layout):
        assert lay_out(tensors, {}).offsets.keys() == {"a", "b", "c"}
        with pytest.raises(ValueError, match=r"^b: found two tensors to write under this name, expected one"):
            lay_out([*tensors, OutputTensor("b", (8,), "BF16", 16)], {})


def test_a_gguf_source_keeps_its_architecture(tmp_path):
    source = small.write_gguf(tmp_path / "a.gguf", small.ideogram4(), linear="Q8_0", architecture="some_name")
    (written,) = to_gguf(source, tmp_path / "b.gguf", "q4_k")
    assert field(written.path, "general.architecture") == "some_name"


def test_two_branches_in_one_file_and_in_two(tmp_path, fp8_files):
    both = {"unconditional": str(fp8_files["unconditional"])}
    (together,) = to_gguf(fp8_files["conditional"], tmp_path / "one.gguf", "q4_k", one_file=True, **both)
    apart = to_gguf(fp8_files["conditional"], tmp_path / "two.gguf", "q4_k", **both)
    assert [w.path for w in apart] == [str(tmp_path / n) for n in ("two.gguf", "two_uncond.gguf")]
    assert open_branches(together.path).names == BRANCHES
    names = types_of(together.path)
    assert {name.partition(".")[0] for name in names} == {"cond", "uncond"} and len(names) == 2 * len(
        types_of(apart[0].path)
    )
    for branch, written in zip(BRANCHES, apart, strict=True):
        expected = meant_by_gguf(written.path)
        got = floats_of(together.path, branch)
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


def test_a_policy_file_says_which_layer_gets_which_type(tmp_path, fp8_files):
    policy = policy_file(
        tmp_path,
        default="Q4_K",
        layers={"layers.0.feed_forward.w2": "Q8_0", "*.w2": "Q5_0", "llm_cond_proj": "Q8_0", "input_proj": "Q4_K"},
        rest="F32",
    )
    (written,) = to_gguf(
        fp8_files["conditional"], tmp_path / "m.gguf", policy, protected=("layers.1.attention.o", "layers.1.*.w1")
    )
    types = types_of(written.path)
    assert types.pop("layers.0.feed_forward.w2.weight") == "Q8_0"
    assert types.pop("layers.1.feed_forward.w2.weight") == "Q5_0"
    assert types.pop("llm_cond_proj.weight") == "Q8_0"
    assert types.pop("input_proj.weight") == "Q8_0"  # rows of 128 are no whole block of Q4_K
    for name in ("attention.o", "feed_forward.w1"):
        assert types.pop(f"layers.1.{name}.weight") == "F32"
    expected = {f"{name}.weight" for name in BLOCK_LINEARS}
    assert types == {key: "Q4_K" if key in expected else "F32" for key in types}
    got, source = meant_by_gguf(written.path), floats_of(fp8_files["conditional"])
    assert torch.equal(got["layers.1.attention.o.weight"], source["layers.1.attention.o.weight"])


@pytest.mark.parametrize(
    "policy, text",
    [
        ({"layers": {}}, "expected an object with default"),
        ({"default": "Q4_K", "lairs": {}}, r"found \['default', 'lairs'\]"),
        ({"default": "Q3_K"}, r"'Q3_K' \(Q3_K can only be read\) for 'default', expected one of F32, .*Q4_K"),
        ({"default": "Q9_K"}, r"'Q9_K' \(no such type\)"),
        ({"default": "Q4_K", "rest": "Q8_0"}, "found the type 'Q8_0' for 'rest', expected one of F32, F16, BF16"),
        ({"default": "Q4_K", "layers": {"*": 4}}, "found the type 4"),
        ({"default": "Q4_K", "layers": ["*"]}, "as layers"),
        ([1], "expected an object"),
    ],
)
def test_policies_that_make_no_sense(tmp_path, policy, text):
    from lowbit.convert.policy import read_policy

    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    with pytest.raises(ValueError, match=text):
        read_policy(str(path))


def test_a_policys_types_may_be_small_letters(tmp_path):
    from lowbit.convert.policy import GgufPolicy, read_policy

    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"default": "q4_k", "layers": {"*.w2": "q8_0"}, "rest": "bf16"}))
    assert read_policy(str(path)) == GgufPolicy("Q4_K", {"*.w2": "Q8_0"}, "BF16")


def test_a_pattern_that_fits_nothing_is_refused(tmp_path, fp8_files):
    policy = policy_file(tmp_path, default="Q4_K", layers={"*.feed_forward.w9": "Q8_0"})
    with pytest.raises(ValueError, match=r"'\*\.feed_forward\.w9' fits no weight of the model. Names look like "):
        to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy)
    assert not (tmp_path / "m.gguf").exists()


def test_plain_types_are_for_norms_and_biases_too(tmp_path, fp8_files):
    """The other types are not: a rule for a whole layer leaves its norms to the rules after it."""
    layers = {"layers.0.*": "Q8_0", "*norm[12]": "F32", "*.bias": "F16", "layers.1.*": "F32"}
    (written,) = to_gguf(
        fp8_files["conditional"], tmp_path / "m.gguf", policy_file(tmp_path, default="Q4_K", layers=layers)
    )
    types = types_of(written.path)
    for key, stored in {
        "layers.0.attention_norm1.weight": "F32",
        "layers.0.adaln_modulation.bias": "F16",
        "input_proj.bias": "F16",
        "layers.0.attention.norm_q.weight": "F32",
        "layers.0.attention.qkv.weight": "Q8_0",
        "layers.0.adaln_modulation.weight": "Q8_0",
        "layers.1.attention.norm_q.weight": "F32",
        "layers.1.attention.qkv.weight": "F32",
        "llm_cond_norm.weight": "F32",
        "input_proj.weight": "BF16",
    }.items():
        assert types[key] == stored, key
    got, source = meant_by_gguf(written.path), floats_of(fp8_files["conditional"])
    assert torch.equal(got["layers.1.ffn_norm2.weight"], source["layers.1.ffn_norm2.weight"])


@pytest.mark.parametrize(
    "layers, text",
    [
        ({"*norm*": "Q8_0"}, r"'\*norm\*' fits no weight that Q8_0 could be for, only such as \S+norm\S*, of shape "
                             r"\[\d+\]\. Norms, biases .* are stored as F32, F16, BF16"),
        ({"*.bias": "Q4_K"}, r"fits no weight that Q4_K could be for, only such as \S+\.bias"),
        ({"*": "Q8_0", "*.w2": "Q4_0"}, r"'\*\.w2' has no effect, because patterns before it fit all that it fits: "
                                        r"layers\.0\.feed_forward\.w2 is decided by '\*'\. Put the narrower"),
        ({"*.w[12]": "Q8_0", "*.w3": "Q5_0", "*.w?": "Q4_0"}, r"'\*\.w\?' has no effect"),
        ({"*": "F32", "*norm*": "F16"}, r"'\*norm\*' has no effect"),
        ({"LAYERS.*": "Q8_0"}, r"'LAYERS\.\*' fits no weight of the model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("both", [False, True], ids=["one", "two"])
def test_patterns_without_effect_are_refused(tmp_path, fp8_files, layers, text, both):
    options = {"unconditional": str(fp8_files["unconditional"])} if both else {}
    with pytest.raises(ValueError, match=text):
        to_gguf(
            fp8_files["conditional"], tmp_path / "m.gguf", policy_file(tmp_path, default="Q4_K", layers=layers),
            **options,
        )  # fmt: skip
    assert not list(tmp_path.glob("*.gguf"))


def test_a_pattern_for_protected_layers_alone_is_refused(tmp_path, fp8_files):
    policy = policy_file(tmp_path, default="Q4_K", layers={"*.feed_forward.w2": "Q8_0"})
    with pytest.raises(
        ValueError, match=r"'\*\.feed_forward\.w2' has no effect, because all that it fits is protected"
    ):
        to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy, protected=("feed_forward.w2",))
    to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy, protected=("layers.0.feed_forward.w2",))


def test_a_pattern_may_fit_one_branch_alone(tmp_path, fp8_files):
    floats = {key: value for key, value in small.ideogram4("unconditional").items() if "llm_cond" not in key}
    without_text = small.save(tmp_path / "uncond.safetensors", floats)
    policy = policy_file(tmp_path, default="Q4_K", layers={"llm_cond_proj": "Q8_0"})
    first, second = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy, unconditional=str(without_text))
    assert types_of(first.path)["llm_cond_proj.weight"] == "Q8_0"
    assert "llm_cond_proj.weight" not in types_of(second.path)
    with pytest.raises(ValueError, match="'llm_cond_proj' fits no weight of the model"):
        to_gguf(without_text, tmp_path / "u.gguf", policy)


def test_the_result_says_how_many_layers_have_which_type(tmp_path, fp8_files):
    policy = policy_file(tmp_path, default="Q4_K", layers={"*.feed_forward.w2": "Q8_0"})
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "m.gguf", policy)
    assert "10 linear layers quantized (8 Q4_K, 2 Q8_0)" in str(written)
    policy = policy_file(tmp_path, default="BF16", layers={"layers.0.*.w2": "BF16", "embed_*": "Q8_0"})
    (written,) = to_gguf(fp8_files["conditional"], tmp_path / "n.gguf", policy)
    assert str(written).endswith(", 1 linear layer quantized (1 Q8_0)")


def test_the_result_says_what_became_of_rows_that_are_no_whole_blocks(tmp_path):
    rows = {"a": 264, "b": 288, "c": 288, "d": 512, "e": 264}
    floats = {f"blocks.0.{name}.weight": torch.randn(256, K) for name, K in rows.items()}
    (written,) = to_gguf(
        small.save(tmp_path / "m.safetensors", floats), tmp_path / "m.gguf", "q4_k", protected=("blocks.0.e",)
    )
    assert types_of(written.path) == {
        f"blocks.0.{name}.weight": stored
        for name, stored in {"a": "BF16", "b": "Q8_0", "c": "Q8_0", "d": "Q4_K", "e": "BF16"}.items()
    }
    assert str(written).endswith(
        ", 3 linear layers quantized (2 Q8_0, 1 Q4_K), 1 layer protected; 1 left as BF16: rows are no multiple of 32; "
        "2 Q8_0 in place of Q4_K: rows are no multiple of 256"
    )


def test_policies_that_are_no_file(tmp_path):
    from lowbit.convert.policy import read_policy

    with pytest.raises(ValueError, match=r"'q3_k': found no such file.*one of q4_0, .*q4_k, q5_k, q6_k"):
        read_policy("q3_k")
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(ValueError, match="found no JSON"):
        read_policy(str(tmp_path / "policy.json"))


def test_blocks_that_are_asked_for_again_keep_their_bytes(tmp_path):
    source = small.write_gguf(tmp_path / "a.gguf", small.ideogram4(), linear="Q4_K", modules=BLOCK_LINEARS, rest="F16")
    (written,) = to_gguf(source, tmp_path / "b.gguf", "q4_k")
    before, after = load_branch(source).weights, load_branch(written.path).weights
    for name in BLOCK_LINEARS:
        assert torch.equal(before[f"{name}.weight"].data, after[f"{name}.weight"].data)
    assert not any(
        isinstance(w, GgmlWeight) and k.removesuffix(".weight") not in BLOCK_LINEARS for k, w in after.items()
    )


def test_int8_and_gguf_become_each_other(tmp_path, fp8_files):
    (as_int8,) = to_int8(fp8_files["conditional"], tmp_path / "m.safetensors", rotate=True)
    (as_gguf,) = to_gguf(as_int8.path, tmp_path / "m.gguf", "q8_0")
    (back,) = to_int8(as_gguf.path, tmp_path / "back.safetensors", rotate=True)
    source = floats_of(fp8_files["conditional"])
    for path, floor in ((as_int8.path, 40), (as_gguf.path, 38), (back.path, 36)):
        got = floats_of(path)
        assert min(sqnr_db(source[f"{n}.weight"], got[f"{n}.weight"]) for n in BLOCK_LINEARS) > floor


@pytest.mark.parametrize("policy", ["q4_k", "q5_k", "q6_k"])
def test_an_activation_record_lowers_the_error_that_counts(tmp_path, fp8_files, policy):
    from lowbit.convert.record import read_activation_record

    record = spiky_record(tmp_path / "record.safetensors", spread=0.5)
    (plain,) = to_gguf(fp8_files["conditional"], tmp_path / "plain.gguf", policy)
    (weighted,) = to_gguf(fp8_files["conditional"], tmp_path / "weighted.gguf", policy, records=(str(record),))
    source, layers = floats_of(fp8_files["conditional"]), read_activation_record(record)
    for name in BLOCK_LINEARS:
        root = layers[name].mean_square.sqrt()
        plain_db, weighted_db = (
            sqnr_db(source[f"{name}.weight"] * root, floats_of(w.path)[f"{name}.weight"] * root)
            for w in (plain, weighted)
        )
        assert weighted_db > plain_db + 0.3, name
    assert len(json.loads(field(weighted.path, "lowbit.recipe"))["activation_record_sha256"]) == 1


def test_shapes_and_types_beside_matrices(tmp_path):
    floats = small.ideogram4()
    extra = {
        "video.weight": torch.randn(4, 3, 2, 2, 2), "scalar": torch.tensor(1.5), "steps": torch.arange(7),
        "bytes": torch.arange(4, dtype=torch.int8),
    }  # fmt: skip
    source = small.save(tmp_path / "m.safetensors", floats | extra)
    (written,) = to_gguf(source, tmp_path / "m.gguf")
    got = load_branch(written.path).weights
    assert torch.equal(got["video.weight"], extra["video.weight"])
    assert torch.equal(got["scalar"], extra["scalar"].reshape(1))  # gguf-py reads no fewer dimensions
    assert types_of(written.path)["scalar"] == types_of(written.path)["video.weight"] == "F32"
    assert torch.equal(got["steps"], extra["steps"]) and torch.equal(got["bytes"], extra["bytes"])
    source = small.save(tmp_path / "b.safetensors", floats | {"flag": torch.tensor([True])})
    with pytest.raises(ValueError, match=r"flag: found torch\.bool, which GGUF does not hold"):
        to_gguf(source, tmp_path / "b.gguf")


def test_what_the_source_says_about_the_model_is_kept(tmp_path):
    source = small.save(tmp_path / "m.safetensors", small.ideogram4(), torch.bfloat16, {"license": "Apache-2.0"})
    (first,) = to_gguf(source, tmp_path / "a.gguf")
    (second,) = to_gguf(first.path, tmp_path / "b.gguf", "q4_k")
    assert field(second.path, "license") == "Apache-2.0" and field(second.path, "general.file_type") == 14
    assert field(second.path, "format") is None


@pytest.mark.parametrize("key", ["GGUF.version", "gguf.tensor_count", "General.Alignment", "Split.Count"])
def test_metadata_that_a_reader_takes_for_the_files_own_is_dropped(tmp_path, key):
    source = small.save(tmp_path / "m.safetensors", small.ideogram4(), torch.bfloat16, {key: "x", "gguf_note": "kept"})
    (written,) = to_gguf(source, tmp_path / "m.gguf")
    assert field(written.path, "gguf_note") == "kept" and field(written.path, key) != "x"
    assert len(gguf.GGUFReader(written.path).tensors) == len(small.ideogram4())


@pytest.mark.parametrize(
    "key, value, options, stored",
    [
        ("layers.0.attention.o.weight", 1e7, {"policy": "q8_0"}, "Q8_0"),
        ("layers.0.attention.o.weight", 1e8, {"policy": "q4_k"}, "Q4_K"),
        ("input_proj.bias", 1e5, {"rest": "F16"}, "F16"),
    ],
    ids=["q8_0", "q4_k", "f16"],
)
def test_finite_values_that_do_not_fit_name_the_type_and_a_way_out(tmp_path, key, value, options, stored):
    floats = small.ideogram4()
    floats[key].view(-1)[3] = value
    source = small.save(tmp_path / "m.safetensors", floats)
    policy = options.get("policy") or policy_file(tmp_path, default="Q8_0", **options)
    text = rf"'{key}' with finite values that {stored} cannot hold \(.* does not fit float16"
    with pytest.raises(ValueError, match=text) as refused:
        to_gguf(source, tmp_path / "m.gguf", policy)
    assert "damaged" not in str(refused.value)
    wide = policy_file(tmp_path, default="Q8_0", rest="F32")
    protected = () if key.endswith("bias") else (key.removesuffix(".weight"),)
    (written,) = to_gguf(source, tmp_path / "m.gguf", wide, protected=protected)
    assert torch.equal(meant_by_gguf(written.path)[key], floats[key])


def test_blocks_that_are_not_finite_are_not_passed_on(tmp_path):
    floats = small.ideogram4()
    source = small.write_gguf(tmp_path / "a.gguf", floats, linear="Q8_0", modules=BLOCK_LINEARS)
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "layers.0.attention.o.weight")
    content = bytearray(source.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16("nan").tobytes()
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"'layers\.0\.attention\.o\.weight' with values that are not finite"):
        to_gguf(source, tmp_path / "b.gguf", "q8_0")


def test_same_input_same_bytes(tmp_path, fp8_files):
    record = spiky_record(tmp_path / "record.safetensors")
    for name in "ab":
        to_gguf(fp8_files["conditional"], tmp_path / f"{name}.gguf", "q4_k", records=(str(record),))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
