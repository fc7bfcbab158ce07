"""Committed or absent: folders and files that appear whole, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ucp_deepspeed.checkpoint.universal import PARTIAL_MARK
from ucp_deepspeed.errors import ConfigError


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """A new folder to write in, which is renamed to ``final`` when the block ends and removed when it fails.

    Everything in it is flushed to disk before the rename. A terminated process (SIGTERM, Ctrl-C) removes it; one that was
    killed outright leaves a folder that readers refuse and that the next call for the same ``final`` removes.

    Raises:
        ConfigError: ``final`` exists already.
    """
    if final.exists():
        raise ConfigError(f"{final} exists already; nothing was written")
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    partial = final.parent / f".{final.name}{PARTIAL_MARK}{socket.gethostname()}-{os.getpid()}"
    with _terminated_as_exception():
        try:
            partial.mkdir()
            yield partial
            for entry in partial.iterdir():
                flush(entry)
            flush(partial)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    flush(final.parent)


def remove_abandoned(final: Path) -> None:
    """Remove what processes of this machine that are no longer alive left unfinished for ``final``."""
    prefix = f".{final.name}{PARTIAL_MARK}{socket.gethostname()}-"
    for entry in final.parent.iterdir():
        pid = entry.name.removeprefix(prefix)
        # A host whose name begins with this one's leaves folders with the same prefix and more than a number after it.
        if pid != entry.name and pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(entry)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new, whole, and a failure leaves the old."""
    partial = path.with_name(f".{path.name}{PARTIAL_MARK}{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    """Whether another process has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that cleaning up runs; only possible in the main thread."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
