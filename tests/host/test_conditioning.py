"""Conditioning is moved to the device once, at the start of a sampling."""

import pytest
import torch
from host_harness import quantized_models as quantized


class Guider:
    def __init__(self, **model_conds):
        self.conds = {"positive": [{"strength": 1.0, "model_conds": model_conds}], "negative": [{"uuid": 1}]}


def test_tensors_are_where_the_noise_is_when_the_sampler_starts(comfy_host):
    from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, CONDRegular
    from lowbit.host import conditioning

    features, latents = CONDRegular(torch.ones(2, 3)), CONDList([torch.ones(2)])
    guider = Guider(
        text=features, attention=CONDCrossAttn(torch.ones(1, 2, 3)), guidance=CONDConstant(3.5), ref=latents
    )

    def sampler(guider, sigmas, extra_args, callback, noise, *rest, disable_pbar):
        assert (sigmas, extra_args, callback, rest, disable_pbar) == ("sigmas", {}, None, ("latent", "mask"), True)
        conds = guider.conds["positive"][0]["model_conds"]
        assert conds["text"].cond.device.type == conds["attention"].cond.device.type == "meta"
        assert type(conds["attention"]) is CONDCrossAttn and conds["guidance"].cond == 3.5 and conds["ref"] is latents
        return "samples"

    noise = torch.empty(1, device="meta")
    args = (guider, "sigmas", {}, None, noise, "latent", "mask")
    assert conditioning._sample(sampler, *args, disable_pbar=True) == "samples"
    assert features.cond.device.type == "cpu"  # the prompt's own is left alone: other models read it


def test_the_second_models_negative_is_moved_and_not_the_one_that_serves_nobody(comfy_host):
    from comfy.conds import CONDRegular
    from lowbit.host import conditioning

    guider = Guider(text=CONDRegular(torch.ones(1)))
    guider.conds["negative"] = [{"model_conds": {"text": CONDRegular(torch.ones(2))}}]
    guider._uncond_conds = [{"model_conds": {"text": CONDRegular(torch.ones(3))}}]

    def devices(*args):
        both = guider.conds["negative"], guider._uncond_conds
        return [conds[0]["model_conds"]["text"].cond.device.type for conds in both]

    arguments = (guider, None, {}, None, torch.empty(1, device="meta"))
    assert conditioning._sample(devices, *arguments) == ["cpu", "meta"]
    assert devices() == ["cpu", "cpu"], "the host's cache of nodes may keep the guider"


def test_what_was_moved_goes_back_after_an_error(comfy_host):
    from comfy.conds import CONDRegular
    from lowbit.host import conditioning

    guider = Guider(text=CONDRegular(torch.ones(1)))
    with pytest.raises(ZeroDivisionError):
        conditioning._sample(lambda *args: 1 / 0, guider, None, {}, None, torch.empty(1, device="meta"))
    assert guider.conds["positive"][0]["model_conds"]["text"].cond.device.type == "cpu"


@pytest.mark.parametrize("negative", [True, False])
def test_a_sampling_with_two_models(comfy_host, tmp_path, monkeypatch, negative):
    from comfy_extras.nodes_custom_sampler import Guider_DualModel
    from lowbit.host import conditioning

    model = quantized.load(quantized.write(tmp_path, "int8"))
    guider = Guider_DualModel(model, model.clone())
    text = comfy_host.conditioning(tokens=8)
    guider.set_conds(text, comfy_host.conditioning(tokens=5) if negative else [[None, {}]])
    moved = []
    original = conditioning._moved
    monkeypatch.setattr(conditioning, "_moved", lambda value, device: moved.append(value) or original(value, device))
    noise = torch.zeros(1, 128, 4, 4)
    sampler = comfy_host.comfy.samplers.sampler_object("euler")
    guider.set_cfg(2.0)
    guider.sample(noise, noise, sampler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True)
    tokens = {value.cond.shape[1] for value in moved if getattr(value.cond, "dim", lambda: 0)() == 3}
    assert tokens == ({8, 5} if negative else {8})


@pytest.mark.parametrize("cloned", [False, True])
def test_every_sampling_with_a_loaded_model_begins_so(comfy_host, tmp_path, monkeypatch, cloned):
    from lowbit.host import conditioning

    model = quantized.load(quantized.write(tmp_path, "int8"))
    devices = []
    moved = conditioning._moved
    monkeypatch.setattr(conditioning, "_moved", lambda value, device: devices.append(device) or moved(value, device))
    comfy_host.sample(model.clone() if cloned else model, steps=3, width=64, height=64)
    device = comfy_host.comfy.model_management.get_torch_device()
    assert 0 < len(devices) <= 4 and {found.type for found in devices} == {device.type}  # not once a step
