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
