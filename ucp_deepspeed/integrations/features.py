"""Wrapping names of a library. Many are private, so that another version may lack them.

Then the library goes on as without the package, for all that the wrappers of one `Feature` do together, and one warning says what
isn't kept. Errors of the library, of its user and of a checkpoint stay errors.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import wrapt

logger = logging.getLogger("ucp_deepspeed")

Wrapper = Callable[..., Any]

FEATURES: list[Feature] = []
"""The features of all libraries that were wrapped."""

_WRAPPED: set[tuple[str, str]] = set()
"""Modules, and names in them, that are wrapped."""

ASKED = "ucp_deepspeed.engine.support"
"""A module that is imported for the first engine with the block on."""


class Feature:
    """Wrappers that need one another.

    Args:
        library: its name.
        page: the page of the documentation that names the tested versions.
        lost: what happens without them, in words.
        wrappers: names of modules → names in them → wrappers.
    """

    def __init__(self, library: str, page: str, lost: str, wrappers: Mapping[str, Mapping[str, Wrapper]]) -> None:
        self._library, self._page, self._lost, self._wrappers = library, page, lost, wrappers
        self._awaited = {name for names in wrappers.values() for name in names}
        self._problems: list[str] = []
        self._told = False

    def arm(self) -> None:
        """Wrap the names as soon as their modules are imported. A module that never is lacks its names."""
        FEATURES.append(self)
        for module in self._wrappers:
            if module in sys.modules:
                self._wrap(sys.modules[module])
            else:
                wrapt.register_post_import_hook(self._wrap, module)

    def _wrap(self, module: ModuleType) -> None:
        for name, wrapper in self._wrappers[module.__name__].items():
            try:
                wrapt.resolve_path(module, name)
            except AttributeError:
                continue
            self._awaited.discard(name)
            if (module.__name__, name) not in _WRAPPED:
                _WRAPPED.add((module.__name__, name))
                wrapt.wrap_function_wrapper(module, name, self.guarded(wrapper))

    def fails(self, problem: object) -> None:
        """Leave all that the feature does to the library, because of a problem."""
        self._problems.append(str(problem))
        self.tell()

    def tell(self) -> None:
        """Warn, once, if something is missing and an engine of this process has the block on."""
        missing = [*sorted(self._awaited), *self._problems]
        if missing and not self._told and ASKED in sys.modules:
            self._told = True
            if os.environ.get("RANK", "0") == "0":
                logger.warning(
                    "this version of %s isn't one that the package knows (%s): %s; docs/%s names the versions that are tested",
                    *(self._library, "; ".join(missing), self._lost, self._page),
                )

    def guarded(self, wrapper: Wrapper) -> Wrapper:
        """Return a wrapper that leaves a call to the library where the feature can't do its work."""

        def call(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for feature in FEATURES:
                feature.tell()
            if self._awaited or self._problems:
                return wrapped(*args, **kwargs)
            called = _Called(wrapped)
            try:
                return wrapper(called, instance, args, kwargs)
            except (AttributeError, ImportError, KeyError) as error:
                if not _is_of_wrappers(error):
                    raise
                self.fails(f"{type(error).__name__}: {error}")
                return called._self_results[0] if called._self_results else wrapped(*args, **kwargs)

        return call

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of a part that other features use; None where the feature can't do its work."""
        found: Any = self.guarded(lambda wrapped, instance, given, named: function(*given))(_nothing, None, args, {})
        return found


class _Called(wrapt.CallableObjectProxy):
    """A function that keeps what it has returned."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        super().__init__(wrapped)
        self._self_results: list[Any] = []

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        self._self_results.append(result)
        return result


def _nothing(*args: Any) -> None:
    """Stand for a part that the library doesn't have."""


def _is_of_wrappers(error: BaseException) -> bool:
    """Return whether an error was raised by a line of a wrapper, and not by what it has called."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    package = __name__.rpartition(".")[0]
    return last is not None and str(last.tb_frame.f_globals.get("__name__", "")).startswith(f"{package}.")
