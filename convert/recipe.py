"""What a file says about itself: how it was made, from what, and what its source said.

No times, names or paths: the same input and options give the same bytes.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping

from ..loaders.branches import BRANCHES
from .gguf_header import FILE_TYPES, QUANTIZATION_VERSION

RECIPE = "lowbit.recipe"
# A source's metadata about its own container, types and bytes, which its conversion does not share.
_OF_THE_SOURCE = re.compile(
    r"format$|_quantization_metadata$|lowbit\.|gguf\.|comfy\.gguf\.|split\.|general\.(architecture|file_type|"
    r"quantization_version|alignment)$|modelspec\.hash_sha256$|sshs_",
    re.IGNORECASE,  # gguf-py has fields of its own, GGUF.version among them
)
_LONGEST_KEY = 1000  # in bytes; GGUF readers know limits


def tool_version() -> str:
    """The version of this pack; `pyproject.toml` is its only place."""
    text = (pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1)


def recipe_text(settings: Mapping[str, object]) -> str:
    """The recipe as JSON: the options, and the hashes of the files that were read."""
    return json.dumps({"tool": "lowbit", "version": tool_version(), **settings})


def branch_of_recipe(metadata: Mapping[str, object]) -> str | None:
    """The one branch that a file says it was made from; None for several, for none, and for files of others."""
    try:
        sources = json.loads(metadata[RECIPE])["source_sha256"]
        (branch,) = sources
    except (LookupError, ValueError, TypeError, RecursionError):  # others may write anything under this name
        return None
    return branch if branch in BRANCHES else None


def safetensors_metadata(source: Mapping[str, object], recipe: str) -> dict[str, str]:
    return {**_carried(source), "format": "pt", RECIPE: recipe}


def gguf_metadata(
    source: Mapping[str, object], recipe: str, architecture: str | None, file_type: str
) -> dict[str, str | int]:
    """architecture: None leaves it out. file_type: the GGML type of most elements."""
    metadata: dict[str, str | int] = {} if architecture is None else {"general.architecture": architecture}
    if file_type in FILE_TYPES:
        metadata["general.file_type"] = FILE_TYPES[file_type]
    metadata["general.quantization_version"] = QUANTIZATION_VERSION
    return {**metadata, **_carried(source), RECIPE: recipe}


def _carried(source: Mapping[str, object]) -> dict[str, str]:
    """What the source says about the model: licence, title, the host's configuration."""
    return {
        key: value
        for key, value in source.items()
        if key and isinstance(value, str) and not _OF_THE_SOURCE.match(key) and len(key.encode()) < _LONGEST_KEY
    }
