"""What outlives a call lies in few blocks, which go with the last tensor in them."""

import gc
import weakref

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def kept(comfy_host):
    from lowbit.host.kept_memory import KeptMemory

    return KeptMemory()


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_share_blocks_and_keep_their_values(kept, device):
    from lowbit.host.kept_memory import BLOCK_BYTES

    shapes = [(3, 1), (0,), (513,), (64, 32, 2), (BLOCK_BYTES // 8,), (BLOCK_BYTES // 8,), (BLOCK_BYTES // 4 + 1,)]
    values = [torch.randn(shape, device=device) for shape in shapes]
    values.append(torch.arange(7, dtype=torch.int8, device=device))
    copies = [kept.keep(value) for value in values]
    for value, copy in zip(values, copies, strict=True):
        assert copy.dtype == value.dtype and torch.equal(copy, value) and copy.is_contiguous()
        assert copy.numel() == 0 or copy.data_ptr() % 64 == 0
    # The fifth fills the first block, the sixth starts another, and the seventh is larger than a block.
    assert len({storage(copy) for copy in copies[:5] if copy.numel()}) == 1
    assert len({storage(copy) for copy in copies if copy.numel()}) == 3


def test_a_copy_made_in_inference_mode_can_be_trained_with(kept):
    with torch.inference_mode():
        copy = kept.keep(torch.ones(4, 4))
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 4, requires_grad=True)
        torch.nn.functional.linear(x, copy).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4), 4.0))
    with torch.inference_mode():
        kept.keep(torch.ones(4, 4))  # into the same block


def test_a_block_lives_as_long_as_a_tensor_in_it(kept):
    first, second = kept.keep(torch.ones(5)), kept.keep(torch.ones(5))
    block, _ = kept._filling[first.device]
    del first
    gc.collect()
    assert block() is not None and torch.equal(second, torch.ones(5))
    del second
    gc.collect()
    assert block() is None
    assert torch.equal(kept.keep(torch.full((5,), 2.0)), torch.full((5,), 2.0))


def test_a_lora_that_is_let_go_leaves_nothing_where_row_scales_lie(comfy_host, tmp_path):
    """Of all tensors that a model keeps beside its weights, each in memory of its own once cost 2 GiB."""
    from host_harness import quantized_models as quantized

    model = quantized.load(quantized.write(tmp_path, "q4_k"), "int8", dtype="bf16")
    patched = quantized.add_lora(comfy_host, model, quantized.lora("lora"))
    quantized.output(comfy_host, patched)
    linears = quantized.quantized_linears(patched).values()
    scales = [module._row_scale for module in linears if module._row_scale is not None]
    sides = [side for module in linears for side in module.model_patches]
    matrices = [matrix for side in sides for matrix in side._matrices]
    assert len(scales) > 5 and len(matrices) > 5
    (of_scales,), (of_matrices,) = {storage(tensor) for tensor in scales}, {storage(tensor) for tensor in matrices}
    assert of_scales != of_matrices
    block = weakref.ref(matrices[0].lowbit_block)
    del matrices
    assert block() is not None
    for side in sides:
        side.release()
    assert block() is None
