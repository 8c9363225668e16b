"""Hosts that are too old: one sentence in the log, and everything else of the host works."""

import pytest
from host_harness import inprocess


@pytest.fixture
def compat(comfy_host):
    from lowbit.host import compat

    compat.check_host.cache_clear()
    yield compat
    compat.check_host.cache_clear()


def test_this_host_has_what_is_needed(compat):
    compat.check_host()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [("comfy.quant_ops", "register_layout_class"), ("comfy_api.torch_helpers.torch_compile", "COMPILE_KEY")],
)
def test_an_attribute_that_older_hosts_lack(comfy_host, compat, monkeypatch, module, attribute):
    monkeypatch.delattr(comfy_host.module(module), attribute)
    with pytest.raises(RuntimeError) as refused:
        compat.check_host()
    assert str(refused.value) == (
        f"Lowbit needs ComfyUI {compat.OLDEST_HOST} or newer; this is ComfyUI {comfy_host.version}, which lacks "
        f"{module}.{attribute}. Update ComfyUI, and its requirements."
    )


def test_a_module_that_older_hosts_lack(comfy_host, compat, monkeypatch):
    monkeypatch.setitem(compat._NEEDED, "comfy.ldm.of_the_future", ("Model",))
    with pytest.raises(RuntimeError, match=r"lacks comfy\.ldm\.of_the_future \(No module named 'comfy\.ldm\.of_the_fu"):
        compat.check_host()


def test_an_older_host_starts_without_the_pack(tmp_path):
    """Another pack takes away what an older host lacks, in the script that the host runs before it imports any pack."""
    from host_harness.server import ComfyServer

    if inprocess.find_host() is None:
        pytest.skip(inprocess.missing_host_reason())
    older = tmp_path / "custom_nodes" / "a_older_host"
    older.mkdir(parents=True)
    older.joinpath("__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    older.joinpath("prestartup_script.py").write_text(
        "import comfy.ldm.ideogram4.model\ndel comfy.ldm.ideogram4.model.Ideogram4TransformerBlock\n"
    )
    with ComfyServer(tmp_path, test_nodes=False) as server:
        log = server.log_text()
        assert server.failed_imports() == ["lowbit"]
        assert server.object_info("Lowbit_LoadDiffusionModelInt8") == {}
        assert server.object_info("KSampler")
    assert "Lowbit needs ComfyUI 0.30.0 or newer; this is ComfyUI" in log
    assert "lacks comfy.ldm.ideogram4.model.Ideogram4TransformerBlock. Update ComfyUI" in log
