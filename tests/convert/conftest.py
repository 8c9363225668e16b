import pytest
import torch
from lowbit.tests.convert import making


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Small tensors gain nothing from threads, and on a busy machine threads wait for each other much longer than they
    compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fp8_files(tmp_path_factory):
    """The official FP8 layout, one file a branch: by branch name."""
    folder = tmp_path_factory.mktemp("sources")
    return {branch: making.fp8(folder, branch) for branch in making.BRANCHES}
