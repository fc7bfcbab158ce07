"""Rotation as frameworks do it, which counts whole checkpoints only and never meets a save that isn't finished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ucp_deepspeed.checkpoint.retention import Keep, fates
from ucp_deepspeed.checkpoint.whole import FoundCheckpoint, problem_of

logger = logging.getLogger("ucp_deepspeed")


def rotate(
    folders: Sequence[Path],
    most: int,
    pinned: Collection[Path] = (),
    remove: Callable[[Path], object] = shutil.rmtree,
    problem: Callable[[Path], str | None] = problem_of,
) -> list[Path]:
    """Remove old checkpoints. Return those that were removed, oldest first.

    Args:
        folders: the checkpoints, oldest first.
        most: so many whole ones stay, ``pinned`` ones counted; the newest whole one always does.
        pinned: checkpoints that are never removed.
        problem: says why a checkpoint isn't whole.
    """
    found = [FoundCheckpoint(path, number, 0.0, problem(path)) for number, path in enumerate(folders)][::-1]
    whole = [each.path for each in found if each.problem is None and in_use(each.path) is None]
    beside = [sum(each in pinned for each in whole[last:]) for last in range(len(whole) + 1)]
    last = max((last for last in range(1, len(whole) + 1) if last + beside[last] <= most), default=1)
    doomed = [fate for fate in fates(found, Keep(last=last), pinned=pinned, in_use=in_use) if fate.stays is None]
    for fate in reversed(doomed):
        logger.info("removing %s: %s", fate.checkpoint.path, fate.checkpoint.problem or "newer ones are whole")
        remove(fate.checkpoint.path)
    return [fate.checkpoint.path for fate in reversed(doomed)]


def in_use(folder: Path) -> str | None:
    """Return that this process saves into a checkpoint in the background; None if it doesn't."""
    from ucp_deepspeed.engine.saving.background import is_pending

    return "it is being written" if is_pending(folder) else None
