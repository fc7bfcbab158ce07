"""The place of what an unpickler doesn't make: objects of foreign classes, and what calls of foreign functions would return."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeGuard

import torch

from ucp_deepspeed.checkpoint.torch_files.calls import is_library, may_run

CALLERS = frozenset({"operator", "_operator", "functools", "_functools", "types"})
CALLING = ("numpy._core._ufunc_reconstruct", "numpy.core._ufunc_reconstruct", "getattr")
"""Modules and functions that make objects that call others."""

HOLDERS = frozenset({"functools.partial", "_functools.partial", "functools.partialmethod"})
"""Classes of Python whose objects only keep what they would call."""

LOOKED_FOR = frozenset({"__setstate__", "__dict__", "append", "extend", "add", "update"})
"""Attributes of an object that ``pickle`` calls if a file has set them."""


class Opaque:
    """Replaces an object that can't be made without code of its class. It keeps only the name of the class.

    Attributes:
        described: the name of the class.
        module: the module by which a pickle finds it.
    """

    described = "unknown"
    module = ""

    def __new__(cls, *_: Any, **__: Any) -> Opaque:  # noqa: D102 - the class may have been called with any arguments
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...


@cache
def opaque(name: str, module: str = "") -> type[Opaque]:
    """Return the class that replaces a class of this name."""
    return type("Opaque", (Opaque,), {"described": name, "module": module})


def runs(found: Any) -> bool:
    """Return whether calling it could run more than the code of a class, or of the script's own modules (`may_run`)."""
    if isinstance(found, type) and issubclass(found, Opaque):
        return may_run(found.module, found.described.removeprefix(f"{found.module}."))
    return isinstance(found, Opaque) and (found.module in CALLERS or found.described.startswith(CALLING))


def opaque_in(value: Any) -> str | None:
    """Return the name of the class of the first `Opaque` in a value. The value may also hold an `Opaque` class itself."""
    return next(opaques_in(value), None)


def opaques_in(value: Any) -> Iterator[str]:
    """Yield the classes of all `Opaque` objects in a value."""
    for found in everything_in(value):
        if isinstance(found, Opaque) or (isinstance(found, type) and issubclass(found, Opaque)):
            yield found.described


def everything_in(value: Any) -> Iterator[Any]:
    """Yield a value and everything in it, each object once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += parts_of(found)


def parts_of(value: Any) -> Iterable[Any]:
    """Return what a value holds."""
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += [*value.keys(), *value.values(), getattr(value, "default_factory", None)]
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        parts += value
    elif isinstance(value, slice):
        parts += [value.start, value.stop, value.step]
    if not isinstance(value, (type, torch.Tensor)):
        parts += getattr(value, "__dict__", {}).values()
    return parts


def is_opaque(value: Any) -> TypeGuard[Opaque | type[Opaque]]:
    """Return whether it is an `Opaque`, or such a class."""
    return isinstance(value, Opaque) or (isinstance(value, type) and issubclass(value, Opaque))


class Content(dict[str, Any]):
    """A file's content in whose pickle something foreign is called, wherever the result went.

    Attributes:
        foreign: the first class or function.
        called: the first one that isn't a class, not known to be harmless, and not of the script's own modules.
    """

    foreign: str
    called: str | None


class Notes:
    """The calls of foreign classes and functions that one pickle makes.

    Attributes:
        foreign: the first one.
        called: the first one that may run more than a class's code, or the script's own.
    """

    def __init__(self) -> None:
        self.foreign: str | None = None
        self.called: str | None = None

    def add(self, name: str, runs_code: bool) -> None:
        """Note a call."""
        self.foreign = self.foreign or name
        if runs_code:
            self.called = self.called or name

    def add_call(self, make: Any, args: Any, kwargs: Mapping[str, Any] | None) -> None:
        """Note a call of something foreign, or by which something on the list calls something foreign."""
        foreign = is_opaque(make)
        name = make.described if foreign else ""
        expected = _as_expected(name, args)
        if foreign:
            self.add(name, isinstance(make, Opaque) or (runs(make) if expected is None else not expected))
        for given in (*args, kwargs) if isinstance(args, tuple) else (args, kwargs):
            if isinstance(given, Mapping):
                self.add_names(given.items())
        holds = name in HOLDERS or (not is_library(make.module) if foreign else isinstance(make, type))
        if expected is None and not holds:
            for given in everything_in([args, kwargs]):
                if runs(given):
                    self.add(given.described, True)

    def add_names(self, items: Iterable[tuple[Any, Any]]) -> None:
        """Note attributes with names by which ``pickle`` finds methods."""
        for name, value in items:
            if isinstance(name, str) and name in LOOKED_FOR and (callable(value) or isinstance(value, Opaque)):
                self.add(f"{getattr(value, 'described', name)}", True)


def _as_expected(name: str, args: Any) -> bool | None:
    """Return whether a function that could be given anything is called as pickles of ordinary values call it; None for others."""
    first = args[0] if isinstance(args, tuple) and args else None
    described = first.described if isinstance(first, type) and issubclass(first, Opaque) else ""
    if name in ("iter", "type"):
        return len(args) == 1 and not runs(first)
    if name.endswith("functools.reduce"):
        return described in ("operator.or_", "_operator.or_")
    if name in ("operator.getitem", "_operator.getitem"):
        return described.startswith("typing.")
    if name.endswith("._ufunc_reconstruct"):
        return isinstance(first, str) and first.partition(".")[0] == "numpy"
    return None
