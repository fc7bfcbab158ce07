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
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
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


LEFT = {"enabled": True, "load": "never"}
LEFT_TO_DEEPSPEED = {
    "fp32 without ZeRO": Run("mlp", zero={"stage": 0}, universal=LEFT),
    "ZeRO-2": Run("mlp", zero={"stage": 2}, precision="bf16", universal=LEFT),
    "ZeRO-3": Run("mlp", zero={"stage": 3}, precision="bf16", universal=LEFT),
    "pipeline": Run("tied", pp=2, config={"gradient_clipping": 0.0}, universal=LEFT),
}


def native_load_with_faults(run: Run, folder: str) -> tuple[dict[str, str], bool]:
    """As `load_with_faults`, for a load that DeepSpeed does itself; it is also done without optimizer states."""
    engine, told = build_engine(run), dict[str, str]()
    train_step(engine, run, 1)
    engine.load_checkpoint(folder)
    first, own = fingerprint(engine), (dict(vars(engine)).keys(), dict(vars(engine.optimizer)).keys())
    steps = [(TorchCheckpointEngine, "load"), (type(engine.module), "load_state_dict")]
    steps += [(type(engine.optimizer), "load_state_dict"), (load, "take_values")]
    for options in ({}, {"load_optimizer_states": False}):
        for owner, name in steps:
            with fault(owner, name, 0) as calls:
                engine.load_checkpoint(folder, **options)
            for which, call in {"first": 1, "last": len(calls)}.items() if calls else ():
                with (
                    fault(owner, name, call),
                    pytest.raises((UniversalCheckpointError, torch.OutOfMemoryError)) as caught,
                ):
                    engine.load_checkpoint(folder, **options)
                told[f"{name} {which} {options}"] = f"{type(caught.value).__name__}: {caught.value}"
    assert own == (vars(engine).keys(), vars(engine.optimizer).keys())
    engine.load_checkpoint(folder)
    return told, fingerprint(engine) == first


@pytest.mark.parametrize("name", LEFT_TO_DEEPSPEED)
def test_memory_that_runs_out_on_one_rank_while_deepspeed_loads(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """The others used to wait for ever in DeepSpeed's own collectives."""
    run = LEFT_TO_DEEPSPEED[name]
    ranks(2).run(train, run, 2, save=str(tmp_path))
    (others, same), (own, same_too) = ranks(2).run(native_load_with_faults, run, str(tmp_path), timeout=60.0)
    assert own.keys() == others.keys() and len(own) > 4 and same and same_too
    assert set(own.values()) == {"OutOfMemoryError: planted"}
    assert set(others.values()) == {"UniversalCheckpointError: rank 1: OutOfMemoryError: planted"}
