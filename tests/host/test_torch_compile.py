"""torch.compile of models with quantized weights: no graph break of ours, and the results of eager mode."""

import pytest
import torch
import torch._dynamo
from host_harness import quantized_models as quantized
from host_harness.torch_version import HOSTS_COMPILE_NODE

CASES = [
    ("int8", "exact"),
    ("int8", "int8"),
    ("int8_smooth", "int8"),
    ("q4_k", "exact"),
    ("q8_0", "int8"),
    ("q4_k", "auto"),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def model(request, comfy_host, tmp_path):
    kind, mode = request.param
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield quantized.load(quantized.write(tmp_path, kind), mode)
    torch._dynamo.reset()


@pytest.mark.parametrize("patch", [None, "lora", "lokr", "dora"])
def test_layers_are_one_graph(comfy_host, model, patch):
    """`fullgraph` makes a graph break an error; what is compiled are linear layers of one block."""
    patched = model if patch is None else quantized.add_lora(comfy_host, model, quantized.lora(patch))
    comfy_host.comfy.model_management.load_models_gpu([patched])
    layer = model.model.diffusion_model.layers[0]
    x = torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(0))

    def run(x):
        return layer.feed_forward(layer.attention.o(x)) + layer.attention.qkv(x)[..., :256]

    expected = run(x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def graph_breaks(host, patcher) -> set[str]:
    """Why the compiler leaves the graph in one call of the whole model, whose result is checked against eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = quantized.output(host, patcher)
    original = patcher.model.diffusion_model
    patcher.model.diffusion_model = torch.compile(original, backend="aot_eager")
    try:
        actual = quantized.output(host, patcher)
    finally:
        patcher.model.diffusion_model = original
    assert quantized.relative(actual, expected) < 1e-5
    breaks = set(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    return breaks


@pytest.fixture(scope="module")
def stock_breaks(comfy_host, tmp_path_factory):
    """Those of a stock model of the same architecture: the host's own code."""
    model = quantized.load(quantized.write(tmp_path_factory.mktemp("stock"), "q8_0"))
    return graph_breaks(comfy_host, quantized.full_precision(comfy_host, model))


@pytest.mark.parametrize("kind, mode", [("int8", "int8"), ("q4_k", "exact")])
@pytest.mark.usefixtures("plain_patcher")  # dynamic VRAM streams weights by code that cannot be traced
def test_the_whole_model_breaks_where_a_stock_model_breaks(comfy_host, tmp_path, stock_breaks, kind, mode):
    model = quantized.add_lora(comfy_host, quantized.load(quantized.write(tmp_path, kind), mode), quantized.lora())
    assert graph_breaks(comfy_host, model) <= stock_breaks


@HOSTS_COMPILE_NODE
def test_stock_node_with_inductor(comfy_host, tmp_path):
    """The node that artists use, with its own backend."""
    torch._dynamo.reset()
    model = quantized.load(quantized.write(tmp_path, "int8"), "int8")
    expected = comfy_host.sample(model, width=128, height=128)
    compiled = (
        comfy_host.module("comfy_extras.nodes_torch_compile").TorchCompileModel.execute(model, "inductor").result[0]
    )
    assert quantized.relative(comfy_host.sample(compiled, width=128, height=128), expected) < 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
