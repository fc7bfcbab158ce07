"""An unpickler that runs no code. It replaces each object whose class isn't on the list of allowed classes by an `Opaque`.

torch's own (``torch/_weights_only_unpickler.py``) refuses the whole file for one such object in a client state, and for some
plain ones too, such as a ``deque``. This one keeps its rules: a global is found in a list, never imported; only callables on the
list are called; only types on the list are given a state. The list has plain data, and four classes of DeepSpeed, replaced by
stand-ins. Numpy's arrays are made here after a check of their dtype, since numpy believes any dtype that a file describes.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import pickle
import re
import sys
import types
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import _weights_only_unpickler as torchs
from torch.torch_version import TorchVersion

from ucp_deepspeed.checkpoint.torch_files.foreign import (
    Content,
    Notes,
    Opaque,
    is_opaque,
    opaque,
    opaques_in,
    parts_of,
)


class LossScaler:
    """Stands in for DeepSpeed's class of this name: attributes only."""


class DynamicLossScaler(LossScaler):
    """Stands in for DeepSpeed's class of this name: attributes only."""


@dataclass
class FragmentAddress:
    """Stands in for DeepSpeed's ``fragment_address``."""

    numel: int
    start: int


@dataclass
class SubparamShape:
    """Stands in for DeepSpeed's class of this name: parameters whose sizes along one dimension are several tensors' together."""

    patterns: list[str]
    shape: tuple[tuple[int, ...] | int, ...]
    partition_dim: int


class ZeroStage(enum.IntEnum):
    """Stands in for DeepSpeed's ``ZeroStageEnum``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def zero_stage_by_name(owner: Any, name: str) -> Any:
    """Stands in for ``getattr``, with which Python 3.11.2 pickles an enum's members. It finds only members of `ZeroStage`, and
    names those of an `Opaque`."""
    if is_opaque(owner):
        return opaque(f"{owner.described}.{name!s}", owner.module)
    if owner is not ZeroStage or name not in ZeroStage.__members__:
        raise pickle.UnpicklingError(
            f"Unsupported global: GLOBAL getattr was not an allowed global ({name} of {owner})"
        )
    return ZeroStage[name]


MOST_MADE = 2**24
"""Most elements of a range. Some bytes of a file would become as many numbers as it says."""


def short_range(*numbers: int) -> range:
    """Stands in for ``range``, of which lists and sets are made."""
    made = range(*numbers)
    if abs(made.stop - made.start) > MOST_MADE * abs(made.step):
        raise pickle.UnpicklingError(f"Unsupported class range of {made}")
    return made


def given_bytes(content: Any = b"", *encoding: str) -> bytes:
    """Stands in for ``bytes``, which makes as many zeros as it is told to."""
    if isinstance(content, int):
        raise pickle.UnpicklingError("Unsupported class bytes that are only counted")
    return bytes(content, *encoding)


def given_bytearray(*args: Any) -> bytearray:
    """Stands in for ``bytearray``."""
    return bytearray(given_bytes(*args))


def encoded(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, with which older pickles write bytes. Some of its encodings take long."""
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise pickle.UnpicklingError(f"Unsupported class bytes of encoding {encoding!r:.40}")
    return text.encode(encoding)


def given_fraction(*numbers: Any) -> fractions.Fraction:
    """Stands in for ``Fraction``, which calculates the number in a text: ``1e999999999`` has a gigabyte."""
    if not all(type(number) is int or re.fullmatch(r"-?\d+(/\d+)?", number) for number in numbers):
        raise pickle.UnpicklingError("Unsupported class Fraction of another text than its own")
    return fractions.Fraction(*numbers)


def plain_slice(*bounds: Any) -> slice:
    """Stands in for ``slice``. Python crashes when it removes many that are one inside the other."""
    if any(isinstance(bound, (slice, tuple, list, Mapping)) for bound in bounds):
        raise pickle.UnpicklingError("Unsupported class slice whose bounds aren't numbers")
    return slice(*bounds)


PATHS = PosixPath, PurePosixPath, PureWindowsPath
"""Path classes; Python 3.13 pickles them from another module."""

ALLOWED_CLASSES: list[Any] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (FragmentAddress, "deepspeed.runtime.bf16_optimizer.fragment_address"),  # up to 0.7.2
    (SubparamShape, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (zero_stage_by_name, "builtins.getattr"),
    (frozenset, "builtins.frozenset"),
    (short_range, "builtins.range"),
    (given_bytes, "builtins.bytes"),
    (given_bytearray, "builtins.bytearray"),
    (encoded, "_codecs.encode"),
    (given_fraction, "fractions.Fraction"),
    (plain_slice, "builtins.slice"),
    *((kind, f"builtins.{kind.__name__}") for kind in (list, dict, set, tuple, bool, int, float, str, complex)),
    *(argparse.Namespace, types.SimpleNamespace, TorchVersion),
    *((path, f"{home}.{path.__name__}") for path in PATHS for home in ("pathlib", "pathlib._local")),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, uuid.UUID, uuid.SafeUUID),
    *(collections.deque, collections.defaultdict),
]
"""The classes that a checkpoint may name beyond torch's own: data without behaviour, and stand-ins for the rest."""

ALLOWED: dict[str, Any] = {
    name: kind
    for kind, name in (
        each if isinstance(each, tuple) else (each, f"{each.__module__}.{each.__qualname__}")
        for each in ALLOWED_CLASSES
    )
}
"""`ALLOWED_CLASSES` by name."""

STAND_INS: dict[type, tuple[str, str]] = {
    kind: (name.rpartition(".")[0], name.rpartition(".")[2])
    for name, kind in reversed(ALLOWED.items())
    if isinstance(kind, type) and kind.__module__ == __name__
}
"""Classes that stand in for DeepSpeed's → the module and the name by which DeepSpeed finds its own today."""


CODE_MODULES = frozenset("os posix nt sys subprocess shutil importlib runpy pty ctypes socket pickle code".split())  # noqa: SIM905
"""Modules that data may name but never call. A file that would call a function of theirs is refused."""

IMPORTS = frozenset({"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "test"})
"""Modules of Python that do something when they are imported."""

MOST_DEEP = 200
"""Most tuples one inside the other, in what is hashed."""

PLAIN_KINDS = "biufcSUmM"
"""numpy's kinds of dtypes whose elements are only numbers, dates or text."""

DTYPE, OBJECTS = "numpy.dtype", "numpy.dtype of objects"
"""Names of the replacements for a dtype of another kind, and for one with Python's objects among its elements."""

CHAINED = collections.deque, collections.defaultdict
"""Containers that Python removes by calling itself for each one inside another. After some 100,000 it has crashed."""

MOST_CHAINED = 10_000
"""Most containers of `CHAINED` that hold another one."""

HASHING: tuple[Any, ...] = (
    *(dict, set, frozenset),
    *(collections.OrderedDict, collections.Counter, collections.defaultdict),
)
"""Callables that take the hashes of what they are given."""

MAPPINGS = dict, collections.OrderedDict, collections.Counter, collections.defaultdict

_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 SHORT_BINSTRING BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST EMPTY_DICT EMPTY_TUPLE
    EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID
"""
"""Steps of ``pickle`` that make plain values, or find a global. Some other steps have rules here; the rest is refused."""

_InPython: Any = pickle._Unpickler  # type: ignore[attr-defined]
"""pickle's own unpickler in Python. Single steps of it can be replaced."""


class CraftedError(pickle.UnpicklingError):
    """The file isn't what any program saves."""


class Unpickler(_InPython):  # type: ignore[misc]
    """See the module. `torch.load` finds it here by its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chained: set[int] = set()
        self.notes = Notes()
        self.known = {**torchs._get_allowed_globals(), **torchs._get_user_allowed_globals(), **ALLOWED, **NUMPYS}
        self.names = {id(found): full.removeprefix("builtins.") for full, found in self.known.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Return the object on the list, or the `Opaque` class that replaces it."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in self.known and (full in NUMPYS or module.partition(".")[0] != "numpy"):
            return self.known[full]
        if module.partition(".")[0] in IMPORTS:
            self.notes.add(full, True)
        return opaque(full.removeprefix("builtins."), module)

    def load(self) -> Any:
        """Return the object, as a `Content` if something foreign was called for it."""
        found = super().load()
        if self.notes.foreign is None:
            return found
        if not isinstance(found, dict):
            raise CraftedError(f"Unsupported class {self.notes.foreign}, which is called")
        content = Content(found)
        content.foreign, content.called = self.notes.foreign, self.notes.called
        return content

    def made(self, make: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call a callable of the list. Return an `Opaque` if it isn't on the list, or can't use these arguments."""
        self.notes.add_call(make, args, kwargs)
        if is_opaque(make):
            if isinstance(make, type) and _is_code(make.described):
                raise CraftedError(f"Unsupported class {make.described}, which is called")
            return opaque(make.described, make.module)()
        if id(make) not in self.names:
            raise pickle.UnpicklingError(f"Unsupported class {type(make).__name__}, which is called")
        if any(make is known for known in HASHING):
            _check_depth(args)
        try:
            found = make(*args, **kwargs or {})
            self._note_chain(found, ())
            return found
        except CraftedError:
            raise
        except Exception:  # for example a number made of an Opaque
            return opaque(self.names[id(make)])()

    def _note_chain(self, held: Any, items: Iterable[Any]) -> None:
        """Count a container that holds others of `CHAINED`."""
        if type(held) in CHAINED and any(type(item) in CHAINED for item in (items or parts_of(held))):
            self.chained.add(id(held))
            if len(self.chained) > MOST_CHAINED:
                raise CraftedError("Unsupported class deque or defaultdict, of which too many hold one another")

    def _new(self, kind: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        known = isinstance(kind, type) and not issubclass(kind, Opaque) and id(kind) in self.names
        if known:
            self.notes.add_call(kind, args, kwargs)
        self.stack.append(kind.__new__(kind, *args, **kwargs) if known else self.made(kind, args, kwargs))

    def _build(self) -> None:
        state = self.stack.pop()
        held = self.stack[-1]
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.notes.add_names(part.items())
        if isinstance(held, type):
            self.notes.add(getattr(held, "described", held.__name__), True)
        if isinstance(held, np.dtype) or (isinstance(held, Opaque) and held.described == DTYPE):
            self._build_dtype(held, state)
        elif is_opaque(held):
            return
        elif type(held) is np.ndarray:
            self._build_array(held, state)
        elif type(held) is collections.OrderedDict:
            held.__dict__.update(state)
        elif id(type(held)) in self.names and not isinstance(held, torch.Tensor):
            _set_state(held, state)
        else:
            raise pickle.UnpicklingError(f"Unsupported class {type(held).__qualname__}, which is given a state")

    def _build_dtype(self, held: np.dtype[Any] | Opaque, state: Any) -> None:
        """Admit byte orders, and units of dates. The rest of a plain dtype's state must be as expected."""
        if isinstance(held, Opaque):
            if OBJECTS in opaques_in(state):
                self._replace(held, opaque(OBJECTS)())
            return
        expected: Any = held.__reduce__()[2]
        dates = held.kind in "mM" and len(state) == 9 and state[8][0] is None
        if not (len(state) == 8 or dates) or state[2:8] != expected[2:8] or state[1] not in ("<", ">", "|", "="):
            self._replace(held, opaque(OBJECTS if OBJECTS in opaques_in(state) else DTYPE)())
        else:
            held.__setstate__(state)  # type: ignore[attr-defined]

    def _build_array(self, held: np.ndarray[Any, Any], state: Any) -> None:
        _, shape, dtype, _, data = state
        if not _is_plain(dtype):
            _check_objects(dtype, data)
            self._replace(held, opaque("numpy.ndarray")())
            return
        if not isinstance(data, bytes) or len(data) != prod(shape) * dtype.itemsize or any(size < 0 for size in shape):
            raise pickle.UnpicklingError("Unsupported class numpy.ndarray of another size than its data")
        held.__setstate__(state)

    def _replace(self, held: Any, other: Any) -> None:
        """Replace the object on top by another, also in later references to it."""
        self.stack[-1] = other
        for key, value in self.memo.items():
            if value is held:
                self.memo[key] = other

    def _extend(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if type(held) in (list, collections.deque):
            self._note_chain(held, items)
            held.extend(items)
        else:
            self._change(held, "appended to")

    def _change(self, held: Any, how: str) -> None:
        """Let an `Opaque` be changed, and note the change of anything that lies in a module."""
        if isinstance(held, type) and issubclass(held, Opaque):
            self.notes.add(held.described, True)
        elif not isinstance(held, Opaque):
            raise pickle.UnpicklingError(f"Unsupported class {type(held).__qualname__}, which is {how}")

    def _add_all(self) -> None:
        items, held = self.pop_mark(), self.stack[-1]
        if type(held) is not set:
            raise pickle.UnpicklingError(f"Unsupported class {type(held).__qualname__}, which is added to")
        _check_depth(items)
        held.update(items)

    def _freeze(self) -> None:
        items = self.pop_mark()
        _check_depth(items)
        self.stack.append(frozenset(items))

    def _set_items(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if type(held) in MAPPINGS:
            _check_depth([key for key in items[::2] if type(key) is not str])
            self._note_chain(held, items[1::2])
            for key, value in zip(items[::2], items[1::2], strict=True):
                held[key] = value
        else:
            self.notes.add_names(zip(items[::2], items[1::2], strict=True))
            self._change(held, "given items")

    dispatch = {code: _InPython.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES.split())} | {
        pickle.REDUCE[0]: lambda self: self.stack.append(self.made(self.stack.pop(-2), self.stack.pop())),
        pickle.NEWOBJ[0]: lambda self: self._new(self.stack.pop(-2), self.stack.pop(), {}),
        pickle.NEWOBJ_EX[0]: lambda self: self._new(self.stack.pop(-3), self.stack.pop(-2), self.stack.pop()),
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.ADDITEMS[0]: _add_all,
        pickle.FROZENSET[0]: _freeze,
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
    }


def _check_depth(values: Sequence[Any]) -> None:
    """Refuse tuples so deep in one another that Python crashes when it calculates their hash."""
    level: Sequence[Any] = values
    for _ in range(MOST_DEEP):
        seen = {id(part): part for each in level if isinstance(each, (tuple, list)) for part in each}
        level = list(seen.values())
        if not level:
            return
    raise CraftedError("Unsupported class tuple, of which too many lie in one another")


def _is_code(name: str) -> bool:
    """Return whether it is a built-in function of Python, or in one of `CODE_MODULES`."""
    module = name.partition(".")[0]
    return module in CODE_MODULES or (
        name != "iter" and isinstance(getattr(builtins, name, None), types.BuiltinFunctionType)
    )


def _set_state(held: Any, state: Any) -> None:
    """Set a state as ``pickle`` does (``load_build``)."""
    if hasattr(held, "__setstate__"):
        held.__setstate__(state)
        return
    state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    # Names of attributes are one object each, wherever they stand: later instances of the class take them over, and pickle refers
    # to an object that it has written.
    held.__dict__.update({sys.intern(key) if type(key) is str else key: value for key, value in (state or {}).items()})
    for key, value in (slots or {}).items():
        setattr(held, key, value)


def _check_objects(dtype: Any, data: Any) -> None:
    """Refuse bytes in the place of objects: code that unpickles them would use them as addresses."""
    if isinstance(data, bytes) and OBJECTS in opaques_in(dtype):
        raise CraftedError("Unsupported class numpy.ndarray whose bytes stand for objects")


def _is_plain(dtype: Any) -> bool:
    return (
        isinstance(dtype, np.dtype)
        and dtype.kind in PLAIN_KINDS
        and not (dtype.hasobject or dtype.fields or dtype.subdtype)
    )


def _dtype(name: str, *_: Any) -> Any:
    """Replaces ``numpy.dtype``: makes plain dtypes only."""
    found = np.dtype(name, copy=True) if isinstance(name, str) and name.isalnum() else None
    if found is None or found.kind not in PLAIN_KINDS:
        return opaque(OBJECTS if found is None or found.hasobject else DTYPE)()
    return found


def _scalar(dtype: Any, data: Any = None) -> Any:
    """Replaces ``numpy.core.multiarray.scalar``."""
    if not _is_plain(dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        _check_objects(dtype, data)
        return opaque("numpy.generic")()
    return np.frombuffer(data, dtype)[0] if dtype.itemsize else dtype.type()


NUMPYS: dict[str, Any] = {
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    # makes the array that is given a state next
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: np.ndarray((0,), "i1") for core in ("core", "_core")},
}
"""The names of numpy that may be found. Every dtype is checked before bytes become its elements."""
