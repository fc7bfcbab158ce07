"""Tag folders beside one another, and the mark of one whose save isn't finished (`docs/format.md`, *Unfinished saves*)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.encoding import read_document
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, home_of, is_unfinished
from ucp_deepspeed.errors import DamagedCheckpointError

MARK_VERSION = 1

MOST_TOLD = 5
"""Most tags that a message names."""

COARSEST_TIMES = 2
"""Seconds. Copies and file systems keep times of writing no finer than that."""


class Written(NamedTuple):
    """Size of a file, and the second of its last write."""

    size: int
    seconds: int

    def is_same(self, other: Written) -> bool:
        """Return whether a file wasn't written since, as far as that tells."""
        return self.size == other.size and abs(self.seconds - other.seconds) < COARSEST_TIMES


class Mark(BaseModel):
    """The mark, which stands from before DeepSpeed writes until the manifest is there.

    Attributes:
        format_version: `MARK_VERSION`; a reader refuses a later one.
        save_id: random, of this save alone.
        seconds: time at which the file itself was written. If it has another one, the folder was copied without times.
        files: the files that were there, as they were.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = MARK_VERSION
    save_id: str
    seconds: int
    files: Mapping[str, tuple[int, int]]

    def unwritten(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Return the files that are still those from before the save; all of them if the times don't tell."""
        if abs(int((folder / MARK_NAME).stat().st_mtime) - self.seconds) >= COARSEST_TIMES:
            return list(names)
        found = ((name, self.files.get(name)) for name in names)
        return [name for name, held in found if held is not None and Written(*held).is_same(_written(folder / name))]


def _written(path: Path) -> Written:
    status = path.stat()
    return Written(status.st_size, int(status.st_mtime))


def mark_of(folder: Path, save_id: str) -> Mark:
    """Return the mark of a save that is about to begin."""
    files = {
        entry.name: tuple(_written(entry))
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".") and entry.is_file()
    }
    return Mark(save_id=save_id, seconds=int(time.time()), files=files)


def is_marked(folder: Path) -> bool:
    """Return whether a save into a folder was begun and not finished. While files are written there is no manifest."""
    mark = folder / MARK_NAME
    return (mark.exists() or mark.is_symlink()) and not (folder / MANIFEST_NAME).is_file()


def read_mark(folder: Path) -> Mark | None:
    """Return the mark of an unfinished save; None if there is none.

    Raises:
        DamagedCheckpointError: it can't be parsed.
    """
    if not is_marked(folder):
        return None
    try:
        return read_document(folder / MARK_NAME, Mark, "a mark", MARK_VERSION)
    except DamagedCheckpointError as error:
        raise unfinished(folder, str(error)) from error


def unfinished(folder: Path, reason: str) -> DamagedCheckpointError:
    """Return the error for a folder with a mark. It names the tags beside it that have none, the newest first."""
    others = [name for name in whole_tags(folder.parent) if name != folder.name]
    way = f"load another tag of {folder.parent}: tag={', '.join(map(repr, others[:MOST_TOLD]))}"
    way = way if others else "no other tag is there"
    return DamagedCheckpointError(
        f"a save into {folder} was not finished ({reason}); {way}. If DeepSpeed alone has saved it whole since then, remove "
        f"{MARK_NAME}"
    )


def whole_tags(root: Path) -> list[str]:
    """Return the names of the tags in a folder that have no mark, the newest first."""
    found = {name: root / name for name in tags_in(root)}
    seconds: dict[str, float] = {}
    for name, folder in found.items():
        with suppress(OSError):  # a folder that can't be read
            if not is_marked(folder):
                seconds[name] = folder.stat().st_mtime if folder.exists() else 0
    return sorted(seconds, key=lambda name: seconds[name], reverse=True)


def holds_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a tag's, by the names of its files."""
    if (folder / INDEX_NAME).is_file() or is_dcp(folder):
        return True
    return folder.is_dir() and any(entry.name.endswith("_model_states.pt") for entry in folder.iterdir())


def is_dcp(folder: Path) -> bool:
    """Return whether a folder is one of ``torch.distributed.checkpoint``, by the names of its files."""
    return (folder / METADATA_NAME).is_file()


def tags_in(root: Path) -> list[str]:
    """Return the names of the tags in a folder; those that can't be read are left out, and all if the folder can't."""
    found = set()
    with suppress(OSError):
        for entry in root.iterdir():
            with suppress(OSError):
                if entry.is_dir() and not is_unfinished(entry) and holds_checkpoint(entry):
                    found.add(home_of(entry).name)
    return sorted(found)
