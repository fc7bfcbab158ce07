"""Waiting for asynchronous saves; imports nothing of DeepSpeed unless one was begun."""

from __future__ import annotations

import atexit
import logging
import os
import sys

BACKGROUND_MODULE = "ucp_deepspeed.engine.background"


def wait_for_save() -> None:
    """Wait until the last asynchronous save is on disk and ``latest`` names it; does nothing if there is none.

    The next save and load do so anyway, and so does the end of the process. Collective, if the process group still exists.

    Raises:
        SaveError: on all ranks, if the save failed on one of them.
    """
    background = sys.modules.get(BACKGROUND_MODULE)
    if background is not None:
        background.wait_for_save()


@atexit.register
def _end_with_failure() -> None:
    """End with status 1 if the last save failed and nobody has been told.

    An exception in here would change nothing about the status. Registered when the package is imported, so that what was
    registered later has run by now. The threads that write have ended before.
    """
    background = sys.modules.get(BACKGROUND_MODULE)
    error = background.failure() if background is not None else None
    if error is None:
        return
    print(f"ucp_deepspeed: the last asynchronous save failed: {error}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
