"""One rank runs out of memory in the middle of a load: every rank raises at once, none waits, and another load mends all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from refusals import fingerprint

from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.engine.exchange import Packing
from ucp_deepspeed.engine.loading import filling, load
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.models import RememberingMlp
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

pytestmark = pytest.mark.nccl_like

Ranks = Callable[[int], RankPool]

ALL = {"enabled": True, "load": "always", "shared_read_bytes": 0}
REMEMBERS = {"remembers": True}
RUNS = {
    "fp32 without ZeRO": Run("mlp", REMEMBERS, zero={"stage": 0}, universal=ALL),
    "bf16 without ZeRO": Run("mlp", REMEMBERS, zero={"stage": 0}, precision="bf16", universal=ALL),
    "ZeRO-1": Run("mlp", REMEMBERS, zero={"stage": 1}, precision="bf16", universal=ALL),
    "ZeRO-3": Run("mlp", REMEMBERS, zero={"stage": 3}, precision="bf16", universal=ALL),
    "reset": Run("mlp", REMEMBERS, zero={"stage": 2}, universal={**ALL, "optimizer_states": "reset"}),
}
METHODS = ("begin", "state_buffer", "own_weights", "set_state", "reset_state", "make_weights", "set_settings")
"""Methods of an optimizer that a rank calls alone."""


@contextmanager
def fault(owner: Any, name: str, call: int) -> Iterator[list[int]]:
    """Run out of memory on rank 1 in one of the calls of a function, counted from 1; yields a list with an entry for each."""
    real, calls = getattr(owner, name), list[int]()

    def faulty(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == call:
            raise torch.OutOfMemoryError("planted")
        return real(*arguments, **settings)

    with mock.patch.object(owner, name, faulty):
        yield calls


def load_with_faults(run: Run, folder: str) -> tuple[dict[str, str], bool]:
    """On a rank: what it is told when rank 1 fails in the first or the last call of each step of a load; and whether a load
    after all of them leaves the engine as a first one does."""
    engine, told = build_engine(run), dict[str, str]()
    train_step(engine, run, 1)
    engine.load_checkpoint(folder)
    first = fingerprint(engine)
    optimizer = type(engine_optimizer(engine))
    steps: list[tuple[Any, str]] = [(filling, "run_copies"), (Packing, "reserve"), (FileVersions, "check")]
    steps += [(RememberingMlp, "set_extra_state"), (load, "restore_run"), *((optimizer, name) for name in METHODS)]
    for owner, name in steps:
        with fault(owner, name, 0) as calls:
            engine.load_checkpoint(folder)
        for call in sorted({1, len(calls)} - {0}) if calls else ():
            with fault(owner, name, call):
                try:
                    engine.load_checkpoint(folder)
                    told[f"{name} {call}"] = ""
                except (UniversalCheckpointError, torch.OutOfMemoryError) as error:
                    told[f"{name} {call}"] = f"{type(error).__name__}: {error}"
    engine.load_checkpoint(folder)
    return told, fingerprint(engine) == first


@pytest.mark.parametrize("name", RUNS)
def test_memory_that_runs_out_on_one_rank(name: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, RUNS[name], 2, save=str(tmp_path))
    (others, same), (own, same_too) = ranks(2).run(load_with_faults, RUNS[name], str(tmp_path), timeout=60.0)
    assert own.keys() == others.keys() and len(own) > 10 and same and same_too
    for step, error in own.items():
        assert "OutOfMemoryError: planted" in error.replace("OutOfMemoryError: OutOfMemoryError", "OutOfMemoryError"), (
            step
        )
        assert "rank 1: OutOfMemoryError: planted" in others[step], step
