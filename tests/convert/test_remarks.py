"""What is said of sources that are taken as they are: quantized ones, and files of the other branch."""

import os

import pytest
import torch
from host_harness import small_models as small
from lowbit.convert import gguf, int8
from lowbit.convert.remarks import remarks
from lowbit.convert.request import Request, open_request
from lowbit.tests.convert.making import bf16, fp8, to_gguf, to_int8


@pytest.fixture
def remarks_on(tmp_path):
    def remarks_on(source, unconditional=None, suffix=".safetensors", **options) -> list[str]:
        second = None if unconditional is None else str(unconditional)
        request = Request(str(source), str(tmp_path / f"target{suffix}"), unconditional=second, **options)
        prefixes = int8.BRANCH_PREFIXES if suffix == ".safetensors" else gguf.BRANCH_PREFIXES
        return remarks(open_request(request, suffix, prefixes)[1])

    return remarks_on


def test_a_quantized_source(tmp_path, remarks_on, fp8_files):
    floats = small.ideogram4()
    scaled = small.save(tmp_path / "scaled.safetensors", small.fp8_scaled(floats))
    plain = small.write_gguf(tmp_path / "plain.gguf", floats, linear="BF16")
    assert not any(map(remarks_on, (fp8(tmp_path), bf16(tmp_path), scaled, plain)))
    (rotated,) = to_int8(fp8_files["conditional"], tmp_path / "rotated.safetensors", rotate=True)
    (q4_k,) = to_gguf(fp8_files["conditional"], tmp_path / "q4.gguf", "q4_k")
    for file, formats in ((rotated, "int8_convrot"), (q4_k, "gguf_q4_k")):
        (remark,) = remarks_on(file.path)
        assert remark == (
            f"{os.path.basename(file.path)} is quantized already ({formats}): its errors stay, and a change of format "
            "adds to them. Convert the BF16, FP16 or FP8 original if you have it."
        )


def test_two_quantized_branches_of_one_file_are_one_remark_and_of_two_files_two(tmp_path, remarks_on, fp8_files):
    both, options = str(fp8_files["unconditional"]), {"policy": "q8_0"}
    (one,) = to_gguf(fp8_files["conditional"], tmp_path / "one.gguf", unconditional=both, one_file=True, **options)
    two = to_gguf(fp8_files["conditional"], tmp_path / "two.gguf", unconditional=both, **options)
    assert len(remarks_on(one.path)) == 1
    assert [r.partition(" ")[0] for r in remarks_on(*(w.path for w in two))] == ["two.gguf", "two_uncond.gguf"]


def test_files_of_the_other_branch_by_their_names(tmp_path, remarks_on):
    cond, uncond, other = (
        small.save(tmp_path / f"{name}.safetensors", small.ideogram4(), torch.bfloat16)
        for name in ("m-cond", "m-unconditional", "m")
    )
    assert not remarks_on(cond, uncond) and not remarks_on(other, uncond) and not remarks_on(cond, other)
    assert not remarks_on(uncond)  # alone it is what it is
    text = "{} is converted as the {} branch, but its name says that it is the {} one. Are the two files swapped?"
    of_cond = text.format("m-cond.safetensors", "unconditional", "conditional")
    of_uncond = text.format("m-unconditional.safetensors", "conditional", "unconditional")
    assert remarks_on(uncond, cond) == [of_uncond, of_cond]
    assert remarks_on(uncond, other) == [of_uncond] and remarks_on(other, cond) == [of_cond]


@pytest.mark.parametrize("convert, suffix", [(to_int8, ".safetensors"), (to_gguf, ".gguf")])
def test_files_of_the_other_branch_by_their_metadata(tmp_path, remarks_on, fp8_files, convert, suffix):
    """Whatever they are called since, our own files know which branch they were made from."""
    convert(fp8_files["conditional"], tmp_path / f"m{suffix}", unconditional=str(fp8_files["unconditional"]))
    first = (tmp_path / f"m{suffix}").rename(tmp_path / f"a{suffix}")
    second = (tmp_path / f"m_uncond{suffix}").rename(tmp_path / f"cond{suffix}")
    assert not [remark for remark in remarks_on(first, second) if "converted as" in remark]
    swapped = [remark for remark in remarks_on(second, first) if "converted as" in remark]
    assert len(swapped) == 2
    assert "the conditional branch, but its metadata says that it is the unconditional one" in swapped[0]


DIFFUSERS = {
    "flux": (
        "x_embedder",
        "context_embedder",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_q_proj",
    ),
    "auraflow": ("joint_transformer_blocks.0.attn.to_q", "joint_transformer_blocks.0.attn.add_k_proj"),
    "z_image": ("noise_refiner.0.attention.to_k", "layers.0.attention.to_q"),
}


@pytest.mark.parametrize("model", DIFFUSERS)
def test_names_of_the_diffusers_library(tmp_path, remarks_on, model):
    floats = {f"{name}.weight": torch.zeros(256, 256) for name in DIFFUSERS[model]}
    (remark,) = remarks_on(small.save(tmp_path / "m.safetensors", floats))
    assert remark.startswith("m.safetensors has the names of the diffusers library, such as ")
    assert "it will not load what becomes of them. Convert the file with the names of the model's" in remark


def test_names_of_the_models_own_releases(tmp_path, remarks_on):
    outside = ("img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out")
    inside = (
        "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "txt_mlp.net.2", "attn.to_q", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    names = [*outside, *(f"transformer_blocks.0.{name}" for name in inside)]
    qwen_image = {f"{name}.weight": torch.zeros(256, 256) for name in names}
    for floats in (qwen_image, small.flux(), small.lumina2(), small.ideogram4()):
        assert not remarks_on(small.save(tmp_path / "m.safetensors", floats))


@pytest.mark.parametrize("recipe", ["", "no JSON", "[]", "{}", '{"source_sha256": "a"}', '{"source_sha256": {"x": 1}}'])
def test_a_recipe_of_others_says_nothing(tmp_path, remarks_on, recipe):
    from safetensors.torch import save_file

    save_file(small.ideogram4(), tmp_path / "a.safetensors", {"format": "pt", "lowbit.recipe": recipe})
    assert not remarks_on(tmp_path / "a.safetensors", bf16(tmp_path, "unconditional"))


def test_an_int8_unet_with_the_names_of_the_diffusers_library(tmp_path, remarks_on):
    """ComfyUI loads it without an error and drops the scales; GGUF files have none."""
    floats = {
        "down_blocks.0.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.zeros(256, 256),
    }
    source = small.save(tmp_path / "m.safetensors", floats)
    (remark,) = remarks_on(source)
    assert remark.startswith("m.safetensors has the names of the diffusers library, such as down_blocks.0.resnets.0.")
    assert "drops the scales" in remark and "Load the result with Load Diffusion Model (INT8), or convert" in remark
    assert not [each for each in remarks_on(source, suffix=".gguf") if "diffusers" in each]


def test_a_tensor_of_unknown_meaning_beside_a_weight(tmp_path, remarks_on):
    floats = {"blocks.0.a.weight": torch.zeros(256, 256), "blocks.0.b.weight": torch.zeros(256, 256)}
    known = {f"blocks.0.a.{leaf}": torch.ones(1) for leaf in ("weight_scale", "scale_weight", "input_scale")}
    assert not remarks_on(small.save(tmp_path / "m.safetensors", floats | known))
    source = small.save(tmp_path / "m.safetensors", floats | {"blocks.0.a.alpha": torch.ones(1)})
    assert remarks_on(source) == [
        "m.safetensors: 1 layer stays unquantized: nothing is known of what lies beside a weight, such as "
        "blocks.0.a.alpha."
    ]
    assert not remarks_on(source, protected=("blocks.0.a",)) and not remarks_on(source, suffix=".gguf")


def test_names_that_are_too_long_for_ggml(tmp_path, remarks_on):
    longest, too_long = (f"blocks.0.{'a' * (length - 16)}.weight" for length in (63, 64))
    floats = {longest: torch.zeros(256, 256)}
    source = small.save(tmp_path / "m.safetensors", floats)
    assert len(longest) == 63 and not remarks_on(source, suffix=".gguf")
    two = small.save(tmp_path / "n.safetensors", floats | {too_long: torch.zeros(4), f"{too_long}s": torch.zeros(4)})
    assert not remarks_on(two)
    assert remarks_on(two, suffix=".gguf") == [
        f"{too_long}: GGML's own reader refuses a file with names of 64 bytes and more. ComfyUI's loaders read it."
    ]
    (prefixed,) = remarks_on(source, small.save(tmp_path / "o.safetensors", floats), suffix=".gguf", one_file=True)
    assert prefixed.startswith(f"cond.{longest}: ")
