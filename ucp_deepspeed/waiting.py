"""Waiting for asynchronous saves; imports nothing of DeepSpeed unless one was begun."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
from contextlib import suppress

BACKGROUND_MODULE = "ucp_deepspeed.engine.saving.background"


def wait_for_save() -> None:
    """Wait until the last asynchronous save of each engine is on disk and ``latest`` names it; does nothing if there is none.

    An engine's next save and load wait for its own save anyway, and the end of the process waits for all. Collective, if the
    process group still exists.

    Raises:
        SaveError: on all ranks, if a save failed on one of them.
    """
    background = sys.modules.get(BACKGROUND_MODULE)
    if background is not None:
        background.wait_for_save()


@atexit.register
def end_of_process() -> None:
    """Wait for the last save, and end with status 1 if it failed and nobody has been told.

    An exception in here wouldn't change the status. Handlers that were registered after the package was imported have run by now.
    """
    background = sys.modules.get(BACKGROUND_MODULE)
    error = background.last_failure() if background is not None else None
    if error is None:
        return
    reason = str(error) or f"interrupted by {type(error).__name__}"
    print(f"ucp_deepspeed: the last asynchronous save failed: {reason}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def end_quickly() -> None:
    """Keep the interpreter from looking for cycles when this process ends: with DeepSpeed that takes it seconds, in which another
    round could begin. What files hold in their buffers is written, also of those that only a cycle refers to."""
    atexit.register(_leave_cycles)


def _leave_cycles() -> None:
    for each in gc.get_objects():
        if issubclass(type(each), (io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper)):
            with suppress(Exception):  # a file that is closed, or whose disk is full
                each.flush()
    gc.freeze()
