"""Shared by the tests of saving in the background: runs, what a folder holds, and a save that is held back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import STEP

import ucp_deepspeed
from ucp_deepspeed.engine.saving import snapshot
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

ASYNC = {"enabled": True, "save": {"async": True}}

RUNS = {
    "zero-0": (2, Run("mlp", zero={"stage": 0}, precision="bf16", universal=ASYNC)),
    "zero-1": (2, Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay", universal=ASYNC)),
    "zero-2": (2, Run("mlp", zero={"stage": 2}, universal=ASYNC)),
    "zero-3": (2, Run("mlp", zero={"stage": 3}, precision="bf16", universal=ASYNC)),
    "pipeline": (2, Run("gpt", pp=2, zero={"stage": 1}, universal=ASYNC)),
    "experts, zero-0": (2, Run("moe", zero={"stage": 0}, universal=ASYNC)),
    "experts, zero-1": (2, Run("moe", zero={"stage": 1}, precision="bf16", universal=ASYNC)),
}

LARGE = Run("mlp", zero={"stage": 1}, size={"hidden": 480}, universal=ASYNC)
"""With files well above `FILE_LIMIT`, which those of the random state are below."""

FILE_LIMIT = 120_000
"""Bytes that a file may have where a full disk is simulated."""


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(run: Run, steps: int = STEP) -> Any:
    """An engine after so many steps."""
    engine = build_engine(run)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    return engine


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Let no file be written until the event is set."""
    gate, write = threading.Event(), snapshot.FileSnapshot.write

    def waiting(self: snapshot.FileSnapshot, *arguments: Any) -> Any:
        assert gate.wait(60)
        return write(self, *arguments)

    snapshot.FileSnapshot.write = waiting  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.set()
        snapshot.FileSnapshot.write = write  # type: ignore[method-assign]


def save_and_wait(run: Run, folder: str, tag: str | None = None) -> None:
    """One checkpoint at `STEP`."""
    engine = trained(run)
    engine.save_checkpoint(folder, tag=tag)
    ucp_deepspeed.wait_for_save()
    engine.destroy()
