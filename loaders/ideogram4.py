"""What is particular to Ideogram 4: two weight sets, told apart only by the file's name or prefix."""

from __future__ import annotations

from collections.abc import Iterable

# What only text tokens pass through: the unconditional branch, which sees image tokens alone, may leave it out.
TEXT_ONLY_MODULES = ("llm_cond_norm", "llm_cond_proj")

# Module names that no other diffusion transformer has together.
_MARKS = ("embed_image_indicator", "adaln_proj", "t_embedding")


def is_ideogram4(keys: Iterable[str]) -> bool:
    """Whether these keys (without branch and model prefix) are those of an Ideogram 4 transformer."""
    modules = {key.partition(".")[0] for key in keys}
    return all(mark in modules for mark in _MARKS)
