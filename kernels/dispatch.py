"""Which implementation computes an op: ask each one in order, take the first that accepts, say once which and why.

An implementation is a module with `supports(call) -> str | None` (the reason it cannot run the call, or None) and
`run(call)`. Modules load at first use, so importing the pack never imports Triton; one that fails to import refuses
every call with that error. An implementation asked for by name must accept the call, else its reason is raised.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

_library = torch.library.Library("lowbit", "FRAGMENT")

_known_names: set[str] = set()
_logged: set[tuple[str, str]] = set()  # ops and implementations
_named: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowbit_implementation", default=None)


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Compute every op inside the `with` block by the implementation of this name (`reference`, `torch_impl`, ...).

    Ops without such an implementation choose as ever. Raises ValueError for a name that no op has.
    """
    if name not in _known_names:
        raise ValueError(f"no op has an implementation {name!r}; there are {', '.join(sorted(_known_names))}")
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def _alone(function: Callable) -> Callable:
    """The function without its caller's gradients and autocast: implementations would differ in what they record, and
    autocast would compute products of integers in bfloat16."""

    @functools.wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                return function(*args, **keywords)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return function(*args, **keywords)
        return function(*args, **keywords)

    return run


class custom_op:  # noqa: N801, a decorator
    """Registers `torch.ops.lowbit.<name>` from a function with annotated arguments; `register_fake` adds its fake. No
    op has gradients.

    `torch.library.custom_op` does the same and checks on every call that no result aliases an argument. That takes
    longer than launching a kernel, and the ops' tests check it.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, function: Callable) -> custom_op:
        schema = torch.library.infer_schema(function, mutates_args=())
        try:
            _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        except RuntimeError as error:
            if "multiple times" not in str(error):
                raise
            raise RuntimeError(
                f"Lowbit's kernels are already loaded in this process (the op lowbit::{self.name} exists): there is a "
                "second copy of them, in another folder of custom_nodes or inside another pack. Remove one."
            ) from error
        _library.impl(self.name, _alone(function), "CompositeExplicitAutograd")
        return self

    def register_fake(self, function: Callable) -> None:
        torch.library.register_fake(f"lowbit::{self.name}", function, lib=_library)


def named_implementation() -> str | None:
    """The name that `use_implementation` is in force with, or None."""
    return _named.get()


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of the package `package`, with its implementations' module names, fastest first; the last is the
    definition."""

    package: str
    implementations: tuple[str, ...]

    def __post_init__(self) -> None:
        _known_names.update(self.implementations)

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    def import_error(self, name: str) -> str | None:
        """Why this implementation could not be imported, or None."""
        module = _load(self.package, name)
        return module if isinstance(module, str) else None

    def refusals(self, call: Any) -> dict[str, str | None]:
        """Every implementation's answer to the call: None where it accepts, otherwise its reason."""
        return {name: _supports(self.package, name, call) for name in self.implementations}

    def pick(self, call: Any) -> ModuleType:
        """The implementation that runs the call. Raises RuntimeError with all reasons when none does."""
        named = _named.get()
        if named in self.implementations:
            if reason := _supports(self.package, named, call):
                raise RuntimeError(f"{self.name}: the implementation {named!r} was asked for, but it {reason}")
            return _load(self.package, named)
        refused = {}
        for name in self.implementations:
            reason = _supports(self.package, name, call)
            if reason is None:
                _log_choice(self.name, name, refused)
                return _load(self.package, name)
            refused[name] = reason
        raise RuntimeError(f"{self.name}: no implementation can run this call: {_reasons(refused)}")

    def run(self, call: Any) -> Any:
        """Run the call by the implementation that `pick` chooses."""
        return self.pick(call).run(call)


@functools.cache
def _load(package: str, name: str) -> ModuleType | str:
    try:
        return importlib.import_module(f"{package}.{name}")
    except Exception as error:  # a Triton without a driver or with broken libraries raises anything
        return f"failed to import: {type(error).__name__}: {error}"


def _supports(package: str, name: str, call: Any) -> str | None:
    module = _load(package, name)
    return module if isinstance(module, str) else module.supports(call)


def _reasons(refused: dict[str, str]) -> str:
    return "; ".join(f"{name} {reason}" for name, reason in refused.items())


def _log_choice(op: str, name: str, refused: dict[str, str]) -> None:
    """Once an op and implementation: reasons name what a call has, so that each size of picture has others."""
    if (op, name) in _logged:
        return
    _logged.add((op, name))
    logger.info("Lowbit: %s is computed by %s%s", op, name, f" ({_reasons(refused)})" if refused else "")
