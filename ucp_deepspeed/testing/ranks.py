"""Real ranks on one CPU machine, kept alive across tests: starting a DeepSpeed rank takes seconds, calling it milliseconds.

A pool is a set of processes that have joined one gloo process group through ``deepspeed.init_distributed``.
`RankPool.run` calls a module-level function on all of them. A rank that fails while others wait in a collective can't be rescued:
the pool is then killed, and started again by the next call. Between calls the ranks keep their state, as any process does.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MOST_RANKS = 8
"""Ranks alive at a time over all shared pools: the least recently used pool makes room."""

MOST_RUNS = 15
"""Calls that the same processes answer: engines leave threads of process groups behind, and a fresh start gets rid of them."""

GRACE_SECONDS = 5.0
"""How long the other ranks may take to finish once one has failed."""

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


class RankError(Exception):
    """A function failed on a rank, or didn't return in time.

    Attributes:
        rank: the first rank that failed; None for a timeout.
        original: its exception, where it could be sent.
    """

    def __init__(self, message: str, rank: int | None = None, original: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.original = original


class RankPool:
    """Ranks of one world size; started by the first `run`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._log: Path | None = None
        self._runs = 0

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180.0, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; returns the results in rank order.

        Args:
            timeout: seconds until the ranks are given up and killed.

        Raises:
            RankError: a rank failed or died, or the time is up.
        """
        self._start()
        for connection in self._connections:
            connection.send((function, args, kwargs))
        results: dict[int, Any] = {}
        failures: list[tuple[int, str, BaseException | None]] = []
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            answered = {rank for rank, *_ in failures} | results.keys()
            pending = [rank for rank in range(self.world_size) if rank not in answered]
            ready = wait([self._connections[rank] for rank in pending], timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for rank in (rank for rank in pending if self._connections[rank] in ready):
                succeeded, content, original = _receive(self._connections[rank])
                if succeeded:
                    results[rank] = content
                else:
                    failures.append((rank, content, original))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        raise self._failure(function, failures, len(results) + len(failures), timeout)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._log is not None:
            self._log.unlink(missing_ok=True)
            self._log = None

    def _failure(self, function: Callable[..., Any], failures: list[Any], answered: int, timeout: float) -> RankError:
        log = self._log.read_text(errors="replace")[-4000:] if self._log and answered < self.world_size else ""
        if answered < self.world_size:  # somebody hangs
            self.close()
        if not failures:
            return RankError(f"{function.__name__} took more than {timeout} s on {self.world_size} ranks\n{log}")
        rank, content, original = failures[0]
        return RankError(
            f"{function.__name__} failed on rank {rank} of {self.world_size}:\n{content}\n{log}", rank, original
        )

    def _start(self) -> None:
        self._runs += 1
        if self._processes and all(process.is_alive() for process in self._processes) and self._runs <= MOST_RUNS:
            return
        self.close()
        self._runs = 1
        context = multiprocessing.get_context("spawn")
        descriptor, name = tempfile.mkstemp(prefix="ranks-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs, name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


_pools: dict[int, RankPool] = {}


def get_pool(world_size: int) -> RankPool:
    """The shared pool of a world size; closes others when too many ranks would be alive."""
    pool = _pools.pop(world_size, None) or RankPool(world_size)
    _pools[world_size] = pool
    for size in list(_pools)[:-1]:
        if sum(_pools) > MOST_RANKS:
            _pools.pop(size).close()
    return pool


@atexit.register
def close_pools() -> None:
    """End all shared pools."""
    while _pools:
        _pools.popitem()[1].close()


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reset_parallel_state() -> None:
    """On a rank: end DeepSpeed's and Megatron-Core's process groups, so that another topology can be set up. Collective.

    Each gloo group has threads and sockets of its own: groups that are only forgotten slow the machine down more and more.
    """
    from deepspeed.utils import groups
    from torch.distributed import destroy_process_group, distributed_c10d

    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    groups._release_process_group_references()
    world = distributed_c10d._get_default_group()
    for group in [group for group in distributed_c10d._world.pg_map if group is not world]:
        destroy_process_group(group)
    gc.collect()


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """On a rank: let DeepSpeed build fp16 engines on CPUs without native fp16; torch computes them all the same."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        accelerator.is_fp16_supported = supported


def _receive(connection: Connection) -> tuple[bool, Any, BaseException | None]:
    try:
        succeeded, content, pickled = connection.recv()
    except (EOFError, ConnectionResetError):
        return False, "the process died", None
    return succeeded, content, pickle.loads(pickled) if pickled else None


def _serve(rank: int, world_size: int, port: int, connection: Connection, log: str) -> None:
    """A rank's life: join the process group, then answer calls until the parent goes away."""
    _die_with_parent()
    with Path(log).open("a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update(ENVIRONMENT | {key: str(value) for key, value in ranks.items()})
    import deepspeed

    _use_gloo_only()
    deepspeed.init_distributed("gloo", verbose=False)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, args, kwargs))


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any, bytes | None]:
    try:
        return True, function(*args, **kwargs), None
    except BaseException as error:
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except (TypeError, AttributeError, pickle.PicklingError):
            pickled = None
        return False, traceback.format_exc(), pickled


def _use_gloo_only() -> None:
    """Keep DeepSpeed from loading its shared-memory op, which only speeds up small reductions.

    torch guards the loading of such an op with a file that a killed process leaves behind, on which every later start waits for
    ever; and ranks of a pool are killed. Without the op DeepSpeed reduces through gloo.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def _die_with_parent() -> None:
    """Linux: be killed when the parent dies, however it dies."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
