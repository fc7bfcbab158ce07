"""Signals of a process that writes: as exceptions, or put off for a moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any


@contextmanager
def _handling(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Let a handler have signals in the block. It works only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def terminated_as_exception() -> AbstractContextManager[None]:
    """Turn SIGTERM, and SIGHUP of a terminal that is gone, into SystemExit inside the block, so that cleaning up runs.

    It works only in the main thread. An ignored signal, as SIGHUP is under nohup, stays ignored.
    """

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    hangs_up = signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    return _handling([signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])], terminate)


def undisturbed() -> AbstractContextManager[None]:
    """Ignore signals in a short block that must be done whole, also the SIGTERM of a launcher when one rank has failed."""
    return _handling((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), signal.SIG_IGN)
