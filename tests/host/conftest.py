"""Tests against the real host, in this process."""

import pytest
import torch


@pytest.fixture(scope="module")
def plain_patcher(comfy_host):
    """For tests that drive the host's plain model patcher step by step; test_dynamic_vram has the other one's."""
    if comfy_host.dynamic_vram:
        pytest.skip("drives the plain model patcher, but dynamic VRAM is on (LOWBIT_TEST_DEVICE=cpu runs it)")


@pytest.fixture(scope="session", autouse=True)
def _as_the_host_runs_nodes():
    """The host runs every prompt, loading and unloading included, in inference mode."""
    with torch.inference_mode():
        yield
