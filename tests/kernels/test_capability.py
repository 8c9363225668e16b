"""Why Triton does not run somewhere, as it is told in the log and in Inspect Quantized Model."""

import subprocess

import pytest
import torch
import torch._dynamo
from lowbit.kernels import capability
from lowbit.kernels.quantized_linear import has_fused_kernels

pytestmark = pytest.mark.triton
GPU = torch.device("cuda", 0)


@pytest.fixture
def launch(monkeypatch):
    """launch(function) stands for what happens when the first kernel is built on a GPU of compute capability 8.6."""
    monkeypatch.setattr(capability, "device_capability", lambda device: (8, 6))
    monkeypatch.setattr(capability, "_launch_failures", {})
    return lambda function: monkeypatch.setattr(capability, "_launch", function)


def failing(error):
    def launch(device):
        raise error

    return launch


def test_a_kernel_that_can_be_launched(launch):
    launch(lambda device: None)
    assert capability.triton_refusal(GPU) is None and has_fused_kernels(GPU)


def test_a_machine_without_a_compiler(launch):
    launch(failing(RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")))
    assert capability.triton_refusal(GPU) == (
        "cannot build a kernel here: RuntimeError: Failed to find C compiler. Please specify via CC environment "
        "variable."
    )
    assert not has_fused_kernels(GPU)
    launch(lambda device: None)
    assert not has_fused_kernels(GPU), "it is tried once"


def test_a_compiler_that_fails_is_told_in_short(launch):
    """Its command names its folders, by chance one with a word that errors of a moment have."""
    command = [r"D:\captured\python\tcc.exe", *(f"-Ifolder{i}" for i in range(99)), "-o", "kernel.pyd"]
    launch(failing(subprocess.CalledProcessError(1, command)))
    reason = capability.triton_refusal(GPU)
    assert reason.startswith("cannot build a kernel here: CalledProcessError: Command") and len(reason) < 220
    assert "tcc.exe" in reason and reason.endswith("returned non-zero exit status 1.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    ],
)
def test_what_passes_says_nothing_about_kernels(launch, error):
    launch(failing(error))
    assert capability.triton_refusal(GPU) is None
    launch(failing(RuntimeError("Failed to find C compiler")))
    assert capability.triton_refusal(GPU) is not None, "it is tried again"


def test_nothing_is_launched_while_a_model_is_compiled(launch):
    tried = []
    launch(tried.append)
    torch._dynamo.reset()

    def add_one(x):
        return x + 1 if capability.triton_refusal(GPU) is None else x

    assert torch.compile(add_one, backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [1, 1]
    assert not tried
    torch._dynamo.reset()


def test_the_kernel_that_is_tried(device):
    """In the interpreter, where there is no GPU."""
    capability._launch(device)
