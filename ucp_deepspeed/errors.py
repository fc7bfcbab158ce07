"""The error tree. *Damaged* (files are wrong) is not *unsupported* (files are fine, this version can't use them)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
"""Characters that steer a terminal, turn the direction of text around, show nothing, or have no form in UTF-8. Tabs and ends of
lines aren't among them."""


def escaped(text: str) -> str:
    """Return a text that is safe to show: names in a checkpoint may hold anything."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class UniversalCheckpointError(Exception):
    """Base of every error that this package raises for something a user can cause or mend.

    Its text has `MOST_CHARACTERS` at most, and nothing in it steers a terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        more = f"… and {len(text) - MOST_CHARACTERS} more characters" if len(text) > MOST_CHARACTERS else ""
        return escaped(text[:MOST_CHARACTERS]) + more


MOST_CHARACTERS = 32_768
"""Most characters of a message: enough for all that lists (`MAX_LISTED`)."""


class ListingError(UniversalCheckpointError):
    """An error that may list everything that it concerns.

    Attributes:
        problems: one line each, starting with the name of the thing concerned; empty if the heading says it all.
        remedy: what the user can do, if the lines don't say it.
    """

    def __init__(self, heading: str, problems: Sequence[str] = (), remedy: str = "") -> None:
        self.heading, self.problems, self.remedy = heading, tuple(problems), remedy
        told = [f"{heading} ({len(self.problems)}):", *listed(self.problems)] if problems else [heading]
        super().__init__("\n".join([*told, *([remedy] if remedy else [])]))

    def __reduce__(self) -> tuple[type[ListingError], tuple[str, tuple[str, ...], str]]:
        """Pickle by the constructor's arguments, so that the error can cross from one rank to another."""
        return type(self), (self.heading, self.problems, self.remedy)


MAX_LISTED = 50
"""Problems printed in one message; the rest are counted (all are in ``ListingError.problems``)."""


def listed(entries: Sequence[object], most: int = MAX_LISTED) -> list[str]:
    """Return a line for each of the first entries, and one that says how many more there are."""
    more = [f"  … and {len(entries) - most} more"] if len(entries) > most else []
    return [*(f"  {entry}" for entry in entries[:most]), *more]


def each_or_problem(names: Iterable[str], make: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
    """Return what is made for each name; and a line for each name for which a ValueError says why nothing is."""
    found: dict[str, T] = {}
    problems: list[str] = []
    for name in names:
        try:
            found[name] = make(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return found, problems


class ConfigError(UniversalCheckpointError):
    """The ``universal_checkpoint`` block of a DeepSpeed config, a command-line option, or a size given in Python, is wrong."""


class SpecError(ListingError):
    """A spec file is wrong, or doesn't fit the parameters it is used for."""


class CheckpointNotFoundError(UniversalCheckpointError):
    """No checkpoint is at the path, or no such tag in it."""


class NotInCheckpointError(UniversalCheckpointError, LookupError):
    """A checkpoint has no such parameter, state or element."""


class DamagedCheckpointError(UniversalCheckpointError):
    """A checkpoint's files are missing, truncated, inconsistent, or hold something that must not be loaded."""


class SaveError(UniversalCheckpointError):
    """A checkpoint couldn't be completed."""


class OtherRankError(UniversalCheckpointError):
    """Another of the processes that convert together failed; tells which, and why."""


class StoreError(UniversalCheckpointError):
    """The store in which elastic nodes meet can't be started or reached, or is lost."""


class UnsupportedError(ListingError):
    """A sound checkpoint, engine or version that this release can't handle exactly."""


class FormatError(UnsupportedError):
    """Files in a format, or a version of one, that this release can't read. DeepSpeed by itself can't load them either."""


class MismatchError(ListingError):
    """Source and target don't fit together: lists every problem, by the parameter concerned or the first of several."""


def is_of_system(error: BaseException) -> bool:
    """Return whether an error tells of the system and not of a fault: of a file, memory or threads. torch's allocators raise
    plain RuntimeErrors."""
    told = r"out of memory|allocate memory|not enough memory|can't start new thread"
    says = re.search(told, str(error), re.IGNORECASE)
    return isinstance(error, OSError | MemoryError) or (isinstance(error, RuntimeError) and says is not None)


def why_not_read(path: Path, error: Exception | None = None) -> OSError | None:
    """Return the system's error behind one that a reader has raised of a file; None if it lies in what the file holds.

    zipfile takes a directory that can't be read for none at all, and seeks to places that damaged files name.
    """
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return error
    try:
        with naming(path), path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - PROBED_NUMBYTES, 0))
            file.read()
    except OSError as reason:
        return reason
    return None


PROBED_NUMBYTES = 1 << 12
"""Bytes at the end of a file that are read again to find out why it couldn't be read."""


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Add the name of a file or folder to an OSError of the block that has none, as those of reads, writes and flushes."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def system_errors_as(kind: Callable[[str], UniversalCheckpointError], told: str) -> Iterator[None]:
    """Raise errors of the system in the block, this rank's and other ranks', as errors of the package.

    Args:
        told: what couldn't be done, for the message.
    """
    try:
        yield
    except UniversalCheckpointError as error:
        if type(error) is not UniversalCheckpointError:
            raise
        raise kind(f"{told}: {error}") from error
    except Exception as error:
        if not is_of_system(error):
            raise
        raise kind(f"{told}: {type(error).__name__}: {error}") from error


_WORDS = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "expected a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "expected a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false"),
    "string_type": "expected a text",
    **dict.fromkeys(("tuple_type", "list_type"), "expected a list"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "expected keys with values"
    ),
    "literal_error": "expected {expected}",
    "union_tag_invalid": "expected {expected_tags}, not '{tag}'",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected a number from {ge} on",
    "too_short": "expected {min_length} or more",
    "missing": "is missing",
    **dict.fromkeys(("extra_forbidden", "unexpected_keyword_argument"), "unknown key"),
    "value_error": "{error}",
}
"""Pydantic's types of errors → messages."""


def worded(error: Mapping[str, Any]) -> str:
    """Say what pydantic found wrong with a value; takes an item of ``ValidationError.errors()``."""
    words = _WORDS.get(error["type"])
    text: str = (
        error["msg"].replace("Input should be", "expected") if words is None else words.format(**error.get("ctx", {}))
    )
    found = error["input"]
    plain = text.startswith("expected") and isinstance(found, str | int | float | None)
    return f"{text} (found {found!r:.100})" if plain else text
