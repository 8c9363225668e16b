"""Which linear layers are quantized on the fly, when a float checkpoint is loaded as INT8."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence

# Below this the product is too small for int8 to pay, and the layer too small for its bytes to matter.
SMALLEST_DIMENSION = 256

# `layers.7.attention.qkv`: a layer of the repeated blocks.
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
# Computed for one token, or no product.
_ONE_TOKEN = re.compile(
    r"adaln|modulation|(^|[._])mod[cx]{0,2}([._]|$)|norm|embed|(time|label)_emb|emb_layers|distilled_guidance"
    r"|param_generator",
    re.IGNORECASE,
)


def quantizes(name: str, N: int, K: int, protected: Sequence[str] = ()) -> bool:
    """Whether the linear layer of this module name and weight shape [N, K] becomes INT8.

    The products inside the repeated blocks do: they hold nearly all parameters and see all tokens. What feeds them
    (input, text and time projections), what reads them out, and modulation layers, which see one token, stay as they
    are.

    protected: what `fits` the names of layers that stay too.
    """
    if min(N, K) < SMALLEST_DIMENSION or any(fits(entry, name) for entry in protected):
        return False
    return bool(_IN_BLOCK.search(name)) and not _ONE_TOKEN.search(name)


def linears_worth_quantizing(weights: Mapping[str, object], protected: Sequence[str] = ()) -> list[str]:
    """The modules whose weight is quantized unless someone says otherwise, in the model's order."""
    shapes = {key.removesuffix(".weight"): w.shape for key, w in weights.items() if key.endswith(".weight")}
    return [name for name, shape in shapes.items() if len(shape) == 2 and quantizes(name, *shape, protected)]


def layers_meant(option: str, entry: str, names: Sequence[str], path: str) -> set[str]:
    """Those of the layers worth quantizing `names` that an entry of an option `fits`. Raises ValueError for none."""
    found = {name for name in names if fits(entry, name)}
    if not found:
        raise ValueError(
            f"{option}: {entry!r} fits no layer of {os.path.basename(path)} that would be quantized. Names look like "
            f"{names[len(names) // 2]}."
        )
    return found


def fits(entry: str, name: str) -> bool:
    """Whether what somebody wrote means a layer's name: a part of it, of whole dotted components (`layers.1` is a part
    of `layers.1.attention` and none of `layers.10.attention`), or a pattern with `*`, `?` and `[]` for all of it."""
    entry = entry.strip().strip(".")
    if any(character in entry for character in "*?["):
        return fnmatch.fnmatchcase(name, entry)
    return bool(entry) and f".{entry}." in f".{name}."
