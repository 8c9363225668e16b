"""Whatever goes wrong in a prompt, the next one is right: over HTTP, in the real host."""

import itertools
import os
import pathlib
import time

import psutil
import pytest
import torch
from host_harness import graphs
from host_harness import quantized_models as quantized
from host_harness import small_models as small
from safetensors.torch import load_file

INT8, GGUF = "Lowbit_LoadDiffusionModelInt8", "Lowbit_LoadDiffusionModelGguf"
KINDS = ("int8", "q4_k")
# A mapped file can be neither deleted nor replaced there: the other program is told so, and nothing changes.
CAN_REPLACE = pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is mapped")


def write_pair(folder: pathlib.Path, kind: str, seed: int) -> list[str]:
    """The files of both branches of a model that `seed` determines, under names that do not depend on it."""
    names = []
    for branch in ("conditional", "unconditional"):
        written = quantized.write(folder, kind, branch, seed)
        names.append(f"faults-{kind}-{branch}{written.suffix}")
        os.replace(written, folder / names[-1])
    return names


class Server:
    """The host with small quantized models, and the prompts that the tests need."""

    def __init__(self, running):
        self.running = running
        self.folder = running.base_directory / "models" / "diffusion_models"
        self.numbers = itertools.count()
        self.names = small.write_stand_ins(running.base_directory)
        self.files = {kind: write_pair(self.folder, kind, seed=0) for kind in KINDS}

    def prompt(self, kind: str, seed: int = 0, steps: int = 2, latent: str = "faults", **fault) -> graphs.Prompt:
        """A prompt that samples anew, with the loader's cached model where the host still has it.

        fault: inputs of the node that fails; by default it does not.
        """
        prompt = graphs.stock_ideogram4(self.names, text=None, latent=latent, seed=seed, steps=steps)
        for unneeded in ("model_negative", "cfg_override", "vae", "decode", "save"):
            del prompt[unneeded]
        conditional, unconditional = self.files[kind]
        loader = {"checkpoint": conditional, "unconditional": unconditional, "compute_mode": "int8", "dtype": "bf16"}
        if kind == "int8":
            loader |= {"base_checkpoint": "none", "base_checkpoint_unconditional": "none"}
        prompt["model"] = graphs.node(INT8 if kind == "int8" else GGUF, **loader)
        prompt = graphs.rewired(prompt, {("model_negative", 0): ("model", 1), ("cfg_override", 0): ("model", 0)})
        prompt = graphs.rewired(prompt, {("model", 0): ("fails", 0)})
        never = {"fault": "interrupt", "call": 4096, "name": f"prompt {next(self.numbers)}"}
        prompt["fails"] = graphs.node("LowbitTest_FailOnce", model=["model", 0], **{**never, **fault})
        return prompt

    def latent(self, prompt: graphs.Prompt) -> torch.Tensor:
        """Runs a prompt and returns the latent that it has written."""
        (path,) = self.running.files(self.running.queue(prompt))
        latent = load_file(path)["samples"].clone()  # Windows deletes no file that is mapped
        path.unlink()
        return latent

    def free(self) -> None:
        """What the page's button and other packs ask for: unload all models, forget all results."""
        self.running.post("/free", {"unload_models": True, "free_memory": True})

    def process(self) -> psutil.Process:
        return psutil.Process(self.running.process.pid)


@pytest.fixture(scope="module")
def server(comfy_server):
    return Server(comfy_server)


@pytest.fixture(scope="module")
def expected(server):
    """The latents of seed 0, each from models that nothing has happened to."""
    latents = {}
    for kind in KINDS:
        server.free()
        latents[kind] = server.latent(server.prompt(kind))
    assert quantized.relative(latents["int8"], latents["q4_k"]) > 0.01
    return latents


@pytest.fixture
def refused(server):
    """prompt -> the text of the error box, of the node that is named."""
    from host_harness.server import PromptError

    def run(prompt: graphs.Prompt, node_type: str) -> str:
        with pytest.raises(PromptError) as failed:
            server.running.queue(prompt)
        assert failed.value.node_type == node_type, failed.value.message
        return failed.value.message

    return run


# Cancelling and running out of memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize(
    ("fault", "message"), [("out_of_memory", "no memory is left"), ("interrupt", "the prompt was interrupted")]
)
def test_a_call_that_does_not_end(server, expected, refused, kind, call, fault, message):
    prompt = server.prompt(kind, steps=5, fault=fault, call=call)
    assert message in refused(prompt, "SamplerCustomAdvanced")
    again = server.latent(prompt)  # the same prompt, queued once more
    server.free()
    assert torch.equal(server.latent(server.prompt(kind, steps=5)), again)
    assert torch.equal(server.latent(server.prompt(kind)), expected[kind])


def test_the_cancel_button(server, expected, refused):
    """Pressed in the middle of a long sampling: it ends within moments, not after the step or the image."""
    from host_harness.server import PromptError

    steps, cancelled = [], []

    def cancel(progress):
        steps.append(progress)
        if progress.value and not cancelled:
            cancelled.append(time.monotonic())
            server.running.post("/interrupt", {})

    with pytest.raises(PromptError, match="interrupted"):
        server.running.queue(server.prompt("int8", steps=200), on_progress=cancel)
    assert max(step.value for step in steps) < 150
    assert time.monotonic() - cancelled[0] < 10
    assert torch.equal(server.latent(server.prompt("int8")), expected["int8"])


def test_cancelling_while_layers_are_quantized(comfy_host, server):
    """The button is looked at before each layer, so that nothing of the load is left."""
    from lowbit.host import model

    management = comfy_host.comfy.model_management
    path = server.folder / server.names["conditional"]
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        model.load_model(model.LoadRequest(str(path), quantize=True))
    assert not management.processing_interrupted()
    assert model.load_model(model.LoadRequest(str(path), quantize=True))


def test_quantizing_while_loading_shows_a_bar(server):
    """A BF16 file loaded as INT8: it counts the layers of a branch."""
    prompt = server.prompt("int8")
    prompt["model"]["inputs"] |= {"checkpoint": server.names["conditional"], "unconditional": "none"}
    steps = []
    server.running.queue(prompt, on_progress=lambda step: steps.append((step.node, step.value, step.maximum)))
    shown = [(value, maximum) for node, value, maximum in steps if node == INT8 and maximum]
    linears = len(small.block_linears(small.ideogram4("conditional")))
    assert {maximum for _, maximum in shown} == {linears}
    assert shown[-1] == (linears, linears)


# Files that change


@CAN_REPLACE
@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_file_is_loaded_anew(server, expected, kind):
    """As downloads and Save nodes do it: another file takes the name of the one that is loaded."""
    assert torch.equal(server.latent(server.prompt(kind)), expected[kind])
    try:
        write_pair(server.folder, kind, seed=1)
        replaced = server.latent(server.prompt(kind))
    finally:
        write_pair(server.folder, kind, seed=0)
    assert quantized.relative(replaced, expected[kind]) > 0.1
    assert torch.equal(server.latent(server.prompt(kind)), expected[kind])


@CAN_REPLACE
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_damaged_while_loaded(server, expected, refused, kind):
    """Cut off in place, as a download that starts again does: a sentence, and not the end of the process."""
    assert torch.equal(server.latent(server.prompt(kind)), expected[kind])
    path = server.folder / server.files[kind][0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    loader = INT8 if kind == "int8" else GGUF
    text = refused(server.prompt(kind), loader)
    assert path.name in text and "download" in text
    path.write_bytes(content)
    assert torch.equal(server.latent(server.prompt(kind)), expected[kind])


@CAN_REPLACE
def test_a_deleted_file(server, expected, refused):
    path = server.folder / server.files["q4_k"][0]
    content = path.read_bytes()
    assert torch.equal(server.latent(server.prompt("q4_k")), expected["q4_k"])
    path.unlink()
    text = refused(server.prompt("q4_k", seed=1), GGUF)
    assert path.name in text
    assert torch.equal(server.latent(server.prompt("int8")), expected["int8"])
    path.write_bytes(content)
    assert torch.equal(server.latent(server.prompt("q4_k")), expected["q4_k"])


# Several models


def test_prompts_of_different_models_queued_together(server, expected):
    prompts = {kind: server.prompt(kind, latent=f"queued_{kind}") for kind in KINDS}
    server.free()
    queued = {
        server.running.post("/prompt", {"prompt": prompt})["prompt_id"]: kind
        for _ in range(2)
        for kind, prompt in prompts.items()
    }
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if all(server.running.get(f"/history/{prompt_id}") for prompt_id in queued):
            break
        time.sleep(0.1)
    for prompt_id, kind in queued.items():
        status = server.running.get(f"/history/{prompt_id}")[prompt_id]["status"]
        assert status["status_str"] == "success", (kind, status)
    for kind in KINDS:
        path = server.running.base_directory / "output" / f"queued_{kind}.safetensors"
        assert torch.equal(load_file(path)["samples"], expected[kind])


@pytest.mark.skipif(not psutil.LINUX, reason="reads /proc")
def test_a_hundred_alternating_prompts_leave_nothing_behind(server, expected):
    """Two models in turn, each pushed out of the host's results by the other: loaded, sampled and let go 50 times."""

    def held() -> dict[str, int]:
        process = server.process()
        maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        return {
            "bytes": process.memory_info().rss,
            "files": len(process.open_files()),  # sockets come and go with the requests
            "threads": process.num_threads(),
            "maps": maps.count("faults-"),
        }

    def prompts(count: int) -> None:
        for index in range(count):
            latent = server.latent(server.prompt(KINDS[index % 2], seed=index % 2))
        assert torch.isfinite(latent).all()

    server.free()
    prompts(20)  # what the host and torch keep for good is there then
    before = held()
    prompts(100)
    after = held()
    assert before["maps"] > 0
    assert after["files"] <= before["files"]
    assert after["threads"] <= before["threads"]
    assert after["maps"] <= before["maps"]
    model_bytes = sum((server.folder / name).stat().st_size for name in server.files["int8"])
    assert after["bytes"] <= before["bytes"] + 2 * model_bytes, (before, after)
    assert torch.equal(server.latent(server.prompt("int8")), expected["int8"])


def test_models_that_others_unload(server, expected):
    for kind in KINDS:
        first = server.latent(server.prompt(kind))
        server.running.post("/free", {"unload_models": True})
        second = server.latent(server.prompt(kind, seed=1))
        server.free()
        assert torch.equal(server.latent(server.prompt(kind)), first)
        assert torch.equal(server.latent(server.prompt(kind, seed=1)), second)
        assert torch.equal(first, expected[kind])
