"""The store in which agents meet, in a process of its own: if it were an agent's, losing that node would end them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ucp_deepspeed.errors import StoreError

BEAT_SECONDS = 2.0
"""Seconds between two signs of life of an agent."""

ALONE_SECONDS = 60.0
"""Seconds without a sign of life after which a store that a run has started ends."""

CONNECT_SECONDS = 30.0
"""Seconds that a store may take to answer."""

_BEATS = "ucp/beats"


def serve(port: int, alone: bool, ready: Callable[[int], None]) -> None:
    """Hold a store until the process is ended.

    Args:
        port: port to listen on; 0 takes a free one.
        alone: whether to end when no agent gives signs of life any more.
        ready: is told the port as soon as the store listens.

    Raises:
        StoreError: the port is taken.
    """
    from torch.distributed import DistNetworkError, TCPStore

    try:
        store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        raise StoreError(
            f"port {port} can't be listened on: {str(error).splitlines()[0]}; if another store has it, runs can share that one "
            "with --run-id; or take another port, such as --port 0"
        ) from error
    ready(store.port)
    beats, last = 0, time.monotonic()
    while not alone or time.monotonic() - last < ALONE_SECONDS:
        time.sleep(BEAT_SECONDS)
        if (now := store.add(_BEATS, 0)) != beats:
            beats, last = now, time.monotonic()


def start() -> str:
    """Start a store beside this process, which outlives it; return ``127.0.0.1:port``."""
    command = [sys.executable, "-m", "ucp_deepspeed.elastic.store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=os.environ)
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        raise StoreError(f"the store for the agents didn't start: {' '.join(command)} ended with {process.wait()}")
    return f"127.0.0.1:{line}"


def connect(endpoint: str) -> Any:
    """Connect to a store.

    Args:
        endpoint: ``host:port``.

    Raises:
        StoreError: nothing answers there.
    """
    from torch.distributed import DistError, TCPStore

    host, _, port = endpoint.rpartition(":")
    seconds = timedelta(seconds=CONNECT_SECONDS)
    try:
        return TCPStore(host, int(port), is_master=False, timeout=seconds, wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        raise StoreError(f"no store answers at {endpoint}; start one with: ucp store --port {port}") from error


def number_of_run(store: Any, name: str) -> int:
    """Return the number of the run of this name that is under way, from 0: `end_run` counts."""
    store.compare_set(_number(name), "", "0")
    return int(store.get(_number(name)))


def end_run(store: Any, name: str, number: int) -> None:
    """Let the next run of this name begin anew: agents can't meet again in one that has ended. All agents may call it."""
    store.compare_set(_number(name), str(number), str(number + 1))


def _number(name: str) -> str:
    return f"ucp/{name}/number"


def give_signs_of_life(endpoint: str, given_up: str) -> None:
    """Let a store know, from now on, that an agent uses it. The agent itself tells if the store is lost.

    Args:
        given_up: key with which a worker says that the run makes no progress: this process then ends.
    """
    store = connect(endpoint)

    def beat() -> None:
        try:
            while not store.check([given_up]):
                store.add(_BEATS, 1)
                time.sleep(BEAT_SECONDS)
        except Exception:
            return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=beat, daemon=True).start()


def _tell(port: int) -> None:
    print(port, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # whoever reads them doesn't wait for the store
        os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    serve(0, alone=True, ready=_tell)
