"""Processes that convert together: they divide the output by bytes, meet in its files, and agree through a store of texts."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import ConfigError, OtherRankError, UniversalCheckpointError
from ucp_deepspeed.transfer.commit import wait_until
from ucp_deepspeed.transfer.signals import terminated_as_exception

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that ``torchrun`` sets, and other launchers."""


class Ranks:
    """The ranks of a conversion, as one of them sees them; rank 0 makes the folder and commits it.

    They share a store, all of whose keys belong to that conversion.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, count: int = 1) -> None:
        """Without arguments: this process alone."""
        self.rank, self.count = rank, count
        self._store, self._waited = store or dist.HashStore(), False
        self._looked = 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}

    def gather(self, step: str, value: Any) -> Sequence[Any]:
        """Return each rank's value, of plain data, when all have come to this step. Collective, with `check`: rank 0 collects."""
        values: list[Any] = []
        with _reachable():
            self._store.set(f"{step}/{self.rank}", json.dumps(value))
            if self.rank == 0:
                keys = [f"{step}/{rank}" for rank in range(self.count)]
                self._await(keys)
                values = [json.loads(self._store.get(key)) for key in keys]
        found: list[Any] = self.broadcast(step, values)
        return found

    def broadcast(self, step: str, value: Any = None) -> Any:
        """Return rank 0's value, of plain data, on all ranks. Rank 0 goes on at once; the others wait, with `check`."""
        key = f"{step}/all"
        with _reachable():
            if self.rank == 0:
                self._store.set(key, json.dumps(value))
                return value
            self._await([key])
            return json.loads(self._store.get(key))

    def check(self) -> None:
        """Raise an OtherRankError if a rank has failed; called now and then while working."""
        with _reachable():
            if self._store.check(["failed"]):
                raise OtherRankError(self._store.get("failed").decode())

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """End all ranks if one has an error in the block. On rank 0 the others have usually stopped when the error is raised."""
        try:
            yield
        except BaseException as error:
            with suppress(dist.DistError):
                if not isinstance(error, OtherRankError):
                    self._store.compare_set(
                        "failed", "", f"rank {self.rank} on {socket.gethostname()}: {_reason(error)}"
                    )
                if self.rank == 0:
                    self._await_leaving()
            raise

    def leave(self, failed: bool) -> None:
        """Say that this rank ends; its last action. Rank 0 may have the store: it ends last or, with ``failed``, first.

        Args:
            failed: a launcher terminates the other ranks when one has ended, and rank 0 must have cleaned up by then.
        """
        with suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self._await_leaving()
                self._store.set("gone", "")
            elif failed:
                wait_until(lambda: self._store.check(["gone"]), tunables.LEAVE_SECONDS)

    def _await_leaving(self) -> None:
        if not self._waited and self.count > 1:
            keys = [f"left/{rank}" for rank in range(1, self.count)]
            wait_until(lambda: self._store.check(keys), tunables.LEAVE_SECONDS)
        self._waited = True

    def _await(self, keys: list[str]) -> None:
        while not self._store.check(keys):
            self.check()
            self._listen()
            time.sleep(tunables.LOOK_SECONDS)

    def _listen(self) -> None:
        """Check that no rank has been silent for too long: rank 0 checks all others, and these check rank 0."""
        now = time.monotonic()
        if now - self._looked < tunables.BEAT_SECONDS:
            return
        self._looked = now
        for rank in range(1, self.count) if self.rank == 0 else (0,):
            key = f"alive/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if self._heard.get(rank, (None, 0.0))[0] != beat:
                self._heard[rank] = beat, now
            elif now - self._heard[rank][1] > tunables.LOST_SECONDS:
                text = f"rank {rank} hasn't been heard of for {tunables.LOST_SECONDS:g} s"
                self._store.compare_set("failed", "", text)
                raise OtherRankError(text)


@contextmanager
def _beating(store: dist.Store, rank: int) -> Iterator[None]:
    """Give signs of life of this rank, again and again, whatever it is busy with."""
    stopped = threading.Event()

    def beat() -> None:
        with suppress(dist.DistError):  # the store is gone: a waiting rank sees it too
            for number in count(1):
                store.set(f"alive/{rank}", str(number))
                if stopped.wait(tunables.BEAT_SECONDS):
                    return

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        stopped.set()
        heart.join()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Yield the ranks that a launcher such as ``torchrun`` started; this process alone where none did.

    Raises:
        ConfigError: some of the variables are missing.
        OtherRankError: in the block, if another rank fails.
        UniversalCheckpointError: the ranks don't find one another.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is set, and {', '.join(missing)} isn't; start the ranks with torchrun")
    with _reachable():
        try:
            found = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=tunables.JOIN_SECONDS))))
        except (ValueError, OverflowError, TypeError) as error:
            values = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
            raise ConfigError(f"{values}: {error}") from error
    with taking_part(*found) as ranks:
        yield ranks


@contextmanager
def taking_part(store: dist.Store, rank: int, count: int) -> Iterator[Ranks]:
    """Yield one of the ranks that share a store; in the block an error of one is an OtherRankError of all others."""
    ranks, failed = Ranks(store, rank, count), True
    try:
        with terminated_as_exception(), ranks.failing_together(), _beating(store, rank):
            yield ranks
        failed = False
    finally:
        ranks.leave(failed)


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise UniversalCheckpointError(f"the other ranks can't be reached: {error}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, (UniversalCheckpointError, OSError)):
        return str(error)
    return "terminated" if isinstance(error, (SystemExit, KeyboardInterrupt)) else f"{type(error).__name__}: {error}"
