"""The checkpoints of a folder: which are whole, and which of them is the newest.

A checkpoint is what a load takes: a tag folder, or a folder that a framework makes for each save, with tag folders in it. Only
names, sizes and records are read; `ucp_deepspeed.verify` also compares the bytes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.evidence import evidence_of
from ucp_deepspeed.checkpoint.opening import LATEST_NAME, open_checkpoint, read_latest
from ucp_deepspeed.checkpoint.tags import is_dcp, is_marked, tags_in
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, is_unfinished
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.remote import located

logger = logging.getLogger("ucp_deepspeed")

COMPANIONS = {r"checkpoint-\d+": "trainer_state.json", r"checkpoint_\d+": "random_states_0.pkl"}
"""Names of folders that frameworks make → the file without which the framework can't resume from one. It counts where some
folder beside it has it."""

ACCELERATE_KEY = "ucp_accelerate"
"""Key of the client state: what Accelerate's checkpoints say of themselves."""

TAGS_KEY = "tags"
"""Key in that: the tags of all models, which are one checkpoint."""

_ENDINGS = "_states.pt", INDEX_NAME, MANIFEST_NAME, MARK_NAME


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint in a folder.

    Attributes:
        path: the folder to load.
        step: steps of the run, or the number in its name; -1 if nothing tells.
        seconds: time at which its newest file was written.
        problem: why it isn't whole; None if it is.
    """

    path: Path
    step: int
    seconds: float
    problem: str | None

    @property
    def order(self) -> tuple[int, float]:
        """Return what tells the newer of two: the later step, else the later time."""
        return self.step, self.seconds


def checkpoints_in(folder: str | Path) -> list[FoundCheckpoint]:
    """Return the checkpoints in a folder, the newest first; none if there is no such folder."""
    root = located(folder)
    held = [*_tags_in(root), *(root / name for name in sorted(_unfinished_in(root)))]
    made = [entry for entry in _folders_in(root) if entry not in held and (_tags_of(entry) or _lacks(entry))]
    found = [_found(path, [path]) for path in dict.fromkeys(held)] + [_found(path, _tags_of(path)) for path in made]
    return sorted(found, key=lambda each: each.order, reverse=True)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the path of the newest whole checkpoint in a folder, for ``load_checkpoint`` or a framework's resume; None if there
    is none. The newest is that of the latest step. Newer ones that aren't whole are named in a warning.

    Args:
        folder: the folder of a run: with tag folders in it, or with a folder for each save, such as ``checkpoint-100``.
    """
    passed: list[str] = []
    for found in checkpoints_in(folder):
        if found.problem is None:
            if passed and _tells():
                logger.warning("taking %s; newer ones aren't whole: %s", found.path, "; ".join(passed))
            return str(found.path)
        passed.append(found.problem)
    if passed and _tells():
        logger.warning("no checkpoint of %s is whole: %s", folder, "; ".join(passed))
    return None


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint isn't whole; None if it is. ``folder`` is a tag's, or one with tag folders in it."""
    tags = _tags_of(folder)
    return _found(folder, tags or [folder]).problem


def _found(path: Path, tags: list[Path]) -> FoundCheckpoint:
    step, problem = -1, None
    for tag in tags:
        reason, steps = _looked_into(tag)
        step, problem = max(step, steps), problem or reason
    number = re.search(r"(\d+)$", path.name)
    if step < 0 and number:
        step = int(number[1])
    if problem is None and tags != [path]:
        problem = _without_latest(path) or _lacks(path) or _lacks_model(path, tags[0])
    return FoundCheckpoint(path, step, max(map(_time_of, tags), default=0.0), problem)


def _looked_into(tag: Path) -> tuple[str | None, int]:
    """Return why a tag isn't whole, and its step, -1 if it can't be opened."""
    try:
        held = sorted((str(path), status.st_size, status.st_mtime_ns) for path, status in _statuses(tag))
    except OSError as error:
        return str(error), -1
    return _looked_once(tag, tuple(held))


def _statuses(tag: Path) -> Iterator[tuple[Path, os.stat_result]]:
    return ((path, path.stat()) for path in tag.iterdir())


@lru_cache(maxsize=4096)
def _looked_once(tag: Path, held: tuple[tuple[str, int, int], ...]) -> tuple[str | None, int]:
    """Look into a tag whose files, sizes and times are these: retention asks for the same tags after every save."""
    try:
        if is_marked(tag):
            return f"a save into {tag} was not finished", -1
        checkpoint, evidence = open_checkpoint(tag), evidence_of(tag)
        step = checkpoint.run.global_steps
        problems = evidence.problems or ([] if evidence.save_id is not None else evidence.of_one_save(checkpoint)[0])
    except (UniversalCheckpointError, OSError) as error:
        return str(error), -1
    return problems[0].detail if problems else None, step


def _without_latest(path: Path) -> str | None:
    """Return that the file which a load follows is missing or names no tag; None if all is well."""
    try:
        if not (path / LATEST_NAME).is_file():
            return f"{path} has no file {LATEST_NAME!r}: its save was not finished"
        tag = read_latest(path / LATEST_NAME)
    except (UniversalCheckpointError, OSError) as error:
        return str(error)
    return None if (path / tag).is_dir() else f"{path / LATEST_NAME} names {tag!r}, which isn't there"


def _lacks(path: Path) -> str | None:
    """Return that a framework's own file is missing in its folder; None if nothing is."""
    for pattern, name in COMPANIONS.items():
        if not re.fullmatch(pattern, path.name) or (path / name).is_file():
            continue
        beside = (entry for entry in _folders_in(path.parent) if re.fullmatch(pattern, entry.name))
        if any((entry / name).is_file() for entry in beside):
            return f"{path} lacks {name}: its save was not finished"
    return None


def _lacks_model(path: Path, tag: Path) -> str | None:
    """Return that a model is missing of those that a framework has saved together; None if none is."""
    try:
        record = open_checkpoint(tag).client_state()[1].get(ACCELERATE_KEY)
    except (UniversalCheckpointError, OSError) as error:
        return str(error)
    named = record.get(TAGS_KEY) if isinstance(record, dict) else None
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list | tuple) else []
    missing = [name for name in names if not (path / name).is_dir()]
    return f"{path} lacks {missing[0]}: its save was not finished" if missing else None


def _folders_in(root: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_unfinished(entry))
    return []


def _unfinished_in(root: Path) -> Iterator[str]:
    return (entry.name for entry in _folders_in(root) if is_marked(entry))


def _tags_of(folder: Path) -> list[Path]:
    """Return the tag folders in a folder, also those whose save wasn't finished."""
    return sorted({*_tags_in(folder), *(folder / name for name in _unfinished_in(folder))})


def _tags_in(root: Path) -> list[Path]:
    """Return the tag folders of DeepSpeed's and the universal form: whoever has written others decides what becomes of them."""
    return [root / name for name in tags_in(root) if not is_dcp(root / name)]


def _time_of(tag: Path) -> float:
    with suppress(OSError):
        return max((file.stat().st_mtime for file in tag.iterdir() if file.name.endswith(_ENDINGS)), default=0.0)
    return 0.0


def _tells() -> bool:
    """Return whether this process is the one that logs what all ranks see alike."""
    return os.environ.get("RANK", "0") == "0"
