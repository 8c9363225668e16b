"""Which layer becomes what: protected layers, and the types of a GGUF file by preset or JSON.

A policy file for GGUF, all entries but `default` optional:

    {"default": "Q4_K",                                    linear layers worth quantizing
     "layers": {"*.feed_forward.w2": "Q8_0"},              by pattern or name, first match first; any weight
     "rest": "BF16"}                                       everything else

Without `rest`, F16 stays F16 and other matrices and convolutions are BF16. Norms, biases, parameters that are no
`weight`, tensors of other than two or four dimensions and such of at most 16,384 elements are F32: other programs read
these as F32 or F16 alone. An empty tensor is always F32.

Patterns are compared with keys without `.weight`: `layers.0.ffn_norm1`, `input_proj.bias`. F32, F16 and BF16 count for
any tensor of floats, the other types for weights of two and more dimensions alone: `layers.0.*` as Q8_0 leaves the
norms and biases of that layer to the patterns after it, and to `rest`. A pattern without any effect is refused.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set

from ..formats import UnknownQuantizationError
from ..formats.ggml import TYPES, type_from_name
from ..loaders.errors import quoted
from ..loaders.policy import layers_meant
from .record import FragileLayer

WRITABLE = tuple(name for name, ggml_type in TYPES.items() if ggml_type.can_quantize)
PRESETS = tuple(name.lower() for name in WRITABLE if TYPES[name].plain_dtype is None)
# Of a fragility report's layers, unless someone says otherwise: as in the published recipe for Ideogram 4.
PROTECT_COUNT = 17
# Types that hold tensors which are not quantized.
PLAIN = tuple(name for name, ggml_type in TYPES.items() if ggml_type.plain_dtype is not None)


@dataclasses.dataclass(frozen=True)
class GgufPolicy:
    """default: the type of linear layers worth quantizing. layers: type by pattern. rest: a plain type, or None for the
    one that other programs read."""

    default: str
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rest: str | None = None

    def wanted(self, key: str, weight, quantize: bool) -> str | None:
        """The type for a tensor of floats; None for the rest's. quantize: whether it is a layer worth quantizing."""
        pattern = self._pattern(key, weight)
        return self.layers[pattern] if pattern is not None else self.default if quantize else None

    def check_patterns(self, weights: Mapping[str, object], protected: Set[str] = frozenset()) -> None:
        """Raises ValueError for a pattern that decides about none of a model's tensors of floats: it would be ignored
        without a word. weights: of all branches. protected: modules that no pattern decides about."""
        deciding = {self._pattern(key, weight) for key, weight in weights.items() if module_of(key) not in protected}
        for pattern in (each for each in self.layers if each not in deciding):
            fitting = [key for key in weights if fnmatch.fnmatchcase(module_of(key), pattern)]
            if not fitting:
                names = list(map(module_of, weights))
                raise ValueError(
                    f"policy: {pattern!r} fits no weight of the model. Names look like {names[len(names) // 2]}."
                )
            counting = [key for key in fitting if self._counts(pattern, key, weights[key])]
            if not counting:
                raise ValueError(
                    f"policy: {pattern!r} fits no weight that {self.layers[pattern]} could be for, only such as "
                    f"{module_of(fitting[0])}, of shape {list(weights[fitting[0]].shape)}. Norms, biases and other "
                    f"tensors that are no matrices are stored as {', '.join(PLAIN)}."
                )
            if all(module_of(key) in protected for key in counting):
                raise ValueError(f"policy: {pattern!r} has no effect, because all that it fits is protected.")
            counting = [key for key in counting if module_of(key) not in protected]
            earlier = self._pattern(counting[0], weights[counting[0]])
            raise ValueError(
                f"policy: {pattern!r} has no effect, because patterns before it fit all that it fits: "
                f"{module_of(counting[0])} is decided by {earlier!r}. Put the narrower pattern first."
            )

    def _pattern(self, key: str, weight) -> str | None:
        """The pattern that decides about a tensor of floats."""
        module = module_of(key)
        fitting = (pattern for pattern in self.layers if fnmatch.fnmatchcase(module, pattern))
        return next((pattern for pattern in fitting if self._counts(pattern, key, weight)), None)

    def _counts(self, pattern: str, key: str, weight) -> bool:
        return self.layers[pattern] in PLAIN or (key.endswith(".weight") and len(weight.shape) >= 2)


def module_of(key: str) -> str:
    """What patterns are compared with."""
    return key.removesuffix(".weight")


def read_policy(preset_or_path: str) -> GgufPolicy:
    """A preset by name (`q4_k`), or a policy file. Raises ValueError."""
    if preset_or_path.lower() in PRESETS:
        return GgufPolicy(preset_or_path.upper())
    try:
        with open(preset_or_path, "rb") as file:
            policy = json.loads(file.read(2**20))
    except OSError as error:
        raise ValueError(
            f"policy {quoted(preset_or_path)}: found no such file ({error.strerror}), expected a policy file (JSON) or "
            f"one of {', '.join(PRESETS)}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{preset_or_path}: found no JSON ({error}), expected a policy.") from error
    return _checked_policy(preset_or_path, policy)


def _checked_policy(path: str, policy: object) -> GgufPolicy:
    fields = {field.name for field in dataclasses.fields(GgufPolicy)}
    if not isinstance(policy, dict) or "default" not in policy or not policy.keys() <= fields:
        found = sorted(policy) if isinstance(policy, dict) else policy
        raise ValueError(f"{path}: found {quoted(found)}, expected an object with default, and maybe layers and rest.")
    layers, rest = policy.get("layers", {}), policy.get("rest")
    if not isinstance(layers, dict):
        raise ValueError(f"{path}: found {quoted(layers)} as layers, expected an object: pattern -> type.")
    default = _type(path, "default", policy["default"], WRITABLE)
    layers = {pattern: _type(path, pattern, name, WRITABLE) for pattern, name in layers.items()}
    return GgufPolicy(default, layers, None if rest is None else _type(path, "rest", rest, PLAIN))


def _type(path: str, entry: str, name: object, known: Sequence[str]) -> str:
    """The type's name in capitals. Raises ValueError for one that is not known."""
    if isinstance(name, str) and name.upper() in known:
        return name.upper()
    reason = ""
    if isinstance(name, str) and name.upper() not in WRITABLE:
        try:
            reason = f" ({type_from_name(name.upper()).name} can only be read)"
        except UnknownQuantizationError:
            reason = " (no such type)"
    raise ValueError(
        f"{path}: found the type {quoted(name)}{reason} for {quoted(entry)}, expected one of {', '.join(known)}."
    )


def protected_layers(
    path: str, names: Sequence[str], wanted: Iterable[str], report: Sequence[FragileLayer] = (), count: int = 0
) -> set[str]:
    """Those of the linear layers `names` that stay unquantized.

    wanted: entries for `loaders.policy.layers_meant`. report: its first `count` layers that are among
    `names` stay too. Raises ValueError.
    """
    protected = set()
    for entry in wanted:
        protected |= layers_meant("protected layers", entry, names, path)
    if report:
        quantizable = set(names)
        known = [layer.name for layer in report if layer.name in quantizable]
        if not known:
            raise ValueError(
                f"fragility report: none of its {len(report)} layers, such as {report[0].name}, is a layer of "
                f"{os.path.basename(path)} that would be quantized. Pick the report of this model."
            )
        protected.update(known[:count])
    return protected
