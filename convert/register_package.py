"""Run, not imported, by what starts as a program (`runpy.run_path`): the pack as the package `lowbit`.

The pack is a folder under any name, not an installed package: `lowbit` is what its modules are imported by.
"""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Python puts the folder of a program on the path, where our `gguf.py` and others would hide packages of that name.
sys.path[:] = [entry for entry in sys.path if not entry or pathlib.Path(entry).resolve().parent != ROOT]
if "lowbit" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "lowbit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
