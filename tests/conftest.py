"""The pack is a folder with an `__init__.py`, not an installed package: register it once under one fixed name.

`python -m pytest` would put the repository root on `sys.path`, where our `nodes/` hides the host's `nodes.py`:
run `pytest`.
"""

import importlib.util
import os
import pathlib
import sys

import pytest
import torch

# Without a GPU the Triton kernels run under Triton's interpreter, which has to be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = {"lowbit": ROOT, "host_harness": ROOT / "tests" / "host_harness"}


def _register_package(name: str, folder: pathlib.Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name, _folder in PACKAGES.items():
    if _name not in sys.modules:
        _register_package(_name, _folder)


def pytest_collection_modifyitems(items):
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device, found none"
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "needs Triton, which is not installed"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU; LOWBIT_TEST_DEVICE names another."""
    return torch.device(os.environ.get("LOWBIT_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session", autouse=True)
def _tuning_results_in_a_folder_of_this_session(tmp_path_factory):
    """Kernels tuned by a test neither read nor write the user's own results."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.mktemp("tuning")))
        yield


@pytest.fixture(scope="session")
def comfy_host(tmp_path_factory):
    """The real host, imported into this process with the small models' sizes: a `host_harness.inprocess.Host`."""
    from host_harness import inprocess

    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    return inprocess.start(tmp_path_factory.mktemp("comfy_host"))


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory):
    """The real host as a server on the CPU, with this pack and the test nodes: a `host_harness.server.ComfyServer`."""
    from host_harness import inprocess, server

    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    with server.ComfyServer(tmp_path_factory.mktemp("comfy_server")) as running:
        yield running


@pytest.fixture(scope="session")
def _browser():
    from host_harness import browser

    with browser.launch() as launched:
        yield launched


@pytest.fixture
def browser_page(_browser):
    """open(url) -> a new page with the host's editor loaded; pages are closed after the test."""
    from host_harness import browser

    pages = []

    def open_page(url: str):
        pages.append(browser.open_editor(_browser, url))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill what `torch.empty` and `torch.empty_like` return with NaN (or the largest integer): a forgotten element
    shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
