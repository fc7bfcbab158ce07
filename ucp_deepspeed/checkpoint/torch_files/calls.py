"""Calls that a pickle makes: those that may run other code than that of a class, or of the script's own modules.

DeepSpeed makes these calls when it unpickles a client state. Nothing is imported to find out: a name is looked up in what is
imported already, or in the text of its module.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_HARMLESS = re.compile(
    r"""
      copyreg\.(?:_reconstructor|__newobj__|__newobj_ex__)
    | _codecs\.encode | builtins\.(?:object|iter|getattr|Ellipsis) | re\._compile | (?:_?operator)\.(?:or_|getitem)
    | functools\.reduce | _functools\.reduce | array\._array_reconstructor | zoneinfo\.ZoneInfo\._unpickle | logging\.getLogger
    | numpy(?:\.\w+)*\.(?:_reconstruct|scalar|_frombuffer|_ufunc_reconstruct|_mareconstruct|_mvoid|__\w+_ctor)
    | (?:numpy|pandas|scipy|pyarrow)(?:\.\w+)*\.__pyx_unpickle_\w+
    | pandas(?:\.\w+)*\.(?:_unpickle_\w+|_new_\w*Index|_timedelta_unpickle|_nat_unpickle)
    | torch\._utils\._rebuild_\w+ | torch\._tensor\._rebuild_from_type_v2 | torch\.serialization\._get_layout
    | pytz\.(?:_p|_UTC) | dateutil\.(?:zoneinfo|tz)(?:\.\w+)*\.\w+
    """,
    re.VERBOSE,
)
"""Functions that pickles of ordinary values call, and that run nothing of their arguments but their classes."""

_DATA_MODULES = frozenset(
    """
    _collections _collections_abc _datetime _decimal _functools _io _operator _pydatetime _pydecimal _random _sre _thread
    _weakrefset abc argparse array ast builtins calendar collections collections.abc configparser contextlib contextvars
    copyreg csv dataclasses datetime decimal difflib email.message enum fractions functools graphlib http http.cookies
    inspect io ipaddress itertools json json.decoder json.encoder logging numbers operator optparse pathlib pathlib._local
    platform queue random re resource statistics string textwrap threading time traceback types typing typing_extensions
    urllib.parse uuid xml.etree.ElementTree zoneinfo
    """.split()  # noqa: SIM905
)
"""Modules of Python whose classes hold data. Those of others open files, start processes or run what they are given."""

_CODE_CLASSES = re.compile(
    r"""
      builtins\.(?:type|map|filter|super|property|classmethod|staticmethod|memoryview)
    | itertools\.(?:starmap|accumulate|takewhile|dropwhile|filterfalse|groupby)
    | types\.(?:FunctionType|LambdaType|CodeType|MethodType|ModuleType|LazyImport|CoroutineType)
    | _?io\.(?:FileIO|open|OpenWrapper) | logging\.(?:File|Stream)?Handler 
    | functools\.(?:single|cached|_lru)\w*
    | torch\.(?:classes|ops|package|hub|jit|multiprocessing|_inductor|_dynamo|utils\.cpp_extension
      |distributed\.elastic|fx\.\w*graph\w*)\..*
    | torch\..*(?:File(?:Reader|Writer)|StreamReader|StreamWriter)
    | numpy\.(?:memmap|testing|f2py|distutils)(?:\..*)?
    | (?:pip|setuptools|pkg_resources|distutils|_distutils_hack|IPython|ipykernel|pytest|_pytest|pexpect|ptyprocess|sh|fabric
      |paramiko|joblib|loky|cloudpickle|dill|triton|cffi|plumbum|execnet)\..*
    | psutil\.Popen | deepspeed\.(?:launcher|ops\.op_builder|elasticity)\..*
    """,
    re.VERBOSE,
)
"""Classes whose making, or whose use by another of them, runs code or opens files."""

_CODE_BASES = frozenset(
    """
    subprocess socket socketserver multiprocessing ctypes _ctypes pickle _pickle code codeop importlib zipimport bdb pdb cmd
    """.split()  # noqa: SIM905
)
"""Modules whose classes run code when they are made, also as bases of others."""

_LIBRARIES = frozenset({"torch", "numpy", "deepspeed", "ucp_deepspeed"})


@cache
def is_library(module: str) -> bool:
    """Return whether a module is Python's own or an installed package's, and not the script's."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in _LIBRARIES:
        return True
    places = _places(top)
    return any(part in ("site-packages", "dist-packages") for place in places for part in Path(place).parts)


def _places(top: str) -> list[str]:
    """Return where a top-level module lies."""
    loaded = sys.modules.get(top)
    try:
        spec = getattr(loaded, "__spec__", None) if loaded is not None else find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return [str(getattr(loaded, "__file__", None) or "")]
    return [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]


def may_run(module: str, name: str) -> bool:
    """Return whether a call of this global may run code beyond that of a class or of the script's own modules."""
    full = f"{module}.{name}"
    if _HARMLESS.fullmatch(full):
        return False
    if any(part.startswith("__") for part in name.split(".")) or _CODE_CLASSES.fullmatch(full):
        return True
    found = _looked_up(module, name)
    if isinstance(found, type):
        return is_library(found.__module__) and (
            _runs(_full(found), found)
            or any(
                _CODE_CLASSES.fullmatch(_full(kind)) or kind.__module__.partition(".")[0] in _CODE_BASES
                for kind in found.__mro__
            )
        )
    if isinstance(found, Enum) and not callable(found):  # Python up to 3.11.2 pickles members by their names
        return False
    if found is not None:
        home = getattr(found, "__module__", None) or getattr(type(found), "__module__", None)
        if isinstance(home, str) and _HARMLESS.fullmatch(f"{home}.{name}"):
            return False
        return is_library(module) or not isinstance(home, str) or is_library(home)
    text = _text_of(module)
    if is_library(module):
        first, *more = (part.lstrip("_") for part in name.split("."))
        is_class = first[:1].isupper() if text is None else _defines(text, "class", name.split(".")[0])
        return not is_class or any(part[:1].islower() for part in more) or _runs(full, None)
    outer = name.split(".")[0]
    return ("." in name and outer[:1].islower()) or (text is not None and not _defines(text, r"(?:class|def|)", outer))


def _runs(full: str, kind: type | None) -> bool:
    """Return whether a class of a library runs code when it is made."""
    module, _, _ = full.rpartition(".")
    top = module.partition(".")[0]
    if _CODE_CLASSES.fullmatch(full) or (kind is not None and issubclass(kind, type)):
        return True
    return top in sys.stdlib_module_names and (module if kind is None else kind.__module__) not in _DATA_MODULES


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _looked_up(module: str, name: str) -> Any:
    """Return an object that is imported already, without running code of its module."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        if isinstance(found, ModuleType):
            found = vars(found).get(part)
        elif isinstance(found, type):
            found = next((vars(kind)[part] for kind in found.__mro__ if part in vars(kind)), None)
            found = getattr(found, "__func__", found)
        else:
            return None
    return found


@cache
def _text_of(module: str) -> str | None:
    """Return the text of a module that isn't imported; None if there is none."""
    top, *rest = module.split(".")
    for place in map(Path, _places(top)):
        if place.is_dir():
            inner = place.joinpath(*rest)
            paths = [inner / "__init__.py", inner.with_suffix(".py")] if rest else [place / "__init__.py"]
        else:
            paths = [] if rest else [place]
        for path in paths:
            if path.suffix == ".py" and path.is_file():
                return path.read_text(encoding="utf-8", errors="replace")
    return None


def _defines(text: str, kind: str, name: str) -> bool:
    name = re.escape(name)
    return bool(re.search(rf"^\s*(?:{kind}\s+{name}\b|{name}\s*[:=])", text, re.MULTILINE))
