"""The harness itself: the stock host takes the small models, in this process and as a server."""

import pytest
import torch
from host_harness import graphs, server, small_models
from safetensors.torch import load_file


def unloaded_keys(model, state_dict) -> set[str]:
    return set(state_dict) ^ set(model.model.diffusion_model.state_dict())


def test_fill_is_deterministic():
    first, second = small_models.ideogram4(seed=3), small_models.ideogram4(seed=3)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = small_models.ideogram4("unconditional", seed=3)
    assert not torch.equal(first["input_proj.weight"], other["input_proj.weight"])


@pytest.mark.parametrize("make", [small_models.ideogram4, small_models.flux, small_models.lumina2])
def test_linears_have_the_scale_of_trained_ones(make):
    state_dict = make()
    for name in small_models.linears(state_dict):
        weight = state_dict[f"{name}.weight"]
        assert 0.9 < weight.std() * weight.shape[1] ** 0.5 < 1.1, name


def test_full_ideogram4_has_211_linears():
    shapes = small_models.ideogram4_shapes(small_models.FULL)
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert len(small_models.linears(meta)) == 211
    assert 9.2e9 < sum(tensor.numel() for tensor in meta.values()) < 9.4e9


def test_host_uses_the_same_small_sizes():
    from host_harness.small_ideogram4 import patch

    size, config = small_models.SMALL, patch.IDEOGRAM4
    assert (size.heads, size.head_dim) == (config["num_attention_heads"], config["attention_head_dim"])
    assert (size.ffn, size.adaln) == (config["intermediate_size"], config["adaln_dim"])
    assert size.llm == config["llm_features_dim"]


def test_host_samples_small_ideogram4(comfy_host, tmp_path):
    state_dicts = [small_models.ideogram4(branch) for branch in ("conditional", "unconditional")]
    paths = [small_models.save(tmp_path / f"{i}.safetensors", state_dicts[i]) for i in range(2)]
    conditional, unconditional = (comfy_host.load_diffusion_model(path) for path in paths)
    assert type(conditional.model).__name__ == "Ideogram4"
    assert not unloaded_keys(conditional, state_dicts[0])
    latent = comfy_host.sample(conditional, unconditional, steps=2, width=128, height=128)
    assert latent.shape == (1, 128, 8, 8)
    assert latent.isfinite().all() and latent.std() > 0.1
    alone = comfy_host.sample(conditional, conditional, steps=2, width=128, height=128)
    assert (latent - alone).norm() > 0.05 * latent.norm(), "the branches should differ"


@pytest.mark.parametrize(
    "name, make, width, pooled_width",
    [("Flux", small_models.flux, 256, 64), ("Lumina2", small_models.lumina2, 256, 0)],
    ids=["flux", "lumina2"],
)
def test_host_samples_other_architectures(comfy_host, name, make, width, pooled_width):
    state_dict = make()
    model = comfy_host.load_state_dict(state_dict)
    assert type(model.model).__name__ == name
    missing = {key.replace("_norm.scale", "_norm.weight") for key in state_dict}
    assert missing == set(model.model.diffusion_model.state_dict())
    positive = comfy_host.conditioning(width, pooled_width=pooled_width)
    latent = comfy_host.sample(model, positive=positive, steps=2, width=128, height=128)
    assert latent.isfinite().all() and latent.std() > 0.1
    other = comfy_host.sample(
        model,
        positive=comfy_host.conditioning(width, seed=1, pooled_width=pooled_width),
        steps=2,
        width=128,
        height=128,
    )
    assert not torch.equal(latent, other), "the text should matter"


def test_writes_every_gguf_type(tmp_path):
    gguf = pytest.importorskip("gguf")
    state_dict = small_models.ideogram4()
    key = "layers.0.attention.qkv.weight"
    for ggml_type in small_models.GGUF_TYPES:
        path = small_models.write_gguf(tmp_path / f"{ggml_type}.gguf", {"cond.": state_dict}, linear=ggml_type)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert tensors.keys() == {f"cond.{name}" for name in state_dict}
        tensor = tensors[f"cond.{key}"]
        assert tensor.tensor_type.name == ggml_type
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert values.shape == state_dict[key].shape
        assert 0.8 < values.std() / state_dict[key].std() < 1.2


def test_gguf_without_architecture_and_with_every_weight_packed(tmp_path):
    gguf = pytest.importorskip("gguf")
    state_dict = small_models.ideogram4()
    path = small_models.write_gguf(
        tmp_path / "a.gguf",
        state_dict,
        linear="Q4_0",
        every_weight=True,
        architecture=None,
        prefix=small_models.HOST_PREFIX,
    )
    reader = gguf.GGUFReader(path)
    assert "general.architecture" not in reader.fields
    types = {tensor.name.removeprefix(small_models.HOST_PREFIX): tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[key] for key in state_dict if key.endswith(".weight")} == {"Q4_0"}


@pytest.mark.parametrize("convrot", [False, True], ids=["plain", "convrot"])
def test_host_reads_its_own_int8(comfy_host, convrot):
    """The native layout is what the stock loader calls native: the weights stay quantized, the output is near."""
    state_dict = small_models.ideogram4()
    quantized = comfy_host.load_state_dict(small_models.int8_native(state_dict, convrot=convrot))
    weight = quantized.model.diffusion_model.layers[0].attention.qkv.weight
    assert type(weight.data).__name__ == "QuantizedTensor"
    near(comfy_host, quantized, state_dict)


@pytest.mark.parametrize("marker", ["comfy_quant", "scaled_fp8"])
def test_host_reads_scaled_fp8(comfy_host, tmp_path, marker):
    state_dict = small_models.ideogram4()
    path = small_models.save(tmp_path / "fp8.safetensors", small_models.fp8_scaled(state_dict, marker=marker))
    near(comfy_host, comfy_host.load_diffusion_model(path), state_dict, tolerance=0.1)


def near(host, model, state_dict, tolerance=0.05):
    size = {"steps": 2, "width": 128, "height": 128}
    expected = host.sample(host.load_state_dict(state_dict), **size)
    assert (host.sample(model, **size) - expected).norm() < tolerance * expected.norm()


@pytest.fixture(scope="module")
def stand_ins(comfy_server):
    return small_models.write_stand_ins(comfy_server.base_directory)


def test_server_runs_the_stock_graph(comfy_server, stand_ins):
    steps = []
    prompt = graphs.stock_ideogram4(stand_ins, latent="stock")
    outputs = comfy_server.queue(prompt, on_progress=steps.append)
    image = next(path for path in comfy_server.files(outputs) if path.suffix == ".png")
    assert image.read_bytes().startswith(b"\x89PNG")
    from PIL import Image

    with Image.open(image) as picture:
        assert picture.size == (256, 256)
    latent = load_file(comfy_server.base_directory / "output" / "stock.safetensors")["samples"]
    assert latent.shape == (1, 128, 16, 16) and latent.isfinite().all() and latent.std() > 0.1
    sampled = [(step.value, step.maximum) for step in steps if step.node == "SamplerCustomAdvanced" and step.maximum]
    assert sampled[-1] == (2, 2)


def test_server_tells_which_node_failed(comfy_server, stand_ins):
    damaged = comfy_server.base_directory / "models" / "diffusion_models" / "damaged.safetensors"
    damaged.write_bytes(b"not a model")
    prompt = graphs.stock_ideogram4(stand_ins | {"conditional": damaged.name}, text=None)
    with pytest.raises(server.PromptError) as error:
        comfy_server.queue(prompt)
    assert error.value.node_type == "UNETLoader" and error.value.node_id == "model"
    with pytest.raises(server.PromptError, match=r"missing\.safetensors"):
        comfy_server.queue(graphs.stock_ideogram4(stand_ins | {"conditional": "missing.safetensors"}))


def test_page_opens_and_gives_the_prompt_that_we_convert(comfy_server, stand_ins, browser_page):
    """Our converter and the page's own agree on a workflow that the page has saved."""
    page = browser_page(comfy_server.url)
    prompt = graphs.stock_ideogram4(stand_ins, text="hello")
    page.evaluate("prompt => window.app.loadApiJson(prompt, 'stock')", prompt)
    workflow = page.evaluate("() => window.app.graph.serialize()")
    expected = page.evaluate("() => window.app.graphToPrompt().then(result => result.output)")
    converted = graphs.from_workflow(workflow, comfy_server.object_info())
    assert {key: value["class_type"] for key, value in converted.items()} == {
        key: value["class_type"] for key, value in expected.items()
    }
    assert {key: value["inputs"] for key, value in converted.items()} == {
        key: value["inputs"] for key, value in expected.items()
    }
