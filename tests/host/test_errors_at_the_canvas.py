"""What a person reads when a file is wrong: over HTTP, through the real nodes, each with its text."""

import shutil
import struct

import pytest
import torch
from host_harness import small_models as small

INT8, GGUF = "Lowbit_LoadDiffusionModelInt8", "Lowbit_LoadDiffusionModelGguf"


@pytest.fixture(scope="module")
def folder(comfy_server):
    path = comfy_server.base_directory / "models" / "diffusion_models"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def floats():
    return {branch: small.ideogram4(branch) for branch in ("conditional", "unconditional")}


@pytest.fixture
def error_text(comfy_server):
    """(node, file, other inputs) -> the text of the error box."""
    from host_harness.server import PromptError

    def run(node: str, checkpoint: str, **inputs) -> str:
        defaults = {"unconditional": "same file", "compute_mode": "auto", "dtype": "default"}
        if node == INT8:
            defaults |= {"base_checkpoint": "none", "base_checkpoint_unconditional": "none"}
        prompt = {
            "1": {"class_type": node, "inputs": {**defaults, "checkpoint": checkpoint, **inputs}},
            "2": {"class_type": "Lowbit_InspectQuantizedModel", "inputs": {"model": ["1", 0]}},
        }
        with pytest.raises(PromptError) as failed:
            comfy_server.queue(prompt)
        assert failed.value.node_type == node
        return failed.value.message

    return run


def test_missing_base_checkpoint(error_text, folder, floats):
    small.save(folder / "tl-int8.safetensors", small.int8_transformer_lab(floats))
    text = error_text(INT8, "tl-int8.safetensors")
    assert "tl-int8.safetensors: found only linear layers, without norms and embeddings" in text
    assert (
        "expected a base checkpoint" in text
        and "Pick the FP8 or BF16 release of this branch as base_checkpoint." in text
    )


def test_base_of_another_model_and_of_the_other_branch(error_text, folder, floats):
    small.save(folder / "tl-int8.safetensors", small.int8_transformer_lab(floats))
    small.save(folder / "flux.safetensors", small.flux(), torch.bfloat16)
    small.save(folder / "uncond-fp8.safetensors", small.fp8_official(floats["unconditional"]))
    text = error_text(INT8, "tl-int8.safetensors", base_checkpoint="flux.safetensors")
    assert "flux.safetensors: found no tensor adaln_proj.weight" in text
    text = error_text(INT8, "tl-int8.safetensors", base_checkpoint="uncond-fp8.safetensors")
    assert "uncond-fp8.safetensors: found weights that differ from those of tl-int8.safetensors by" in text


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_truncated_file(error_text, folder, floats, suffix):
    path = folder / f"cut{suffix}"
    if suffix == ".gguf":
        small.write_gguf(path, floats["conditional"])
    else:
        small.save(path, small.int8_native(floats["conditional"]))
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 1000)
    text = error_text(GGUF if suffix == ".gguf" else INT8, path.name)
    assert f"cut{suffix}: found {whole - 1000:,} of" in text and "The download is incomplete" in text


def test_wrong_file_type_behind_the_extension(error_text, folder, floats):
    small.write_gguf(folder / "right.gguf", floats["conditional"])
    shutil.copy(folder / "right.gguf", folder / "renamed.safetensors")
    small.save(folder / "right.safetensors", floats["conditional"])
    shutil.copy(folder / "right.safetensors", folder / "renamed.gguf")
    text = error_text(INT8, "renamed.safetensors")
    assert "renamed.safetensors: found a GGUF file behind the extension .safetensors" in text
    assert "Rename the file so that it ends in .gguf" in text
    assert "found a safetensors file behind the extension .gguf" in error_text(GGUF, "renamed.gguf")


def test_unknown_quantization_type(error_text, folder, floats):
    path = small.write_gguf(folder / "iq2.gguf", floats["conditional"], linear="Q8_0")
    data = path.read_bytes()
    name = b"layers.0.attention.qkv.weight"
    at = data.index(name) + len(name) + 4 + 16  # behind the name: n_dims, two dims, then the type
    assert struct.unpack_from("<I", data, at) == (8,)
    path.write_bytes(data[:at] + struct.pack("<I", 16) + data[at + 4 :])
    text = error_text(GGUF, "iq2.gguf")
    assert "iq2.gguf: found the quantization type 16 in the tensor 'layers.0.attention.qkv.weight'" in text
    assert "IQ2_XXS" in text and "Pick another quantization of the model" in text


def test_shape_that_contradicts_the_block_size(error_text, folder, floats):
    path = small.write_gguf(folder / "ragged.gguf", floats["conditional"], linear="Q8_0")
    data = path.read_bytes()
    name = b"layers.0.attention.qkv.weight"
    at = data.index(name) + len(name) + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 250) + data[at + 8 :])
    text = error_text(GGUF, "ragged.gguf")
    assert "ragged.gguf: found rows of 250 elements in the Q8_0 tensor" in text and "whole blocks of 32" in text


def test_duplicate_tensor(error_text, folder, floats):
    path = small.write_gguf(folder / "twice.gguf", floats["conditional"])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers.0.feed_forward.w1.weight", b"layers.0.feed_forward.w3.weight", 1))
    text = error_text(GGUF, "twice.gguf")
    assert "twice.gguf: found" in text and "layers.0.feed_forward.w3.weight" in text and "damaged" in text


def test_half_a_branch(error_text, folder, floats):
    half = {key: value for key, value in floats["unconditional"].items() if not key.startswith("layers.1.")}
    small.write_gguf(folder / "half.gguf", {"cond.": floats["conditional"], "uncond.": half})
    text = error_text(GGUF, "half.gguf")
    assert "half.gguf: found half a branch: the unconditional one lacks" in text and "layers.1." in text
    small.write_gguf(folder / "one-branch.gguf", floats["conditional"])
    text = error_text(GGUF, "one-branch.gguf")
    assert "one-branch.gguf: found one branch alone" in text and "Pick the file of the unconditional branch" in text


def test_empty_file(error_text, folder):
    (folder / "empty.gguf").write_bytes(b"")
    assert "empty.gguf: found an empty file (0 bytes)" in error_text(GGUF, "empty.gguf")


def test_not_a_diffusion_model(error_text, folder):
    small.save(folder / "encoder.safetensors", {"model.layers.0.mlp.weight": torch.zeros(4, 4)})
    text = error_text(INT8, "encoder.safetensors", unconditional="none")
    assert "encoder.safetensors: found 1 tensor" in text and "of no diffusion model that this ComfyUI knows" in text
    assert "If it is a text encoder or a VAE" in text


def test_a_model_that_lacks_tensors_is_not_half_loaded(error_text, folder, floats):
    lacking = {key: value for key, value in floats["conditional"].items() if "attention_norm1" not in key}
    small.save(folder / "lacking.safetensors", lacking, torch.bfloat16)
    text = error_text(INT8, "lacking.safetensors", unconditional="none")
    assert (
        "lacking.safetensors: found that 2 tensors of the model are missing, such as layers.0.attention_norm1" in text
    )


def test_a_weight_that_cannot_be_quantized(error_text, folder, floats):
    weights = dict(floats["conditional"])
    weights["layers.1.feed_forward.w3.weight"] = torch.full_like(weights["layers.1.feed_forward.w3.weight"], torch.nan)
    small.save(folder / "nan.safetensors", weights)
    text = error_text(INT8, "nan.safetensors", unconditional="none")
    assert "nan.safetensors: the weight of layers.1.feed_forward.w3 cannot be quantized" in text
    assert "found NaN or infinity" in text and "download it again" in text


def test_a_weight_of_another_shape(error_text, folder, floats):
    wrong = {**floats["conditional"], "layers.1.attention.o.weight": torch.zeros(256, 128)}
    small.write_gguf(folder / "shape.gguf", wrong)
    text = error_text(GGUF, "shape.gguf", unconditional="none")
    assert "shape.gguf: the weight of layers.1.attention.o has shape (256, 128), the model expects (256, 256)" in text


def test_permission_denied(comfy_host, tmp_path, floats, monkeypatch):
    """As root nothing is denied: the system's answer is what is simulated."""
    from lowbit.host.model import LoadRequest, load_model

    path = small.write_gguf(tmp_path / "locked.gguf", floats["conditional"])

    def denied(file, *args, **kwargs):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError) as refused:
        load_model(LoadRequest(str(path)))
    assert "locked.gguf: found that the system denies reading it (permission denied)" in str(refused.value)
    assert "Give the user that runs ComfyUI the right to read it" in str(refused.value)


def test_quantized_weights_under_diffusers_names(error_text, folder):
    """The host joins q, k and v of such files, which it cannot do with quantized tensors."""
    width, layers = 256, ("double_blocks.0.img_attn", "double_blocks.0.txt_attn")
    floats = small.flux()
    renamed = {"x_embedder.weight": floats["img_in.weight"], "x_embedder.bias": floats["img_in.bias"]}
    for part, names in zip(layers, (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")), strict=True):
        for name, weight in zip(names, floats[f"{part}.qkv.weight"].split(width), strict=True):
            renamed[f"transformer_blocks.0.attn.{name}.weight"] = weight
    small.write_gguf(folder / "diffusers.gguf", renamed)
    text = error_text(GGUF, "diffusers.gguf")
    assert "diffusers.gguf: found quantized weights under the names of the diffusers library" in text
    assert "Pick a file made for ComfyUI" in text


def test_a_lora_and_a_tensor_that_does_not_fit(error_text, folder, floats):
    small.save(folder / "lora.safetensors", {"diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.zeros(4, 8)})
    assert "lora.safetensors: found a LoRA, expected a diffusion model" in error_text(INT8, "lora.safetensors")
    wrong = {**floats["conditional"], "layers.1.attention.norm_q.weight": torch.zeros(64)}
    small.save(folder / "misfit.safetensors", wrong, torch.bfloat16)
    text = error_text(INT8, "misfit.safetensors", unconditional="none")
    assert "misfit.safetensors: found shapes that do not fit the model in 1 tensor (size mismatch for layers.1" in text


@pytest.mark.parametrize("entry", ["feed_forwrd.w1", "layers.0.ffn_norm2", "*.w9"])
def test_a_protected_layer_that_no_layer_is(error_text, folder, floats, entry):
    small.save(folder / "float.safetensors", floats["conditional"], torch.bfloat16)
    inputs = {"unconditional": "none", "protected_layers": f"feed_forward.w2, {entry}"}
    text = error_text(INT8, "float.safetensors", **inputs)
    assert f"protected_layers: '{entry}' fits no layer of float.safetensors that would be quantized" in text
    assert "Names look like layers.1.attention.o." in text


def test_a_negative_branch_that_lacks_its_base_is_noticed_first(error_text, folder, floats):
    small.save(folder / "tl-int8.safetensors", small.int8_transformer_lab(floats))
    small.save(folder / "cond-fp8.safetensors", small.fp8_official(floats["conditional"]))
    text = error_text(INT8, "tl-int8.safetensors", base_checkpoint="cond-fp8.safetensors")
    assert "a base checkpoint that supplies them for the unconditional branch" in text
    assert "as base_checkpoint_unconditional." in text
    text = error_text(INT8, "tl-int8.safetensors", base_checkpoint="tl-int8.safetensors")
    assert "found a base checkpoint of linear layers alone" in text
