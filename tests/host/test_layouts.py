"""Quantized weights as the host's tensors."""

import dataclasses

import torch
from lowbit.formats import int8


def test_what_a_tensor_stands_for_is_remembered_until_the_host_replaces_it(comfy_host):
    from lowbit.host import layouts

    weight = int8.quantize_weight(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    tensor = layouts.to_host(weight, torch.bfloat16)
    first = layouts.from_host(tensor)
    assert layouts.from_host(tensor) is first and first.data is weight.data
    tensor._params = dataclasses.replace(tensor._params, scale=2 * weight.scale)
    assert torch.equal(layouts.from_host(tensor).scale, 2 * weight.scale)
    tensor._qdata = -weight.data
    assert torch.equal(layouts.from_host(tensor).data, -weight.data)


def test_tensors_of_others_stand_for_nothing_of_ours(comfy_host):
    from comfy_kitchen.tensor import TensorWiseINT8Layout
    from lowbit.host import layouts

    data, params = TensorWiseINT8Layout.quantize(torch.randn(8, 16))
    stock = comfy_host.module("comfy.quant_ops").QuantizedTensor(data, "TensorWiseINT8Layout", params)
    assert layouts.from_host(stock) is None and layouts.from_host(stock) is None
    assert layouts.from_host(torch.zeros(8, 16)) is None and layouts.from_host(None) is None
