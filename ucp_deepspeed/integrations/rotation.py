"""Rotation that counts whole checkpoints only, and never meets a save that isn't finished."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ucp_deepspeed.checkpoint.whole import problem_of

logger = logging.getLogger("ucp_deepspeed")


def rotate(
    folders: Sequence[Path],
    most: int,
    pinned: Collection[Path] = (),
    remove: Callable[[Path], object] = shutil.rmtree,
) -> list[Path]:
    """Remove old checkpoints. Return those that were removed.

    The newest ``most`` whole ones stay, at least one. So does what is being written, whatever is newer than the newest whole
    one, and ``pinned``, which counts.

    Args:
        folders: the checkpoints, oldest first.
        pinned: checkpoints that are never removed.
    """
    from ucp_deepspeed.engine.saving.background import is_pending

    whole = [each for each in folders if not is_pending(each) and problem_of(each) is None]
    if not whole:
        return []
    kept = {each for each in whole if each in pinned}
    for each in reversed(whole):
        if len(kept) < max(most, 1) or each == whole[-1]:
            kept.add(each)
    older = folders[: folders.index(whole[-1])]
    doomed = [each for each in older if each not in kept and each not in pinned and not is_pending(each)]
    for each in doomed:
        logger.info("removing %s, since %d newer checkpoints are whole", each, len(kept))
        remove(each)
    return doomed
