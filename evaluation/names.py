"""Layers by their names: which of them are the same layer of different blocks."""

from __future__ import annotations


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """`layers.7.feed_forward.w2` -> (`layers.N.feed_forward.w2`, 7); a layer outside the blocks has no depth."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:index], "N", *parts[index + 1 :]]), int(part)
    return name, None
