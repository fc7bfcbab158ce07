"""Shared by the engine tests: comparing checkpoints, and a session-wide store of source checkpoints."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.testing import runs
from ucp_deepspeed.testing.ranks import fp16_on_cpu, get_pool
from ucp_deepspeed.testing.runs import Outcome, Run, build_engine, train
from ucp_deepspeed.transfer.compare import compare

STEP = 3
"""Step at which sources save."""

LAST_STEP = 6
"""Step to which runs are compared."""


def differences(first: Path, second: Path, spec: str | None = None) -> list[str]:
    """In what the universal views of two checkpoints differ, as text."""
    named = load_spec(spec) if spec else None
    views = [UniversalView.of(open_checkpoint(path), named) for path in (first, second)]
    return [f"{found.name} {found.state or ''} {found.detail}" for found in compare(*views)]


def shared_differences(first: Path, second: Path, spec: str | None = None) -> list[str]:
    """Return `differences` without hyper-parameters that only one side's optimizer class has (torch's AdamW has ``amsgrad``)."""
    return [line for line in differences(first, second, spec) if not line.endswith((" only in A", " only in B"))]


@dataclass(frozen=True)
class Source:
    """A run that saved at `STEP` and went on, uninterrupted, to `LAST_STEP`."""

    run: Run
    world_size: int
    folder: Path
    outcomes: list[Outcome]

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step of the uninterrupted run."""
        return self.outcomes[0].losses


def make_source(run: Run, world_size: int, folder: Path) -> Source:
    """Train a source on real ranks."""
    outcomes = get_pool(world_size).run(train, run, LAST_STEP, save=str(folder), save_at=STEP)
    return Source(run, world_size, folder, outcomes)


def warnings_of_building(run: Run) -> list[str]:
    """On a rank: what the package warns of when an engine is built."""
    return warnings_of(lambda: build_engine(run).destroy())


def warnings_of_loading(run: Run, steps: int, folder: str) -> tuple[list[str], Outcome]:
    """On a rank: what the package warns of while a run goes on from a folder, and the run."""
    outcomes: list[Outcome] = []
    return warnings_of(lambda: outcomes.append(train(run, steps, load=folder))), outcomes[0]


def warnings_of(work: Callable[[], object]) -> list[str]:
    """Return the warnings of the package while some work runs."""
    with runs.warnings_of() as found:
        work()
    return found


@contextmanager
def resumed(engine: Any, load: str | None) -> Iterator[Any]:
    """Load if asked to; at the end destroy the engine."""
    with fp16_on_cpu():
        if load is not None:
            assert engine.load_checkpoint(load)[0] is not None
        yield engine
        engine.destroy()
        gc.collect()
