"""Real ranks on one CPU machine. They stay alive across tests and are forked from one process: importing DeepSpeed takes seconds.

A pool is a set of processes that have joined one gloo process group through ``deepspeed.init_distributed``. `RankPool.run` calls
a module-level function on all of them. If some ranks failed and others didn't, they may have lost step in their collectives: such
a pool is killed, and the next call starts it again. A pool whose ranks all failed is kept.

Between calls only garbage is collected. A function that sets up parallel state, or expects none, calls `reset_parallel_state`.
Ranks die with the process that started them.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from random import SystemRandom
from typing import Any
from unittest.mock import patch

MOST_RANKS = 8
"""Number of ranks alive at a time over all shared pools: the least recently used pool makes room."""

MOST_RUNS = 15
"""Number of calls that the same processes answer: engines leave threads of process groups behind, and a fresh start removes
them."""

GRACE_SECONDS = 5.0
"""Seconds that the other ranks may take to finish once one has failed."""

START_SECONDS = 120.0
"""Seconds that ranks may take to join; a busy machine needs more of them."""

DUMP_SECONDS = 0.2
"""Seconds that a hanging rank gets to write down where it hangs."""

LOG_CHARACTERS = 4000
"""Number of characters from the end of the ranks' output that an error shows."""

BACKENDS = {"cpu": "gloo", "standin": "nccl_like", "cuda": "nccl"}
"""The backend with which ranks of each device exchange tensors."""

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


IMPORTED_ONCE = ["ucp_deepspeed.testing.imported_once"]
"""Modules to import once, with all that they import: torch, DeepSpeed and Megatron-Core, which otherwise take seconds of each
rank's start. What is added counts from the next start of the process that ranks are forked from."""


_PICKLING_ERRORS = (
    pickle.PickleError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Answer = tuple[bool, Any, bytes | None]
"""The answer of one rank: whether it succeeded, the result or the traceback, and the pickled exception where that is possible."""


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
    """Ranks of one world size. The first `run` starts them; after ``most_runs`` calls they start again, and what calls left is
    gone.

    Args:
        device: ``cpu`` with gloo, ``standin`` (see `ucp_deepspeed.testing.device`), or ``cuda`` with NCCL, one rank for each GPU.
    """

    def __init__(self, world_size: int, most_runs: int = MOST_RUNS, device: str = "cpu") -> None:
        self.world_size, self.device = world_size, device
        self._most_runs = most_runs
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._log: Path | None = None
        self._damaged = False
        self._runs = 0

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180.0, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; return the results in rank order.

        Args:
            function: the function; it is sent by import path, with pickled arguments.
            timeout: seconds until the ranks are given up and killed; starting them doesn't count.

        Raises:
            RankError: a rank failed or died, or the time is up.
        """
        call = ForkingPickler.dumps((function, args, kwargs)).tobytes()
        self._start()
        for connection in self._connections:
            # A rank that has died since its last answer is found when its answer is read.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send((sys.path, call))
        return self._collect(function.__name__, timeout)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._damaged = [], [], False
        if self._log is not None:
            self._log.unlink(missing_ok=True)
            self._log = None

    def _dump_stacks(self, ranks: list[int]) -> None:
        """Make these ranks write to the log where they hang."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
                time.sleep(DUMP_SECONDS)  # one after the other: they share the log

    def _start(self) -> None:
        self._runs += 1
        usable = self._processes and not self._damaged and self._runs <= self._most_runs
        if usable and all(process.is_alive() for process in self._processes):
            return
        self.close()
        self._runs = 1
        try:
            self._start_once()
        except RankError:
            # Another process may have taken the port between its choice and its use.
            self._start_once()

    def _start_once(self) -> None:
        context = _context()
        descriptor, name = tempfile.mkstemp(prefix="ranks-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, theirs, name, self.device), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        try:
            self._collect("starting", START_SECONDS)
        except RankError:
            self.close()
            raise

    def _collect(self, name: str, timeout: float) -> list[Any]:
        """Wait for one answer of every rank; return the results or raise `RankError`."""
        results: dict[int, Any] = {}
        failures: list[tuple[int, str, BaseException | None]] = []
        pending = dict(enumerate(self._connections))
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(pending.values(), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                try:
                    succeeded, content, pickled = pending.pop(rank).recv()
                except (EOFError, ConnectionResetError):
                    succeeded, content, pickled = False, "the process died", None
                    self._damaged = True
                if succeeded:
                    results[rank] = _unpickle(content)
                else:
                    failures.append((rank, content, _unpickle_error(pickled)))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        raise self._failure(name, timeout, results, failures)

    def _failure(self, name: str, timeout: float, results: Mapping[int, Any], failures: list[Any]) -> RankError:
        """Return the error to raise; end the ranks unless all of them are alive and failed."""
        log = ""
        answered = results.keys() | {rank for rank, *_ in failures}
        waiting = [rank for rank in range(self.world_size) if rank not in answered]
        if self._damaged or len(failures) < self.world_size:
            self._dump_stacks(waiting)
            output = self._log.read_text(errors="replace").strip() if self._log else ""
            log = f"\noutput of the ranks:\n{output[-LOG_CHARACTERS:]}" if output else ""
            self.close()
        if not failures:
            return RankError(f"{name} took more than {timeout} s on ranks {waiting} of {self.world_size}{log}")
        rank, content, original = failures[0]
        others = f"\nranks {waiting} didn't finish and were killed" if waiting else ""
        return RankError(f"{name} failed on rank {rank} of {self.world_size}:\n{content}{others}{log}", rank, original)


_pools: dict[tuple[int, str], RankPool] = {}


DEVICE = "cpu"
"""Device of the ranks, unless a caller names another."""


def get_pool(world_size: int, device: str | None = None) -> RankPool:
    """Return the shared pool of a world size and device; close others when too many ranks would be alive."""
    device = device or DEVICE
    key = world_size, device
    pool = _pools.pop(key, None) or RankPool(world_size, device=device)
    _pools[key] = pool
    for other in list(_pools)[:-1]:
        if sum(size for size, _ in _pools) > MOST_RANKS:
            _pools.pop(other).close()
    return pool


@atexit.register
def close_pools() -> None:
    """End all shared pools."""
    while _pools:
        _pools.popitem()[1].close()


def _context() -> Any:
    """Return the context that forks ranks from a process that has imported the slow modules, and has run nothing of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    meanwhile = ENVIRONMENT | {"PYTHONWARNINGS": "ignore"}  # DeepSpeed looks at the environment when it is imported
    with patch.dict(os.environ, meanwhile):
        forkserver.ensure_running()
    return context


PORTS = 20_000, 32_768
"""Range to take ports from, below the ports that Linux hands out (``net.ipv4.ip_local_port_range``)."""


def free_port() -> int:
    """Return a TCP port that nothing listens on now. The system doesn't hand out ports of that range by itself: otherwise another
    process might get it before it is used."""
    while True:
        port = SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def reset_parallel_state() -> None:
    """End DeepSpeed's and Megatron-Core's process groups on a rank, so that another topology can be set up. Collective.

    Each gloo group has threads and sockets of its own: groups that are only forgotten slow the machine down more and more.
    """
    from deepspeed.utils import groups
    from torch.distributed import destroy_process_group, distributed_c10d

    from ucp_deepspeed.engine.agreement import control_group

    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    _forget_groups(groups)
    kept = distributed_c10d._get_default_group(), control_group()
    for group in [group for group in distributed_c10d._world.pg_map if group not in kept]:
        destroy_process_group(group)
    gc.collect()


def _forget_groups(groups: Any) -> None:
    """Clear the process groups in ``deepspeed.utils.groups``; versions before 0.19.8 have no function for it."""
    if hasattr(groups, "_release_process_group_references"):
        groups._release_process_group_references()
        return
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and name.isupper():
            setattr(groups, name, {} if isinstance(value, dict) else None)
    groups.mpu = groups.mesh_device = None
    groups.expert_tensor_parallel_world_size = 1


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Let DeepSpeed on a rank build fp16 engines on CPUs without native fp16; torch computes them all the same."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        accelerator.is_fp16_supported = supported


def gather_tokens_over_gloo() -> None:
    """Let DeepSpeed's mixture-of-experts layers on a rank run under tensor parallelism.

    ``moe/mappings.py`` gathers a tensor of three dimensions into a flat one; NCCL takes this and gloo doesn't. Only that call is
    replaced; calling this function again changes nothing.
    """
    import deepspeed.comm

    native = deepspeed.comm.comm.all_gather_into_tensor

    def all_gather_into_tensor(output_tensor: Any, tensor: Any, *rest: Any, **settings: Any) -> Any:
        return native(output_tensor, tensor.view(-1) if output_tensor.dim() == 1 else tensor, *rest, **settings)

    deepspeed.comm.all_gather_into_tensor = all_gather_into_tensor


def _serve(rank: int, world_size: int, port: int, connection: Connection, log: str, device: str) -> None:
    """Run a rank: join the process group, then answer calls until the parent goes away."""
    _die_with_parent(connection)
    with Path(log).open("a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update(ENVIRONMENT | {key: str(value) for key, value in ranks.items()})
    connection.send(_call(_join, (device,), {}))
    gc.freeze()  # the objects of the start live as long as the rank: collecting them after each call would take seconds
    modules = len(sys.modules)
    while True:
        try:
            path, call = connection.recv()
        except EOFError:
            return
        sys.path[:] = path
        connection.send(_call(_called, (call,), {}))
        gc.collect()
        if len(sys.modules) > modules:  # and so do those of a library that the call has imported
            gc.freeze()
            modules = len(sys.modules)


def _join(device: str) -> None:
    """Join the process group, quietly."""
    if device == "standin":
        from ucp_deepspeed.testing.device import nccl_like, stand_in

        stand_in.use()
        nccl_like.register()
    if device == "cuda":
        os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils.logging import logger

    from ucp_deepspeed.testing.older_deepspeed import run_under_newer_torch

    logger.setLevel(logging.ERROR)
    logging.getLogger("ucp_deepspeed").setLevel(logging.WARNING)
    if device != "cuda":
        _use_gloo_only()
    if device != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        _send_from_host()
    run_under_newer_torch()
    deepspeed.init_distributed(BACKENDS[device], verbose=False)


def _send_from_host() -> None:
    """Send tensors of a device as tensors of the host: results go to a process that uses no device."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    for kind in (torch.Tensor, torch.nn.Parameter):
        ForkingPickler.register(kind, lambda tensor: reduce_tensor(tensor.detach().cpu()))


def _called(call: bytes) -> bytes:
    """Make a pickled call; return the pickled result, so that a result that can't be sent fails here, on the rank."""
    function, args, kwargs = pickle.loads(call)
    return bytes(ForkingPickler.dumps(function(*args, **kwargs)))


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Answer:
    try:
        return True, function(*args, **kwargs), None
    except BaseException as error:
        try:
            pickled = pickle.dumps(error)
        except _PICKLING_ERRORS:
            pickled = None
        return False, traceback.format_exc(), pickled


def _unpickle(content: bytes | None) -> Any:
    return None if content is None else pickle.loads(content)


def _unpickle_error(pickled: bytes | None) -> BaseException | None:
    """Return the exception of a rank, or None where it can't be made again here; its traceback is shown either way."""
    try:
        error = _unpickle(pickled)
    except _PICKLING_ERRORS:
        return None
    return error if isinstance(error, BaseException) else None


def _use_gloo_only() -> None:
    """Keep DeepSpeed from loading its shared-memory op, which only speeds up small reductions.

    torch guards the loading of such an op with a file. A killed process leaves it behind, and every later start waits for it for
    ever; and ranks of a pool are killed. Without the op DeepSpeed reduces through gloo.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def _die_with_parent(connection: Connection) -> None:
    """End this rank as soon as nothing holds the other end of the connection, whatever the rank does meanwhile."""
    watch = select.poll()
    watch.register(connection.fileno(), 0)  # poll reports a hang-up unasked

    def end() -> None:
        watch.poll()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
