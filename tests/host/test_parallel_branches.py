"""Two branches on two GPUs: the unconditional call runs beside the conditional one, and changes nothing else.

Without two GPUs the second call runs beside the first on the same device: the same code but for the copies.
"""

import threading
import types

import pytest
import torch
from host_harness import quantized_models as quantized


@pytest.fixture(scope="module")
def branches(comfy_host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    return [quantized.load(quantized.write(folder, "q4_k", branch)) for branch in ("conditional", "unconditional")]


@pytest.fixture
def beside(monkeypatch, comfy_host):
    """Every second model counts as one on another GPU."""
    from lowbit.host import parallel_branches

    monkeypatch.setattr(parallel_branches, "_is_another_gpu", lambda device, other: True)


class Calls:
    """Records which model ran in which thread; `meet` makes both calls wait for each other."""

    def __init__(self, monkeypatch, branches, meet=False):
        self.threads = {"conditional": [], "unconditional": []}
        barrier = threading.Barrier(2, timeout=20)
        for name, patcher in zip(self.threads, branches, strict=True):
            diffusion_model = patcher.model.diffusion_model
            monkeypatch.setattr(
                diffusion_model, "forward", self._recorded(name, diffusion_model.forward, meet, barrier)
            )

    def _recorded(self, name, forward, meet, barrier):
        def recorded(*args, **kwargs):
            self.threads[name].append(threading.current_thread())
            if meet:
                barrier.wait()
            return forward(*args, **kwargs)

        return recorded


def sampled(host, models, **options):
    return host.sample(*models, width=128, height=128, **options)


def test_the_calls_meet_and_the_image_is_the_same(comfy_host, branches, monkeypatch, beside):
    with pytest.MonkeyPatch.context() as one_after_the_other:
        from lowbit.host import parallel_branches

        one_after_the_other.setattr(parallel_branches, "_is_another_gpu", lambda device, other: False)
        calls = Calls(one_after_the_other, branches)
        expected = sampled(comfy_host, branches, steps=3)
        assert {thread for threads in calls.threads.values() for thread in threads} == {threading.main_thread()}
    calls = Calls(monkeypatch, branches, meet=True)
    assert torch.equal(sampled(comfy_host, branches, steps=3), expected)
    assert calls.threads["conditional"] == 3 * [threading.main_thread()]
    assert len(calls.threads["unconditional"]) == 3
    assert threading.main_thread() not in calls.threads["unconditional"]
    assert not any(thread.is_alive() for thread in calls.threads["unconditional"])


def test_a_step_without_guidance_has_no_second_call(comfy_host, branches, monkeypatch, beside):
    override = comfy_host.module("comfy_extras.nodes_custom_sampler").CFGOverride
    model = override.execute(branches[0], 1.0, 0.5, 1.0).result[0]
    calls = Calls(monkeypatch, branches)
    sampled(comfy_host, (model, branches[1]), steps=4)
    assert len(calls.threads["conditional"]) == 4 > len(calls.threads["unconditional"]) > 0


def test_further_calls_in_a_step_see_the_model_itself(comfy_host, branches, monkeypatch, beside):
    """Guidance by other packs calls the model again, after the guider has both results."""
    seen = []

    def once_more(args):
        result = comfy_host.comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )[0]
        seen.append(torch.equal(result, args["cond_denoised"]))
        return args["denoised"]

    model = branches[0].clone()
    model.set_model_sampler_post_cfg_function(once_more)
    calls = Calls(monkeypatch, branches)
    sampled(comfy_host, (model, branches[1]))
    assert seen == [True, True]
    assert len(calls.threads["unconditional"]) == 2


def test_a_pack_that_hands_on_other_latents(comfy_host, branches, monkeypatch, beside):
    """A call that nobody comes for is made once, then no more: the image is the same."""
    expected = sampled(comfy_host, branches, steps=3)
    model = branches[0].clone()
    wrappers = comfy_host.module("comfy.patcher_extension").WrappersMP
    model.add_wrapper_with_key(
        wrappers.CALC_COND_BATCH, "other", lambda execute, model, conds, x, *rest: execute(model, conds, x * 1.0, *rest)
    )
    calls = Calls(monkeypatch, branches)
    assert torch.equal(sampled(comfy_host, (model, branches[1]), steps=3), expected)
    assert len(calls.threads["conditional"]) == 3
    assert [thread is threading.main_thread() for thread in calls.threads["unconditional"]].count(False) == 1


OF_OPTIONS = {
    **{name: {name: {"one": 1}} for name in ("multigpu_clones", "context_handler", "model_function_wrapper")},
    # EasyCache's, for instance: it takes the last call for one of the same model.
    **{
        kind: {"transformer_options": {"wrappers": {kind: {"a key": [print]}}}}
        for kind in ("diffusion_model", "apply_model")
    },
}


@pytest.mark.parametrize("name", ["mask", "control", "gligen", *OF_OPTIONS])
def test_what_both_calls_share_is_left_to_the_host(comfy_host, beside, name):
    from lowbit.host.parallel_branches import other_device

    guider = types.SimpleNamespace(uncond_inner=object(), _uncond_conds=[{"uuid": 1}])
    guider.uncond_model_patcher = types.SimpleNamespace(load_device=torch.device("cuda", 1))
    device, thing = torch.device("cuda", 0), torch.ones(2)
    assert other_device(guider, device, {}) == torch.device("cuda", 1)
    if name in OF_OPTIONS:
        assert other_device(guider, device, OF_OPTIONS[name]) is None
    else:
        guider._uncond_conds.append({name: thing})
        assert other_device(guider, device, {}) is None


def test_what_the_second_call_runs_into_reaches_the_user(comfy_host, branches, monkeypatch, beside):
    expected = sampled(comfy_host, branches)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for the second branch")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(branches[1].model.diffusion_model, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError, match="no room for the second branch"):
            sampled(comfy_host, branches)
    assert torch.equal(sampled(comfy_host, branches), expected)


@pytest.mark.parametrize("interrupted", [0, 1], ids=["in_the_conditional_call", "in_the_unconditional_call"])
def test_cancelling(comfy_host, branches, monkeypatch, beside, interrupted):
    management = comfy_host.comfy.model_management
    expected = sampled(comfy_host, branches)
    diffusion_model = branches[interrupted].model.diffusion_model
    forward = diffusion_model.forward

    def cancelled(*args, **kwargs):
        management.interrupt_current_processing()
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusion_model, "forward", cancelled)
        with pytest.raises(management.InterruptProcessingException):
            sampled(comfy_host, branches)
    management.interrupt_current_processing(False)
    assert torch.equal(sampled(comfy_host, branches), expected)


def test_one_model_for_both_is_left_to_the_host(comfy_host, branches, monkeypatch):
    """On one device, and with guiders that have one model: no thread."""
    calls = Calls(monkeypatch, branches)
    sampled(comfy_host, branches)
    sampled(comfy_host, branches[:1])
    assert {thread for threads in calls.threads.values() for thread in threads} == {threading.main_thread()}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["int8_smooth", "q4_k"])
@pytest.mark.parametrize("other", ["conditional", "unconditional"])
def test_on_two_gpus(comfy_host, tmp_path, kind, other):
    """A branch that Select Model Device put on the second GPU gives the same image from there, LoRA included."""
    select = comfy_host.module("comfy_extras.nodes_multigpu").SelectModelDeviceNode
    models = [
        quantized.load(quantized.write(tmp_path, kind, branch), "auto", "bf16")
        for branch in ("conditional", "unconditional")
    ]
    models[0] = quantized.add_lora(comfy_host, models[0], quantized.lora())
    expected = sampled(comfy_host, models)
    moved = 0 if other == "conditional" else 1
    models[moved] = select.execute(models[moved], "gpu:1").result[0]
    assert models[moved].load_device == torch.device("cuda", 1)
    with pytest.MonkeyPatch.context() as patched:
        calls = Calls(patched, models)
        found = sampled(comfy_host, models)
    assert threading.main_thread() not in calls.threads["unconditional"]
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["int8_smooth", "q4_k"])
def test_the_hosts_split_of_one_models_calls(comfy_host, tmp_path, kind):
    """MultiGPU CFG Split: the host's own threads run a copy of the model on each GPU."""
    split = comfy_host.module("comfy.multigpu").create_multigpu_deepclones
    model = quantized.load(quantized.write(tmp_path, kind), "auto", "bf16")

    def image(model):
        latent = {"samples": torch.zeros(1, 128, 8, 8)}
        positive, negative = comfy_host.conditioning(tokens=8), comfy_host.conditioning(tokens=8, seed=9)
        sampler = comfy_host.nodes.KSampler()
        return sampler.sample(model, 0, 2, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    expected = image(model)
    assert quantized.relative(image(split(model, 2)), expected) < 1e-2  # one call of two branches, or two of one
