"""Calls that DeepSpeed would make when it unpickles a client state: those of ordinary values are known, others are told."""

from __future__ import annotations

import argparse
import array
import asyncio
import code
import collections
import copyreg
import cProfile
import ctypes
import datetime
import doctest
import enum
import fractions
import functools
import importlib
import inspect
import io
import ipaddress
import itertools
import logging
import logging.config
import multiprocessing.pool
import operator
import pdb
import pickle
import platform
import posix
import random
import re
import runpy
import site
import subprocess
import sys
import timeit
import trace
import typing
import urllib.parse
import uuid
import weakref
import webbrowser
import zipfile
import zipimport
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ucp_deepspeed.checkpoint.torch_files.calls import may_run
from ucp_deepspeed.checkpoint.torch_files.foreign import Content
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.errors import DamagedCheckpointError


class Colour(enum.Enum):
    red = 1


class Flags(enum.Flag):
    a = 1
    b = 2


class Settings(dict[str, Any]):
    """A mapping of the script's own."""


class Point(typing.NamedTuple):
    x: int


class Own:
    """Keeps what it is given, and is made by a function of the script's own."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return make_own, (self.value,)


def make_own(value: Any) -> Own:
    return Own(value)


ORDINARY: dict[str, Any] = {
    "generator": np.random.default_rng(0),
    "random state": np.random.RandomState(0),
    "bits": np.random.PCG64(1),
    "seeds": np.random.SeedSequence(1),
    "records": np.zeros(2, dtype=[("a", "i4")]),
    "objects": np.array([{"a": Point(1)}], dtype=object),
    "masked": np.ma.array([1]),
    "number": np.float32(1),
    "ufunc": np.add,
    "polynomial": np.polynomial.Polynomial([1, 2]),
    "random": random.Random(1),
    "pattern": re.compile("a"),
    "zone": datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    "array": array.array("i", [1]),
    "iterators": [iter([1]), itertools.count(), itertools.cycle([1]), iter(range(3)), enumerate([1]), zip([1])],
    "getters": [operator.itemgetter(1), operator.attrgetter("a")],
    "partials": functools.partial(functools.partial(print, 1), sep=" "),
    "address": ipaddress.ip_address("1.1.1.1"),
    "types": [list[int], typing.Optional[int], list[int], type(None), int | str],  # noqa: UP045
    "signature": inspect.signature(print),
    "errors": [ValueError("x"), OSError(2, "x")],
    "logger": logging.getLogger("a"),
    "generators": torch.Generator(),
    "device": [torch.device("cpu"), torch.float8_e5m2, torch.Size([1]), torch.strided],
    "parameter": torch.nn.Parameter(torch.ones(1)),
    "module": torch.nn.Linear(1, 1),
    "scheduler": torch.optim.lr_scheduler.LambdaLR,
    "chain": collections.ChainMap({"a": 1}),
    "url": urllib.parse.urlparse("http://a"),
    "machine": platform.uname(),
    "buffers": [io.BytesIO(b"a"), io.StringIO("a")],
    "enums": [Colour.red, Flags.a | Flags.b, uuid.SafeUUID.safe],
    "own": [Own(Own(3)), Own(Settings(a=Point(2)))],
    "fraction": fractions.Fraction(1, 3),
    "names": argparse.Namespace(add=1),
    "function": [torch.nn.functional.gelu, make_own, functools.partial(make_own, 1)],
    "defaults": collections.defaultdict(Settings, {"a": Settings()}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_values_call_nothing_else(name: str, protocol: int, tmp_path: Path) -> None:
    torch.save({"value": ORDINARY[name]}, tmp_path / "a.pt", pickle_protocol=protocol)
    found = open_torch_file(tmp_path / "a.pt", owned=())
    assert getattr(found, "called", None) is None


class Call:
    """Is pickled as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced

    def __call__(self) -> None: ...


def test_members_of_enumerations_by_name(tmp_path: Path) -> None:
    """Python 3.11.2 pickles them so, and some libraries have others do it."""
    member = Call(getattr, (inspect._ParameterKind, "VAR_POSITIONAL"))
    torch.save({"value": Call(inspect.Parameter, ("a", member))}, tmp_path / "a.pt")
    assert getattr(open_torch_file(tmp_path / "a.pt", owned=()), "called", None) is None


def text(name: str) -> bytes:
    return b"X" + len(name).to_bytes(4, "little") + name.encode()


def stack(module: str, name: str) -> bytes:
    """Find a global by any path of attributes."""
    return text(module) + text(name) + b"\x93"


def called(make: Callable[..., Any] | Any, *args: Any) -> Call:
    return Call(make, args)


COMMAND = "open('mark', 'w')"
SYSTEM = posix.system
CALLS: dict[str, Any] = {
    "timeit": called(timeit.timeit, COMMAND),
    "timer": called(called(getattr, timeit.Timer, "timeit"), called(timeit.Timer, COMMAND), 1),
    "method": called(called(getattr, called(timeit.Timer, COMMAND), "timeit"), 1),
    "profile": called(cProfile.run, COMMAND),
    "trace": called(trace.main),
    "pdb": called(pdb.run, COMMAND),
    "debugger": called(pdb.Pdb),
    "doctest": called(doctest.debug_src, COMMAND),
    "browser": called(webbrowser.open, "http://a"),
    "browser's class": called(webbrowser.GenericBrowser, "sh"),
    "hub": called(torch.hub.load, "a", "b"),
    "nested pickle": called(torch.storage._load_from_bytes, b""),
    "torch.load": called(torch.load, "a"),
    "numpy's": called(np.testing.measure, COMMAND),
    "numpy.load": called(np.load, "a", None, True),
    "numpy.memmap": called(np.memmap, "a", "u1", "w+"),
    "asyncio": called(asyncio.run, 1),
    "runpy": called(runpy.run_path, "a"),
    "system": called(SYSTEM, "a"),
    "eval": called(eval, COMMAND),
    "exec": called(exec, COMMAND),
    "import": called(__import__, "a"),
    "import_module": called(importlib.import_module, "a"),
    "chain": called(called(getattr, called(__import__, "os"), "system"), "a"),
    "dunder": called(called(getattr, make_own, "__call__"), 1),
    "globals": called(operator.getitem, called(getattr, make_own, "__globals__"), "os"),
    "modules": called(operator.getitem, called(getattr, called(getattr, make_own, "x"), "y"), "os"),
    "attrgetter": called(called(operator.attrgetter, "system"), 1),
    "methodcaller": called(called(operator.methodcaller, "unlink"), Path("a")),
    "unlink": called(called(getattr, Path("a"), "unlink")),
    "partial": called(called(functools.partial, SYSTEM, "a")),
    "reduce": called(functools.reduce, SYSTEM, ["a", "b"]),
    "map": called(list, called(map, SYSTEM, ["a"])),
    "filter": called(list, called(filter, SYSTEM, ["a"])),
    "starmap": called(list, called(itertools.starmap, SYSTEM, [("a",)])),
    "accumulate": called(list, called(itertools.accumulate, ["a", "b"], SYSTEM)),
    "iter": called(list, called(iter, called(functools.partial, SYSTEM, "a"), 1)),
    "finalize": called(weakref.finalize, Own(), SYSTEM, "a"),
    "pool": called(multiprocessing.pool.ThreadPool, 1, SYSTEM, ("a",)),
    "Popen": called(subprocess.Popen, "a"),
    "interpreter": called(code.InteractiveInterpreter),
    "new class": called(type, "A", (), {"__setstate__": SYSTEM}),
    "site": called(site.main),
    "logging": called(logging.config.dictConfig, {}),
    "log file": called(logging.FileHandler, "a"),
    "file": called(io.FileIO, "a", "w"),
    "library of C": called(ctypes.CDLL, "a"),
    "zip": called(zipimport.zipimporter, "a"),
    "unpickler": called(pickle.loads, b""),
    "constructor": called(np.random._pickle.__generator_ctor, "a", SYSTEM),  # type: ignore[attr-defined]
    "type_v2": called(torch._tensor._rebuild_from_type_v2, SYSTEM, Own, ("a",), {}),  # type: ignore[attr-defined]
    "state": Call(Own, (), {"__setstate__": SYSTEM}),
    "state of names": Call(argparse.Namespace, (), {"__setstate__": timeit.timeit}),
    "slots": Call(Own, (), (None, {"extend": timeit.timeit})),
    "reconstructor": Call(copyreg._reconstructor, (subprocess.Popen, subprocess.Popen, "a")),
}
RAW = {
    "by another's name": stack("test_calls", "timeit.timeit") + b")R",
    "by a module of data": stack("random", "_os.system") + b")R",
    "a module's list": stack("sys", "path") + text("/evil") + b"a",
    "the environment": stack("posix", "environ") + text("LD_PRELOAD") + text("a") + b"s",
    "a library": stack("torch", "ops.load_library") + text("a") + b"\x85R",
    "a function": stack("types", "FunctionType") + b")R",
    "code": stack("types", "CodeType") + b")R",
    "a method": stack("types", "MethodType") + stack("timeit", "timeit") + text("a") + b"\x86R",
    "an import": stack("antigravity", "webbrowser"),
    "dropped": stack("timeit", "timeit") + b")R0N",
    "a class's attribute": stack("test_calls", "Own") + b"N}" + text("value") + stack("timeit", "timeit") + b"s\x86b",
    "newobj": stack("weakref", "finalize") + b")\x81",
}


def is_told(path: Path) -> bool:
    """Return whether the file is refused, or a call in it told."""
    try:
        found = open_torch_file(path, owned=())
    except DamagedCheckpointError:
        return True
    return isinstance(found, Content) and found.called is not None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_run_code_are_told(name: str, legacy: bool, tmp_path: Path) -> None:
    torch.save({"value": CALLS[name]}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert is_told(tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpointError):
        open_torch_file(tmp_path / "a.pt")


@pytest.mark.parametrize("name", RAW)
def test_crafted_steps_are_told(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x04}" + text("a") + RAW[name] + b"s.")
        archive.writestr("a/version", "3")
    assert is_told(tmp_path / "a.pt")


def test_modules_that_nobody_has_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their text tells classes from functions, and the script's own functions from others'."""
    (tmp_path / "mine.py").write_text("from os import system\n\ndef own(): ...\nclass small: ...\nPoint = tuple\n")
    home = tmp_path / "site-packages"
    home.mkdir()
    (home / "theirs.py").write_text("def Function(): ...\ndef run(): ...\nclass small: ...\n")
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [may_run("mine", name) for name in ("own", "small", "Point", "system", "os.system")] == [
        *[False] * 3,
        True,
        True,
    ]
    assert [may_run("theirs", name) for name in ("small", "run", "Function", "os.system")] == [False, True, True, True]
    assert not {"mine", "theirs"} & set(sys.modules)
