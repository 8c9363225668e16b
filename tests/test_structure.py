"""The structure of the repository, kept true: who imports whom, what an import of the pack costs, what texts may not
say."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("formats", "kernels", "loaders", "convert", "evaluation", "host", "nodes")

# What a folder may import of the others; arrows of the architecture point this way.
ALLOWED = {
    "formats": set(),
    "kernels": {"formats"},
    "loaders": {"formats"},
    "convert": {"formats", "loaders"},
    "evaluation": {"formats", "kernels", "loaders", "convert"},
    "host": {"formats", "kernels", "loaders", "convert", "evaluation"},
    "nodes": {"host"},
}
HOST_PACKAGES = (
    "comfy",
    "comfy_api",
    "comfy_kitchen",
    "comfy_aimdo",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
)


def modules(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    """Absolute names of everything a file imports; the pack's own modules as `formats.int8` and the like."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            found |= {f"{module}.{alias.name}" if module else alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_the_architecture_allows(folder):
    wrong = []
    for path in modules(folder):
        for name in imports(path):
            top = name.partition(".")[0]
            if top in FOLDERS and top != folder and top not in ALLOWED[folder]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert modules(folder) and not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_host_and_nodes_know_the_host_and_only_triton_files_know_triton(folder):
    wrong = []
    for path in modules(folder):
        for name in imports(path):
            top = name.partition(".")[0]
            if top in HOST_PACKAGES and folder not in ("host", "nodes"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if top == "triton" and path.name != "triton_impl.py":
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if top == "gguf":
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_importing_the_pack_is_cheap_and_brings_no_triton_and_no_gguf():
    program = (
        "import importlib.util, sys, time\n"
        f"root = {str(ROOT)!r}\n"
        "spec = importlib.util.spec_from_file_location('lowbit', root + '/__init__.py', "
        "submodule_search_locations=[root])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['lowbit'] = module\n"
        "start = time.perf_counter(); spec.loader.exec_module(module)\n"
        "print(time.perf_counter() - start, 'triton' in sys.modules, 'gguf' in sys.modules, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, *imported = result.stdout.split()
    assert imported == ["False", "False", "False"]
    assert float(seconds) < 0.2


def test_the_whole_extension_brings_no_triton_and_no_gguf():
    """formats, kernels and loaders, which the nodes pull in; torch itself may know where triton is, but not import
    ours."""
    program = (
        "import importlib.util, sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        f"root = {str(ROOT)!r}\n"
        "spec = importlib.util.spec_from_file_location('lowbit', root + '/__init__.py', "
        "submodule_search_locations=[root])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['lowbit'] = module; "
        "spec.loader.exec_module(module)\n"
        "import lowbit.formats, lowbit.kernels.quantized_linear, lowbit.loaders.branch\n"
        "print(sorted(n for n in set(sys.modules) - before if n.partition('.')[0] in ('triton', 'gguf', 'comfy')))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
