"""Hints for a user whose load was refused, for whole kinds of errors; most messages have one already, where the reason is
found."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from ucp_deepspeed.checkpoint.tags import MOST_TOLD, whole_tags
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    FormatError,
    ListingError,
    MismatchError,
    SpecError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.remote import located

T = TypeVar("T")

_WAYS = re.compile(
    r"\"(?:load|spec|on_\w+|optimizer_states|hyperparameters|scheduler|random_state|vocabulary_size|shared_read_bytes|tie_word_embeddings)\""
    r"|tag=|load_\w+=|custom_load_fn=|\bucp [a-z]+|--[a-z]+|^names:|remove |correct |fetch |move (?:one|those)|keep one"
    r"|save (?:again|with|it)|name (?:a spec|the same)|parameter groups of their own|install ",
    re.MULTILINE,
)
"""The look of settings and commands in messages."""

_WAYS_ON: dict[type[UniversalCheckpointError], str] = {
    FormatError: "install the release that wrote it, or a later one",
    UnsupportedError: '"load": "never" leaves the load to DeepSpeed itself, which may read it on the topology, and with the '
    "model and optimizer, that saved it",
    SpecError: 'correct the spec, which "ucp spec check PATH --against CKPT" holds against all that a checkpoint tells',
    MismatchError: '"ucp inspect CKPT" tells what it holds, and "ucp plan CKPT --model OTHER" what of that another model takes',
}
"""Kind of errors → hint; the first that fits."""


def tells_a_way_on(error: UniversalCheckpointError) -> bool:
    """Return whether the message says what to do: in its heading, at its end or in each of its lines."""
    if not isinstance(error, ListingError):
        return bool(_WAYS.search(str(error)))
    lines = all(_WAYS.search(problem) for problem in error.problems) and bool(error.problems)
    return lines or bool(_WAYS.search(error.heading) or _WAYS.search(error.remedy))


def telling_ways_on(load: Callable[..., T]) -> Callable[..., T]:
    """Wrap a load (``native, engine, load_dir, tag, …``), so that each error that it raises ends with a hint for the user."""

    @wraps(load)
    def told(native: Any, engine: Engine, load_dir: str, tag: str | None = None, *rest: Any, **options: Any) -> T:
        try:
            return load(native, engine, load_dir, tag, *rest, **options)
        except UniversalCheckpointError as error:
            way = None if tells_a_way_on(error) else _way_on(error, located(load_dir), tag)
            if way is None:
                raise
            if isinstance(error, ListingError):
                remedy = "\n".join(part for part in (error.remedy, way) if part)
                raise type(error)(error.heading, error.problems, remedy) from error
            raise type(error)(f"{error}; {way}") from error

    return told


def _way_on(error: UniversalCheckpointError, load_dir: Path, tag: str | None) -> str | None:
    if isinstance(error, DamagedCheckpointError | CheckpointNotFoundError):
        return _other_tags(load_dir, tag, str(error))
    return next((way for kind, way in _WAYS_ON.items() if isinstance(error, kind)), None)


def _other_tags(load_dir: Path, tag: str | None, message: str) -> str:
    """Name other tags that were saved there, the newest first."""
    root, tags = load_dir, list[str]()
    with suppress(OSError):  # a folder that can't be read
        if root.is_dir() and tag is None and not (root / "latest").is_file():
            root = root.parent
        tags = whole_tags(root)
    found = [name for name in tags if name != tag and str(root / name) not in message]
    if not found:
        return 'restore the files from a copy, or name the folder of another save; "ucp inspect PATH" tells whether it is one'
    return (
        f"restore the files from a copy, or load another tag of {root}: tag={', '.join(map(repr, found[:MOST_TOLD]))}"
    )
