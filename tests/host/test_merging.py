"""The stock merging nodes: a merge of whole quantized models is packed again, in the first model's formats."""

import pytest
import torch
from host_harness import quantized_models as quantized


@pytest.fixture(scope="module")
def other(comfy_host, tmp_path_factory):
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("other"), "q8_0", seed=1))
    return model, quantized.full_precision(comfy_host, model)


@pytest.fixture(scope="module", params=quantized.KINDS)
def pair(request, comfy_host, tmp_path_factory):
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("merging"), request.param))
    return request.param, model, quantized.full_precision(comfy_host, model)


def merge(host, model, other, how):
    nodes = host.module("comfy_extras.nodes_model_merging")
    if how == "simple":
        return nodes.ModelMergeSimple().merge(model, other, 0.6)[0]
    if how == "add_difference":
        difference = nodes.ModelSubtract().merge(other, model, 0.5)[0]
        return nodes.ModelAdd().merge(model, difference)[0]
    return nodes.ModelMergeBlocks().merge(model, other, **{"layers.0.": 0.25, "layers.1.": 0.75, "final_layer": 0.5})[0]


@pytest.mark.parametrize("how", ["simple", "add_difference", "blocks"])
@pytest.mark.usefixtures("plain_patcher")
def test_merged_weights(comfy_host, pair, other, how):
    kind, model, twin = pair
    stored, other_stored = quantized.stored_bytes(model), quantized.stored_bytes(other[0])
    before, linears = quantized.output(comfy_host, model), list(quantized.quantized_linears(model))

    load = comfy_host.comfy.model_management.load_models_gpu
    merged, expected = merge(comfy_host, model, other[0], how), merge(comfy_host, twin, other[1], how)
    load([merged])
    load([expected])
    actual, wanted = quantized.floats_of(merged), quantized.floats_of(expected)
    for name in linears:
        key = f"{name}.weight"
        assert quantized.relative(actual[key], wanted[key]) < quantized.PACKING_ERROR[kind], name
    for key in wanted.keys() - {f"{name}.weight" for name in linears}:
        torch.testing.assert_close(actual[key], wanted[key])
    still_quantized = len(quantized.quantized_linears(merged))
    assert still_quantized == (len(linears) if kind in quantized.REQUANTIZED else 0)
    output = quantized.output(comfy_host, merged)
    assert quantized.relative(output, quantized.output(comfy_host, expected)) < 0.1 * quantized.PACKING_ERROR[kind]

    assert torch.equal(quantized.output(comfy_host, model), before)
    quantized.assert_same_bytes(quantized.stored_bytes(model), stored)
    quantized.assert_same_bytes(quantized.stored_bytes(other[0]), other_stored)


@pytest.mark.usefixtures("plain_patcher")
def test_a_merge_is_saved_the_same_loaded_or_not(comfy_host, pair, other):
    merged = merge(comfy_host, pair[1], other[0], "simple")

    def saved() -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            state_dict = merged.model_state_dict_for_saving(merged.model.diffusion_model, "diffusion_model.")
            return {key: value.to("cpu", copy=True) for key, value in state_dict.items()}

    comfy_host.unload()
    unloaded = saved()
    comfy_host.comfy.model_management.load_models_gpu([merged])
    loaded = saved()
    assert loaded.keys() == unloaded.keys()
    # Floats are merged in the model's dtype, and stored in the file's as long as they are not loaded.
    assert not [key for key, value in unloaded.items() if not torch.equal(value, loaded[key].to(value.dtype))]


def test_row_scales_follow_the_merge_and_come_back(comfy_host, tmp_path, other):
    """In int8 mode the scales of unpacked rows are kept: not those of other bytes."""
    model = quantized.load(quantized.write(tmp_path, "q4_k"), compute_mode="int8")
    before = quantized.output(comfy_host, model)
    nodes = comfy_host.module("comfy_extras.nodes_model_merging")
    doubled = nodes.ModelAdd().merge(model, model)[0]
    exact = quantized.load(quantized.write(tmp_path, "q4_k"))
    expected = quantized.output(comfy_host, nodes.ModelAdd().merge(exact, exact)[0])
    assert quantized.relative(quantized.output(comfy_host, doubled), expected) < 0.05
    assert torch.equal(quantized.output(comfy_host, model), before)
