"""Tests against the real host, in this process."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _as_the_host_runs_nodes():
    """The host runs every prompt, loading and unloading included, in inference mode."""
    with torch.inference_mode():
        yield
