"""Saving quantized models with the stock node: the same bytes come back, and the stock loader reads what it can."""

import json

import pytest
import torch
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from safetensors.torch import load_file


def save_with_node(host, model, name):
    """The Save Model node; returns the file that it wrote."""
    host.module("comfy_extras.nodes_model_merging").ModelSave().save(model, name)
    return sorted(host.base_directory.joinpath("output").glob(f"{name}_*.safetensors"))[-1]


def save_offloaded(host, model, path):
    """What saving writes while no module is on the compute device, as on a GPU that is too small."""
    host.unload()
    model.partially_load(model.load_device, 0.1)
    host.comfy.utils.save_torch_file(model.state_dict_for_saving(), str(path))
    model.detach()
    return path


@pytest.fixture(scope="module", params=(*quantized.KINDS, "q5_0", "smooth_and_convrot", "protected"))
def written(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("saving"), request.param
    if kind == "smooth_and_convrot":
        return small.save(
            folder / "both.safetensors", quantized.int8_smooth(small.ideogram4(), convrot=True, convrot_groupsize=256)
        )
    if kind == "protected":
        floats = small.ideogram4()
        modules = [name for name in small.block_linears(floats) if not name.endswith("w2")]
        return small.save(folder / "protected.safetensors", small.int8_native(floats, modules=modules))
    return quantized.write(folder, kind)


@pytest.mark.parametrize("offloaded", [False, True], ids=["loaded", "offloaded"])
def test_the_same_bytes_come_back(comfy_host, written, tmp_path, offloaded):
    model = quantized.load(written)
    stored, before = quantized.stored_bytes(model), quantized.output(comfy_host, model)
    path = (
        save_offloaded(comfy_host, model, tmp_path / "saved.safetensors")
        if offloaded
        else save_with_node(comfy_host, model, f"saved_{written.stem}")
    )
    saved = {key.removeprefix(small.HOST_PREFIX): tensor for key, tensor in load_file(path).items()}
    quantized.assert_same_bytes(saved, stored)
    again = quantized.load(path)
    quantized.assert_same_bytes(quantized.stored_bytes(again), stored)
    assert torch.equal(quantized.output(comfy_host, again), before)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_layer_that_its_publisher_wants_computed_in_floats(comfy_host, tmp_path, monkeypatch, smooth):
    """ComfyUI's `full_precision_matrix_mult`: kept when saved, and `auto` follows it."""
    from lowbit.kernels import quantized_linear

    monkeypatch.setattr(quantized_linear, "has_fused_kernels", lambda device: True)
    floats, name = small.ideogram4(), "layers.0.feed_forward.w2"
    stored = quantized.int8_smooth(floats) if smooth else small.int8_native(floats, convrot=True)
    marker = json.loads(bytes(stored[f"{name}.comfy_quant"].tolist()))
    stored[f"{name}.comfy_quant"] = small.comfy_quant(**marker, full_precision_matrix_mult=True)
    path = small.save(tmp_path / "int8.safetensors", stored)
    for _ in range(2):
        model = quantized.load(path, "auto", "bf16")
        modes = {module: linear.mode for module, linear in quantized.quantized_linears(model).items()}
        assert modes.pop(name) == "exact" and set(modes.values()) == {"int8"}
        assert quantized.quantized_linears(quantized.load(path, "int8"))[name].mode == "int8"
        path = save_with_node(comfy_host, model, f"prefers_exact_{smooth}")


@pytest.mark.parametrize("kind", ["int8", "int8_convrot"])
def test_stock_loader_reads_our_int8(comfy_host, tmp_path, kind):
    model = quantized.load(quantized.write(tmp_path, kind))
    path = save_with_node(comfy_host, model, f"stock_{kind}")
    stock = comfy_host.load_diffusion_model(path, dtype=torch.float32)
    assert sum(quantized.is_quantized(parameter.data) for parameter in stock.model.parameters()) == 10
    # The stock model quantizes its activations to INT8 as well: so do we for this comparison.
    ours = quantized.on_host_blocks(quantized.load(path, compute_mode="int8"))
    actual, expected = quantized.output(comfy_host, ours), quantized.output(comfy_host, stock)
    # A value halfway between two codes falls to either side, by the reciprocal of the scale here and by a division
    # there: one code in thousands. On a GPU the stock kernels scale and rotate activations in less than float32.
    assert quantized.relative(actual, expected) < (0.05 if torch.cuda.is_available() else 2e-3)


@pytest.mark.parametrize("offloaded", [False, True], ids=["loaded", "offloaded"])
@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("patch", ["lora", "dora"])
@pytest.mark.usefixtures("plain_patcher")
def test_a_patched_model_is_saved_merged(comfy_host, tmp_path, kind, patch, offloaded):
    """Side paths and patches applied on the fly are in no stored byte: saving has to merge them."""
    model = quantized.load(quantized.write(tmp_path, kind))
    twin = quantized.full_precision(comfy_host, model)
    stored = quantized.stored_bytes(model)
    file = quantized.lora(patch) | quantized.vectors()
    patched, expected = (quantized.add_lora(comfy_host, m, file) for m in (model, twin))
    comfy_host.comfy.model_management.load_models_gpu([expected])
    wanted = quantized.floats_of(expected)
    plain = quantized.floats_of(model)
    path = (
        save_offloaded(comfy_host, patched, tmp_path / "s.safetensors")
        if offloaded
        else save_with_node(comfy_host, patched, f"patched_{kind}_{patch}")
    )
    saved = quantized.floats_of(quantized.load(path))
    error = quantized.PACKING_ERROR[kind]
    for key, value in wanted.items():
        if f"diffusion_model.{key}" in patched.patches:
            assert quantized.relative(value, plain[key]) > 0.05
            assert quantized.relative(saved[key], value) < (error if value.ndim == 2 else 1e-5), key
    comfy_host.comfy.model_management.load_models_gpu([model])
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)


def test_the_mend_of_the_host_is_needed_and_works(comfy_host, monkeypatch):
    from comfy.model_patcher import LazyCastingParamPiece
    from lowbit.host import compat

    class Stored:
        def state_dict_tensor(self, key):
            return torch.full((3,), 7, dtype=torch.int8)

    monkeypatch.setattr(
        LazyCastingParamPiece, "__new__", lambda cls, caster, key, tensor: torch.nn.Parameter.__new__(cls, tensor)
    )
    with pytest.raises(RuntimeError, match="floating point"):
        LazyCastingParamPiece(Stored(), "weight", torch.zeros(3, dtype=torch.int8))
    compat.allow_saving_offloaded_integers.__wrapped__()
    piece = LazyCastingParamPiece(Stored(), "weight", torch.zeros(3, dtype=torch.int8))
    assert piece.dtype == torch.int8 and torch.equal(piece.to("cpu"), torch.full((3,), 7, dtype=torch.int8))
    mended = LazyCastingParamPiece.__new__
    compat.allow_saving_offloaded_integers.__wrapped__()
    assert LazyCastingParamPiece.__new__ is mended, "a host that needs no mending is left alone"
