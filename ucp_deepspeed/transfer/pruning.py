"""Remove checkpoints that retention lets go, while other processes may read and write in the same folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.opening import LATEST_NAME, read_latest
from ucp_deepspeed.checkpoint.retention import Fate, Keep, fates
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME
from ucp_deepspeed.checkpoint.whole import checkpoints_in
from ucp_deepspeed.errors import CheckpointNotFoundError, ConfigError
from ucp_deepspeed.remote import is_url
from ucp_deepspeed.transfer.commit import hold, release, remove_hidden
from ucp_deepspeed.transfer.open_files import close_quietly

logger = logging.getLogger("ucp_deepspeed")


@contextmanager
def reading(tag: Path) -> Iterator[None]:
    """Keep a tag from being pruned in the block, where the file system has locks. Changes nothing on disk."""
    descriptor = None if is_url(tag) else _opened(tag)
    try:
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        if descriptor is not None:
            close_quietly(descriptor)


def _opened(tag: Path) -> int | None:
    """Open the file that stands for a tag; None if there is none that may be read. The folder's own lock is its writer's."""
    names = [INDEX_NAME, MANIFEST_NAME]
    with suppress(OSError):
        names += sorted(entry.name for entry in tag.iterdir() if entry.name.endswith("_model_states.pt"))[:1]
    for name in names:
        with suppress(OSError):
            return os.open(tag / name, os.O_RDONLY | os.O_NONBLOCK)
    return None


def _is_read(tag: Path) -> bool:
    if (descriptor := _opened(tag)) is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        pass
    finally:
        close_quietly(descriptor)
    return False


def prune(
    folder: str | Path,
    keep: Keep,
    *,
    remove: bool = True,
    in_use: Callable[[Path], str | None] = lambda path: None,
) -> list[Fate]:
    """Remove the checkpoints of a folder that need not be kept; see `fates`. Return what became of each, newest first.

    A checkpoint is renamed before it is removed, so that nobody finds a part of it.

    Args:
        remove: False to remove nothing.
        in_use: see `fates`; besides, what other processes of this machine read or write is found by their locks.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        ConfigError: it is in a store.
        DamagedCheckpointError: the file ``latest`` can't be read: nothing tells which checkpoint it names.
        OSError: one can't be removed.
    """
    if is_url(folder):
        told = "a store has none of the locks that tell which checkpoints are in use"
        raise ConfigError(f"{folder}: {told}; remove tags with the store's own commands, such as aws s3 rm --recursive")
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointNotFoundError(f"no folder at {root}")
    latest = root / LATEST_NAME
    named = root / read_latest(latest) if latest.is_file() else None

    def used(path: Path) -> str | None:
        return in_use(path) or _used(path)

    found = fates(checkpoints_in(root), keep, named, in_use=used)
    for fate in found:
        if fate.stays is None and remove:
            _remove(fate)
    return found


def _used(path: Path) -> str | None:
    if not hold(path):
        return "it is being written"
    release(path)
    inner = [entry for entry in path.iterdir() if entry.is_dir()]
    return "it is being read" if any(map(_is_read, (path, *inner))) else None


def _remove(fate: Fate) -> None:
    checkpoint = fate.checkpoint
    logger.info("removing %s: %s", checkpoint.path, checkpoint.problem or "newer ones are whole")
    remove_hidden(checkpoint.path)
