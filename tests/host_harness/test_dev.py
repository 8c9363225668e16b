"""`dev.py` without the network: what it unpacks, what it leaves out, when it has something to do."""

import importlib.util
import io
import subprocess
import sys
import tarfile

import pytest
from host_harness.inprocess import ROOT


@pytest.fixture
def dev(monkeypatch):
    spec = importlib.util.spec_from_file_location("lowbit_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return module


def make_archive(path, names):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    return path


def test_extract_strips_the_folder_and_leaves_the_rest(dev, tmp_path):
    archive = make_archive(tmp_path / "a.tar.gz", ["a-1/vendor/Host/main.py", "a-1/vendor/Host/x/y.py", "a-1/setup.py"])
    dev.extract(archive, "a-1/vendor/Host/", tmp_path / "host")
    files = {path.relative_to(tmp_path / "host").as_posix() for path in (tmp_path / "host").rglob("*.py")}
    assert files == {"main.py", "x/y.py"}


@pytest.mark.parametrize("name", ["../../outside.py", "/outside.py", "c:/outside.py"])
def test_extract_refuses_paths_that_leave_the_folder(dev, tmp_path, name):
    archive = make_archive(tmp_path / "a.tar.gz", [f"host/{name}"])
    with pytest.raises(dev.SetupError, match="unsafe path"):
        dev.extract(archive, "host/", tmp_path / "host")
    assert not list(tmp_path.rglob("outside.py"))


def test_requirements_that_are_left_out(dev):
    names = ["torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs", "PyOpenGL"]
    assert all(dev.LEFT_OUT.fullmatch(name) for name in names)
    assert not any(dev.LEFT_OUT.fullmatch(name) for name in ["torchsde", "comfyui-frontend-package", "comfy-kitchen"])


def test_fingerprint_follows_the_checkout(dev, monkeypatch, tmp_path):
    pinned = dev.fingerprint(dev.comfyui_path())
    (tmp_path / "comfy").mkdir()
    (tmp_path / "requirements.txt").write_text("einops\n")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    first = dev.fingerprint(dev.comfyui_path())
    (tmp_path / "requirements.txt").write_text("einops\naiohttp\n")
    assert len({pinned, first, dev.fingerprint(dev.comfyui_path())}) == 3


def test_a_wrong_comfyui_path_is_told(dev, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(dev.SetupError, match="holds no ComfyUI"):
        dev.comfyui_path()


@pytest.mark.parametrize("command", [[], ["setup"], ["test"], ["demo"], ["serve"]], ids=" ".join)
def test_help(command):
    done = subprocess.run([sys.executable, ROOT / "dev.py", *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout
