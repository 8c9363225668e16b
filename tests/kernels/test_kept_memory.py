"""What outlives a call lies in few blocks, which go with the last tensor in them."""

import contextlib
import gc

import pytest
import torch
from lowbit.kernels import kept_memory
from lowbit.kernels.kept_memory import BLOCK_BYTES, KeptMemory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def kept():
    return KeptMemory()


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_share_blocks_and_keep_their_values(kept, device):
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


def test_memory_that_stays_is_allocated_outside_of_a_recording(kept, monkeypatch):
    """A host that records what a block of a model allocates would give it to the next block."""
    inside, made = [], []

    @contextlib.contextmanager
    def outside_recording():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(kept_memory, "outside_recording", outside_recording)
    room = KeptMemory._room
    monkeypatch.setattr(KeptMemory, "_room", lambda self, *args: made.append(bool(inside)) or room(self, *args))
    kept.keep(torch.ones(4))
    assert made == [True] and not inside
