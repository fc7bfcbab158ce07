"""Bounds on what a checkpoint's own files may name and hold: names of files, links, sizes of documents, shapes of values.

Somebody else may have written the files. A name in them leads to no other folder, and a small file makes no large value.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.remote import located, numbytes_of

LONGEST_NAME = 255
"""Most bytes of a file's name, as file systems have it."""


def check_plain(name: str) -> str:
    """Return the name of a file beside a document; a ValueError says that it may be none."""
    if name in ("", ".", "..") or not {"/", "\0"}.isdisjoint(name) or len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError(f"{name[:80]!r} can't be the name of a file in this folder")
    return name


FileName = Annotated[str, AfterValidator(check_plain)]
"""A name that a document gives to a file beside it."""


def check_inside(path: Path) -> None:
    """Refuse a link that leads out of the folder of the checkpoint.

    A hub's cache has links from ``snapshots/<revision>`` to its own ``blobs``; these are followed.

    Raises:
        DamagedCheckpointError: the link leads elsewhere.
    """
    if not path.is_symlink():
        return
    try:
        target, folder = path.resolve(), path.parent.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise DamagedCheckpointError(f"{path} is a link that leads nowhere: {error}") from error
    home = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    if not target.is_relative_to(folder) and (home is None or target.parent != home.parent / "blobs"):
        raise DamagedCheckpointError(
            f"{path} is a link to {target}, outside the checkpoint; if you trust it, copy the folder with cp -rL"
        )


def check_regular(path: str | Path) -> None:
    """Raise a DamagedCheckpointError for a pipe, whose reading waits, a device, which may never end, or anything but a file.
    A missing path, or one that can't be inspected, is accepted."""
    try:
        mode = located(path).stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise DamagedCheckpointError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'something else')}, not a file")


def read_bounded(path: Path, most: int = tunables.DOCUMENT_NUMBYTES) -> bytes:
    """Return the content of a regular file of bounded size.

    Raises:
        DamagedCheckpointError: it isn't there, is no regular file, is larger, or can't be read.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = numbytes_of(file)
            content = file.read(most + 1) if size <= most else b""
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
    if max(size, len(content)) > most:
        raise DamagedCheckpointError(f"{path} has {size} bytes; such a file has no more than {most}")
    return content


MOST_DEEP = 200
"""Most values one inside the other. Code that walks them calls itself that often, and Python allows a thousand calls."""

MOST_REPEATED, MOST_TIMES = 2**22, 100
"""A list that holds another one many times is walked as often. So many visits are always allowed, and beyond them so many times
the number of references that the file has."""


def misshapen(value: Any) -> str | None:
    """Say why a value that was unpickled can't be walked: it holds itself, is too deep, or repeats its parts without measure.

    None if nothing is wrong.
    """
    visits: dict[int, int] = {}
    depths: dict[int, int] = {}
    parts_of: dict[int, list[Any]] = {}
    references, waiting = 0, [value]
    while waiting:
        found = waiting[-1]
        key = id(found)
        if key in visits:
            waiting.pop()
        elif key not in parts_of:
            parts = parts_of[key] = [part for part in _held(found) if _held(part)]
            references += len(_held(found))
            if any(id(part) in parts_of and id(part) not in visits for part in parts):
                return "it holds itself"
            waiting += parts
        else:
            waiting.pop()
            visits[key] = len(_held(found)) + sum(visits[id(part)] for part in parts_of[key])
            depths[key] = 1 + max((depths[id(part)] for part in parts_of[key]), default=0)
    total, depth = visits[id(value)], depths[id(value)]
    if depth > MOST_DEEP:
        return f"it holds {depth} values one inside the other; {MOST_DEEP} are read"
    if total > max(MOST_REPEATED, MOST_TIMES * references):
        return f"it repeats {references} values so often that there are {total if total < 2**63 else 'more than 2**63'}"
    return None


def _held(value: Any) -> Collection[Any]:
    """Return the values directly inside a container; nothing for other values."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple, set, frozenset, deque)) else ()
