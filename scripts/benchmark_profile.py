"""Phases of our loads and saves, for ``benchmark.py --profile``: seconds of a few phases that don't overlap.

As a program it converts a checkpoint, and prints its phases: ``benchmark_profile.py STARTED SRC DST``, with the
``time.perf_counter()`` of the process that starts it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

Phases = dict[str, float]
"""Seconds by phase."""

OTHER = "other"


def by_phase(phases: Sequence[Phases], together: Callable[[list[float]], float]) -> Phases:
    """One figure of each phase, made of several runs' by a function such as the median."""
    names = dict.fromkeys(name for each in phases for name in each)
    return {name: together([each.get(name, 0.0) for each in phases]) for name in names}


class Stopwatch:
    """Adds up seconds by phase: within one, an inner one's don't count. Each thread has phases of its own."""

    def __init__(self) -> None:
        self.seconds: Phases = {}
        self._threads = threading.local()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count everything inside the block as this phase."""
        outer: list[float] = self._threads.__dict__.setdefault("outer", [])
        started = time.perf_counter()
        outer.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds - outer.pop()
            if outer:
                outer[-1] += seconds

    @contextmanager
    def timing(self, *places: tuple[Any, str, str]) -> Iterator[None]:
        """Time functions meanwhile: each as owner, attribute and phase; where the owner lacks it, nothing."""
        with ExitStack() as stack:
            for owner, attribute, name in places:
                if attribute in vars(owner):
                    stack.enter_context(
                        mock.patch.object(owner, attribute, self._timed(getattr(owner, attribute), name))
                    )
            yield

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **settings)

        return timed


def profile_load(folder: str) -> Phases:
    """On each rank: load once, as `benchmark_ranks.build` made the engine."""
    import benchmark_ranks

    from ucp_deepspeed.engine import agreement, exchange
    from ucp_deepspeed.engine.loading import filling, finding, load
    from ucp_deepspeed.engine.optimizers import engine_optimizer

    optimizer = type(engine_optimizer(benchmark_ranks.engine()))
    watch = Stopwatch()
    steps = ("begin", "own_weights", "make_weights", "send_weights", "end")
    with watch.timing(
        (finding, "_look", "open and plan"),
        (load, "_load_universal", "open and plan"),
        (agreement, "gathered", "agree with other ranks"),
        (agreement, "any_failed", "agree with other ranks"),
        (load, "restore_run", OTHER),
        (load, "restore_data_schedules", OTHER),
        (filling.Filling, "run", OTHER),
        (filling, "run_copies", "read"),
        (filling, "begin_exchange", "exchange"),
        (exchange.Exchange, "wait", "exchange"),
        *((owner, step, "weights") for owner in optimizer.__mro__ for step in steps),
    ):
        total = benchmark_ranks.load_directly(folder).seconds
    watch.seconds[OTHER] = max(total - sum(seconds for name, seconds in watch.seconds.items() if name != OTHER), 0.0)
    return watch.seconds


def profile_convert(started: float, source: str, target: str) -> Phases:
    """Convert with one worker, so that phases don't overlap; this process was started at ``started``."""
    import ucp_deepspeed.cli.convert  # noqa: F401  its imports are timed
    from ucp_deepspeed.cli import main
    from ucp_deepspeed.transfer import conversion as convert
    from ucp_deepspeed.transfer import copying, writing

    imported = time.perf_counter()
    watch = Stopwatch()
    with (
        watch.timing(
            (convert, "create_files", "write"),
            (writing, "_wait", "wait"),
            (writing, "_gather_chunk", "open and plan"),
            (writing._Output, "write", "write"),
            (os, "fsync", "flush"),
            (copying, "run_copies", "read"),
        ),
        watch.phase("open and plan"),
    ):
        main(["convert", source, target, "--workers", "1", "--quiet"], standalone_mode=False)
    del watch.seconds["wait"]  # the first thread's, for the worker
    total = time.perf_counter() - started
    watch.seconds["start and import"] = imported - started
    watch.seconds[OTHER] = max(total - sum(watch.seconds.values()), 0.0)
    return watch.seconds


if __name__ == "__main__":
    print(json.dumps(profile_convert(float(sys.argv[1]), sys.argv[2], sys.argv[3])))
