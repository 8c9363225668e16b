"""The node Compile Model (Lowbit): each model by its own weights, blocks as one graph each, patches as ever.

Backends here are `eager` with a counter, where what is compiled and called matters, and inductor once for each route.
"""

import dataclasses

import pytest
import torch
import torch._dynamo
from host_harness import graphs
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from host_harness.torch_version import HOSTS_BYPASS_IN_ONE_GRAPH, HOSTS_COMPILE_NODE, TORCH
from safetensors.torch import load_file

LAYERS = small.SMALL.layers
CASES = [("int8", "int8"), ("int8_smooth", "exact"), ("q4_k", "exact"), ("q4_k", "int8")]
BRANCHES = ("conditional", "unconditional")


class CountingBackend:
    """Runs graphs as they are; counts those it was given to compile and the calls of what it made of them."""

    def __init__(self):
        self.compiled = self.calls = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run

    def take_calls(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def backend():
    return CountingBackend()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, which compile_model raises
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _attention_of_gpus(comfy_host, monkeypatch):
    """The attention that models get on a GPU. The host's choice for CPUs asks how much memory is free, which no
    compiler can trace: see test_graph_breaks_of_the_host."""
    attention = comfy_host.module("comfy.ldm.modules.attention").attention_pytorch
    for module, name in (
        ("ideogram4.model", "optimized_attention_masked"),
        ("lumina.model", "optimized_attention_masked"),
        ("flux.math", "optimized_attention"),
    ):
        monkeypatch.setattr(comfy_host.module(f"comfy.ldm.{module}"), name, attention)


@pytest.fixture(scope="module", params=[("int8", "int8"), ("q4_k", "exact")], ids=lambda case: "-".join(case))
def pair(request, tmp_path_factory):
    """The models of the two branches."""
    kind, mode = request.param
    folder = tmp_path_factory.mktemp("compile")
    return [quantized.load(quantized.write(folder, kind, branch), mode) for branch in BRANCHES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return quantized.load(quantized.write(tmp_path_factory.mktemp("compile"), "int8"))


def compiled(model, backend):
    from lowbit.host.compile import compile_model

    return compile_model(model, backend)


def sample(host, *models, **options):
    return host.sample(*models, steps=2, width=128, height=128, **options)


def graph_breaks() -> set[str]:
    return set(torch._dynamo.utils.counters["graph_break"])


# Two models of one guider


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["both", "positive", "negative"])
def test_each_model_by_its_own_weights(comfy_host, pair, backend, which):
    """Dual Model CFG Guider: the latent of eager mode, and every block of the compiled models ran compiled."""
    expected = sample(comfy_host, *pair)
    models = [compiled(model, backend) if i in which else model for i, model in enumerate(pair)]
    assert quantized.relative(sample(comfy_host, *models), expected) < 1e-5
    assert backend.calls == len(which) * 2 * LAYERS
    assert not graph_breaks()


@HOSTS_COMPILE_NODE
def test_the_stock_node_runs_the_positive_model_twice(comfy_host, pair):
    """Why this node exists. If this fails, the host has mended it."""
    stock = comfy_host.module("comfy_extras.nodes_torch_compile").TorchCompileModel
    models = [stock.execute(model, "eager").result[0] for model in pair]
    with_stock = sample(comfy_host, *models)
    assert quantized.relative(with_stock, sample(comfy_host, *pair)) > 0.5
    assert quantized.relative(with_stock, sample(comfy_host, pair[0], pair[0])) < 1e-5


def test_the_stock_node_before_this_one_is_undone(comfy_host, pair, backend):
    stock = comfy_host.module("comfy_extras.nodes_torch_compile").TorchCompileModel
    models = [compiled(stock.execute(model, "eager").result[0], backend) for model in pair]
    assert quantized.relative(sample(comfy_host, *models), sample(comfy_host, *pair)) < 1e-5
    assert backend.calls == 2 * 2 * LAYERS


@pytest.mark.parametrize("kind, mode, bound", [("int8", "int8", 5e-4), ("q4_k", "exact", 1e-5)])
def test_inductor(comfy_host, tmp_path, kind, mode, bound):
    """Its rounding differs in the last bit, which moves a few activations to the next code where they are quantized."""
    pair = [quantized.load(quantized.write(tmp_path, kind, branch), mode) for branch in BRANCHES]
    expected = sample(comfy_host, *pair)
    models = [compiled(model, "inductor") for model in pair]
    assert quantized.relative(sample(comfy_host, *models), expected) < bound
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not graph_breaks()


def test_cudagraphs(comfy_host, pair):
    """On a CPU the backend runs its graphs as they are."""
    expected = sample(comfy_host, *pair)
    models = [compiled(model, "cudagraphs") for model in pair]
    for _ in range(3):
        assert quantized.relative(sample(comfy_host, *models), expected) < 1e-5


def test_a_bypass_lora_before_a_copy_with_its_own_modules_is_refused(comfy_host, model, monkeypatch):
    """Dynamic VRAM: what is compiled as a whole is loaded once more, and the host's injections stay with the source."""
    from lowbit.host.compile import compile_model

    bypassed = quantized.add_lora(comfy_host, model, quantized.lora(), bypass=True)
    monkeypatch.setattr(type(bypassed), "is_dynamic", lambda self: True)
    with pytest.raises(ValueError, match=r"Compile Model: 'bypass_lora' .* behind Compile Model"):
        compile_model(bypassed, "cudagraphs")


def test_ordinary_guiders(comfy_host, pair, backend):
    """KSampler with a batch of positive and negative, and the guider that calls one model alone."""

    def sampled(model):
        positive, negative = (comfy_host.conditioning(tokens=8, seed=seed) for seed in (0, 9))
        latent = {"samples": torch.zeros(1, 128, 8, 8)}
        sampler = comfy_host.nodes.KSampler()
        return sampler.sample(model, 0, 2, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    model = compiled(pair[0], backend)
    assert quantized.relative(sampled(model), sampled(pair[0])) < 1e-5
    assert backend.take_calls() >= 2 * LAYERS
    assert quantized.relative(sample(comfy_host, model), sample(comfy_host, pair[0])) < 1e-5
    assert backend.calls == 2 * LAYERS


# What is compiled


@pytest.mark.parametrize(
    "patch", [None, "lora", "lokr", "dora", pytest.param("bypass", marks=HOSTS_BYPASS_IN_ONE_GRAPH)]
)
@pytest.mark.parametrize(
    "kind, mode", [("int8", "int8"), ("int8_smooth", "exact"), ("q4_k", "exact"), ("q4_k", "int8"), ("q4_k", "auto")]
)
def test_a_block_is_one_graph(comfy_host, tmp_path, backend, kind, mode, patch):
    model = quantized.load(quantized.write(tmp_path, kind), mode)
    if patch is not None:
        file = quantized.lora("lora" if patch == "bypass" else patch)
        model = quantized.add_lora(comfy_host, model, file, bypass=patch == "bypass")
    expected = quantized.output(comfy_host, model)
    for _ in range(2):
        assert quantized.relative(quantized.output(comfy_host, compiled(model, backend)), expected) < 1e-5
        assert backend.take_calls() == LAYERS
    assert not graph_breaks()


def test_graph_breaks_of_the_host(comfy_host, model, backend, monkeypatch):
    """Its attention for CPUs leaves the graph to read how much memory is free; nothing else does."""
    if torch.cuda.is_available():
        pytest.skip("the host asks the GPU how much memory is free, not the operating system")
    attention = comfy_host.module("comfy.ldm.modules.attention").attention_sub_quad
    monkeypatch.setattr(comfy_host.module("comfy.ldm.ideogram4.model"), "optimized_attention_masked", attention)
    expected = quantized.output(comfy_host, model)
    assert quantized.relative(quantized.output(comfy_host, compiled(model, backend)), expected) < 1e-5
    assert all("builtin operator `open`" in reason for reason in graph_breaks())


def deeper(folder, layers: int = 4, floats: tuple[str, ...] = ()):
    """A model of more blocks; layers whose name contains one of `floats` stay unquantized."""
    state_dict = small.ideogram4(size=dataclasses.replace(small.SMALL, layers=layers))
    modules = [name for name in small.block_linears(state_dict) if not any(part in name for part in floats)]
    return small.save(folder / "deeper.safetensors", small.int8_native(state_dict, modules=modules))


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_blocks_share_their_code(comfy_host, tmp_path, backend, mode):
    model = quantized.load(deeper(tmp_path), mode)
    quantized.output(comfy_host, compiled(model, backend))
    assert (backend.compiled, backend.calls) == (1, 4)
    quantized.output(comfy_host, compiled(model, backend))  # the node run once more
    assert (backend.compiled, backend.calls) == (1, 8)


def test_blocks_of_other_formats_are_variants(comfy_host, tmp_path, backend):
    """Protected layers: two blocks of four keep a float w2."""
    model = quantized.load(deeper(tmp_path, floats=("layers.1.feed_forward.w2", "layers.3.feed_forward.w2")))
    quantized.output(comfy_host, compiled(model, backend))
    assert (backend.compiled, backend.calls) == (2, 4)


def test_other_sizes_compile_once_more(comfy_host, model, backend):
    patched = compiled(model, backend)
    for size in (128, 192, 256, 320):
        expected = comfy_host.sample(model, width=size, height=size)
        assert quantized.relative(comfy_host.sample(patched, width=size, height=size), expected) < 1e-5
    assert backend.compiled == 2, "for the first size, and for any"
    assert backend.calls == 4 * 2 * LAYERS


def test_many_variants_stay_compiled(comfy_host, model, backend):
    """More variants of a block than torch's own limit, at which it would go on without compiling."""
    linears = [name for name in small.block_linears(small.ideogram4()) if name.startswith("layers.0.")]
    for first, last in [(i, i + length) for length in (1, 2) for i in range(len(linears) + 1 - length)]:
        file = quantized.lora(modules=linears[first:last])
        expected = quantized.output(comfy_host, quantized.add_lora(comfy_host, model, file))
        patched = quantized.add_lora(comfy_host, compiled(model, backend), file)
        for _ in range(2):
            assert quantized.relative(quantized.output(comfy_host, patched), expected) < 1e-5
            assert backend.take_calls() == LAYERS
    assert backend.compiled > 8


@pytest.mark.parametrize("write, blocks", [("flux", 6), ("lumina2", 3)])
def test_other_architectures(comfy_host, tmp_path, backend, write, blocks):
    state_dict = small.flux(depth=3) if write == "flux" else small.lumina2(layers=3)
    model = quantized.load(small.write_gguf(tmp_path / "model.gguf", state_dict, linear="Q8_0"))
    positive = comfy_host.conditioning(width=256, pooled_width=64)
    expected = sample(comfy_host, model, positive=positive)
    assert quantized.relative(sample(comfy_host, compiled(model, backend), positive=positive), expected) < 1e-5
    assert backend.calls == 2 * blocks
    assert not graph_breaks()


def test_a_model_that_repeats_no_block_is_compiled_whole(comfy_host, tmp_path, backend):
    model = quantized.load(small.write_gguf(tmp_path / "flux.gguf", small.flux(depth=1), linear="Q8_0"))
    positive = comfy_host.conditioning(width=256, pooled_width=64)
    expected = sample(comfy_host, model, positive=positive)
    assert quantized.relative(sample(comfy_host, compiled(model, backend), positive=positive), expected) < 1e-5
    assert (backend.compiled, backend.calls) == (1, 2)


# Patchers


@pytest.mark.parametrize("order", ["lora_first", "compile_first"])
def test_lora(comfy_host, model, backend, order):
    add = lambda patcher, strength=0.7: quantized.add_lora(comfy_host, patcher, quantized.lora(), strength)  # noqa: E731
    plain, with_lora = quantized.output(comfy_host, model), quantized.output(comfy_host, add(model))
    assert quantized.relative(with_lora, plain) > 0.01
    base = compiled(model, backend)
    patched = add(base) if order == "compile_first" else compiled(add(model), backend)
    twice = ((base, plain), (patched, with_lora), (patched, with_lora))
    for patcher, expected in (*twice, *twice):
        assert quantized.relative(quantized.output(comfy_host, patcher), expected) < 1e-5
        assert backend.take_calls() == LAYERS
    stronger = quantized.output(comfy_host, add(model, 1.4))
    assert quantized.relative(quantized.output(comfy_host, add(base, 1.4)), stronger) < 1e-5
    assert torch.equal(quantized.output(comfy_host, model), plain)
    # Without, and with any strength; torch 2.7 compiles anew for each.
    assert backend.compiled == (2 if TORCH >= (2, 8) else 5)


def test_a_compiled_clone_leaves_its_source_alone(comfy_host, model, backend):
    expected = quantized.output(comfy_host, model)
    clone = compiled(model, backend)
    for patcher, calls in ((model, 0), (clone, LAYERS), (clone.clone(), LAYERS), (model.clone(), 0), (clone, LAYERS)):
        assert quantized.relative(quantized.output(comfy_host, patcher), expected) < 1e-5
        assert backend.take_calls() == calls


def test_a_clone_with_modules_of_its_own_runs_them(comfy_host, model, backend):
    """As the host makes one for hooks under dynamic VRAM and for each further GPU."""
    original = compiled(model, backend)
    copy = original.clone(force_deepcopy=True)
    assert copy.model is not original.model
    weight = copy.model.diffusion_model.layers[0].ffn_norm2.weight
    weight.data = weight.data * 3
    changed = quantized.output(comfy_host, copy)
    assert backend.take_calls() == LAYERS
    assert quantized.relative(changed, quantized.output(comfy_host, original)) > 0.01
    assert backend.take_calls() == LAYERS


def test_unloaded_and_loaded_again(comfy_host, model, backend):
    patched = compiled(model, backend)
    expected = quantized.output(comfy_host, model)
    for _ in range(2):
        assert quantized.relative(quantized.output(comfy_host, patched), expected) < 1e-5
        comfy_host.unload()
    assert (backend.compiled, backend.calls) == (1, 2 * LAYERS)


def test_two_backends_one_after_the_other(comfy_host, model, backend):
    """The last node of a chain decides."""
    unused = CountingBackend()
    quantized.output(comfy_host, compiled(compiled(model, unused), backend))
    assert (unused.compiled, backend.compiled) == (0, 1)


@pytest.mark.parametrize("order", ["patch_first", "compile_first"])
def test_a_replaced_forward_is_compiled(comfy_host, model, backend, order):
    """An object patch on a block's own `forward`, such as a fused block."""
    block = model.model.diffusion_model.layers[0]

    def forward(x, *args, **kwargs):
        return type(block).forward(block, x, *args, **kwargs) * 0.5

    def patch(patcher):
        patcher = patcher.clone()
        patcher.add_object_patch("diffusion_model.layers.0.forward", forward)
        return patcher

    plain, expected = quantized.output(comfy_host, model), quantized.output(comfy_host, patch(model))
    assert quantized.relative(plain, expected) > 0.01
    base = compiled(model, backend)
    patched = patch(base) if order == "compile_first" else compiled(patch(model), backend)
    assert quantized.relative(quantized.output(comfy_host, patched), expected) < 1e-5
    assert backend.take_calls() == LAYERS
    assert not graph_breaks()
    assert quantized.relative(quantized.output(comfy_host, base), plain) < 1e-5


def test_nothing_keeps_a_compiled_model_alive(comfy_host, tmp_path, backend):
    import gc
    import weakref

    patched = compiled(quantized.load(quantized.write(tmp_path, "int8")), backend)
    quantized.output(comfy_host, patched)
    inner = weakref.ref(patched.model)
    comfy_host.unload()
    del patched
    gc.collect()
    assert inner() is None


def test_saved_tensors_are_the_same(comfy_host, model, backend):
    patched = compiled(model, backend)
    quantized.output(comfy_host, patched)
    saved = patched.model_state_dict_for_saving()
    assert saved.keys() == model.model_state_dict_for_saving().keys()


@pytest.mark.parametrize("newer", [False, True])
def test_what_was_fetched_is_let_go_when_fetching_fails(comfy_host, monkeypatch, newer):
    """ComfyUI 0.34 and later ask for the block beside its layers."""
    from lowbit.host import compile as compile_

    prefetch, let_go = comfy_host.module("comfy.model_prefetch"), []
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in block:
        layer._v = object()

    def fails(queue, device, module):
        raise torch.OutOfMemoryError("no room")

    cleanup = (lambda module, layers: let_go.append((module, layers))) if newer else (lambda ls: let_go.append(ls))
    monkeypatch.setattr(prefetch, "prefetch_queue_pop", fails)
    monkeypatch.setattr(prefetch, "cleanup_prefetched_modules", cleanup)
    with pytest.raises(torch.OutOfMemoryError), compile_._weights_on_device(block, torch.device("cuda")):
        pass
    assert let_go == [(block, list(block)) if newer else list(block)]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind, mode", [("int8", "int8"), ("q4_k", "exact")])
def test_dynamic_vram(comfy_host, tmp_path, kind, mode, backend):
    """The patcher stays dynamic and its weights stay where they were; a LoRA that the host merges goes in and out."""
    if not comfy_host.dynamic_vram:
        pytest.skip("the host has not started dynamic VRAM (comfy-aimdo)")
    model = quantized.load(quantized.write(tmp_path, kind), mode)
    patched = compiled(model, backend)
    assert patched.is_dynamic()
    file = quantized.lora() | quantized.lora("dora", modules=["layers.1.feed_forward.w2"]) | quantized.vectors()
    for apply in (lambda m: m, lambda m: quantized.add_lora(comfy_host, m, file), lambda m: m):
        expected = quantized.output(comfy_host, apply(model))
        for _ in range(2):
            assert quantized.relative(quantized.output(comfy_host, apply(patched)), expected) < 1e-5
            assert backend.take_calls() == LAYERS
    linears = quantized.quantized_linears(patched)
    assert all(hasattr(module, "_v") and not hasattr(module, "_prefetch") for module in linears.values())
    assert all(module.weight.device.type == "cpu" for module in linears.values())
    assert not graph_breaks()


# Through the server


def test_through_the_server(comfy_server):
    """The two loader outputs through a node each, with the backend that artists use."""
    names = small.write_stand_ins(comfy_server.base_directory)
    folder = comfy_server.base_directory / "models" / "diffusion_models"
    files = [quantized.write(folder, "int8", branch).name for branch in BRANCHES]
    prompt = graphs.stock_ideogram4(names, text=None, latent="plain")
    del prompt["model_negative"]
    inputs = {"checkpoint": files[0], "unconditional": files[1], "compute_mode": "exact", "dtype": "fp32"}
    prompt["model"] = graphs.node("Lowbit_LoadDiffusionModelInt8", **inputs)
    prompt = graphs.rewired(prompt, {("model_negative", 0): ("model", 1)})
    with_nodes = graphs.rewired(prompt, {("model", i): (f"compile_{i}", 0) for i in range(2)})
    for i in range(2):
        with_nodes[f"compile_{i}"] = graphs.node("Lowbit_CompileModel", model=["model", i], backend="inductor")
    with_nodes = graphs.with_inputs(with_nodes, "LowbitTest_SaveLatent", filename="compiled")
    latents = []
    for each, name in ((prompt, "plain"), (with_nodes, "compiled")):
        comfy_server.queue(each)
        latents.append(load_file(comfy_server.base_directory / "output" / f"{name}.safetensors")["samples"])
    assert quantized.relative(latents[1], latents[0]) < 1e-5
    assert comfy_server.log_text().count(f"torch.compile will compile {LAYERS} blocks") == 2


def test_the_node_as_the_page_sees_it(comfy_server):
    information = comfy_server.object_info("Lowbit_CompileModel")
    assert information["display_name"] == "Compile Model (Lowbit)"
    inputs = information["input"]["required"]
    assert set(inputs) == {"model", "backend"} and all(options["tooltip"] for _, options in inputs.values())
    stock = comfy_server.object_info("TorchCompileModel")["input"]["required"]
    assert inputs["backend"][1]["options"] == stock["backend"][1]["options"]
