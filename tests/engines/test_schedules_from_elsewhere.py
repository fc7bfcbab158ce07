"""Schedules of learning rates that one run kept in the engine, and the other outside of it, as frameworks do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import left_alone
import pytest
import torch
from checkpoints import LAST_STEP, STEP
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, build_engine, build_evaluator, train_step

Ranks = Callable[[int], RankPool]

KEEP = {"enabled": True, "scheduler": "keep"}

KINDS: Mapping[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=3e-2, total_steps=20),
}


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what the package logs in the block."""
    found: list[str] = []
    handler, logger = logging.Handler(logging.INFO), logging.getLogger("ucp_deepspeed")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def of_schedules(lines: list[str]) -> list[str]:
    """Return the lines that tell of a schedule."""
    return [line for line in lines if "learning rate" in line]


def built(run: Run, place: str, kind: str = "lambda") -> tuple[Any, torch.optim.Optimizer, Any]:
    """On a rank: an engine, its optimizer, and the scheduler that the script steps, if it isn't the engine's ``place``."""
    reset_parallel_state()
    model = build_mlp(seed=run.seed)
    optimizer, make = torch.optim.AdamW(model.parameters(), lr=1e-2), KINDS[kind]
    config = {
        "train_batch_size": 8,
        "zero_optimization": dict(run.zero),
        "zero_allow_untested_optimizer": True,
        "universal_checkpoint": dict(run.universal or {}),
    }
    inside = {"lr_scheduler": make} if place == "engine" else {}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, **inside)
    return engine, optimizer, make(optimizer) if place == "script" else None


def rates(
    run: Run, place: str, load: str | None = None, save: str | None = None, kind: str = "lambda", last: int = LAST_STEP
) -> tuple[list[tuple[float, Any]], list[str], dict[str, Any]]:
    """On a rank: rate and betas of each step up to the last; what the load logs, and the client state that it returns."""
    engine, optimizer, outside = built(run, place, kind)
    lines: list[str] = []
    client_state: dict[str, Any] = {}
    if load is not None:
        with logged() as lines:
            _, client_state = engine.load_checkpoint(load)
    found = []
    while engine.global_steps < last:
        [group] = optimizer.param_groups
        found.append((group["lr"], group["betas"]))
        train_step(engine, run, engine.global_steps + 1)
        if outside is not None:
            outside.step()
        if save is not None and engine.global_steps == STEP:
            engine.save_checkpoint(save)
    engine.destroy()
    return found, lines, client_state


def refused(run: Run, folder: str, kind: str = "lambda") -> tuple[str, bool, bool]:
    """On a rank: what is told of a load into an engine with a scheduler; whether the engine is as it was; whether loads that ask
    for no schedule go on."""
    engine, optimizer, _ = built(run, "engine", kind)

    def state() -> list[Any]:
        weights = [slot.master.clone() for slot in engine_optimizer(engine).slots()]
        weights += [param.detach().clone() for param in engine.module.parameters()]
        return [
            weights,
            engine.lr_scheduler.state_dict(),
            dict(optimizer.param_groups[0], params=()),
            engine.global_steps,
        ]

    before = state()
    with pytest.raises(MismatchError) as caught:
        engine.load_checkpoint(folder)
    after = state()
    untouched = all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]
    steps = []
    for options in (
        {"load_module_only": True},
        {"load_lr_scheduler_states": False},
        {"load_module_strict": False, "load_optimizer_states": False},
    ):
        path, _ = engine.load_checkpoint(folder, **options)
        steps.append(path is not None and engine.global_steps)
    engine.destroy()
    return str(caught.value), untouched, steps == [0, STEP, STEP]


@pytest.mark.parametrize(("stage", "size"), [(0, 2), (1, 2), (3, 2), (2, 1), (3, 1)])
def test_a_scheduler_and_no_saved_schedule(stage: int, size: int, ranks: Ranks, tmp_path: Path) -> None:
    """The schedule began anew, with a line in the log; where the load is left to DeepSpeed, it failed with the model changed."""
    source, on = Run("mlp", zero={"stage": stage}, universal={"enabled": True}), {"enabled": True}
    whole, _, _ = ranks(2).run(rates, source, "script", None, str(tmp_path))[0]
    found = ranks(size).run(refused, Run("mlp", zero={"stage": stage}, universal=on), str(tmp_path))
    for message, untouched, goes_on in found:
        assert f"global_step{STEP} holds no state of a learning rate scheduler, and the engine has one" in message
        assert message.endswith('let the live one begin anew: "scheduler": "keep" in "universal_checkpoint"')
        assert untouched and goes_on
    target = Run("mlp", zero={"stage": stage}, universal=KEEP)
    kept, lines, _ = ranks(size).run(rates, target, "engine", str(tmp_path))[0]
    fresh, _, _ = ranks(size).run(rates, target, "engine", None, None, "lambda", LAST_STEP - STEP)[0]
    assert kept == fresh and kept[0] != whole[STEP]
    assert any("the live learning rate scheduler and its rates stay as they are" in line for line in lines)
    assert any(f"'lr' is {whole[STEP][0]} in the checkpoint, 0.01 here" in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "size"), [(1, 2), (3, 1)])
def test_in_the_same_place_the_schedule_goes_on(kind: str, stage: int, size: int, ranks: Ranks, tmp_path: Path) -> None:
    """And with ``keep`` the live one goes its own way, with its momentum."""
    run = Run("mlp", zero={"stage": stage}, universal={"enabled": True})
    whole, _, _ = ranks(2).run(rates, run, "engine", None, str(tmp_path), kind)[0]
    assert len(set(whole)) == LAST_STEP
    found, lines, _ = ranks(size).run(rates, run, "engine", str(tmp_path), None, kind)[0]
    assert found == whole[STEP:] and not of_schedules(lines)
    keep = Run("mlp", zero={"stage": stage}, universal=KEEP)
    found, _, state = ranks(size).run(rates, keep, "engine", str(tmp_path), None, kind)[0]
    assert found == whole[: LAST_STEP - STEP] and "lr_scheduler" in state


@pytest.mark.parametrize("size", [2, 1])
def test_a_saved_schedule_and_no_scheduler(size: int, ranks: Ranks, tmp_path: Path) -> None:
    """One warning names it; none where nobody asked for it, and none for engines that only evaluate."""
    run = Run("mlp", zero={"stage": 1}, universal={"enabled": True})
    ranks(2).run(rates, run, "engine", None, str(tmp_path))
    outcomes = ranks(size).run(rates, run, "script", str(tmp_path), None, "lambda", STEP)
    told = [[line for line in lines if "holds a schedule of learning rates (" in line] for _, lines, _ in outcomes]
    assert [len(lines) for lines in told] == [1, 0][:size]
    assert "base_lrs, last_epoch" in told[0][0] and "the engine has no scheduler: it isn't restored" in told[0][0]
    for _, lines, _ in ranks(size).run(
        rates, Run("mlp", zero={"stage": 1}, universal=KEEP), "script", str(tmp_path), None, "lambda", STEP
    ):
        assert not of_schedules(lines)
    assert ranks(size).run(evaluated, run, str(tmp_path)) == [[]] * size


def evaluated(run: Run, folder: str) -> list[str]:
    """On a rank: what the load of an engine without an optimizer, and one of weights alone, say of schedules."""
    with logged() as lines:
        engine = build_evaluator(replace(run, zero={"stage": 0}))
        assert engine.load_checkpoint(folder)[0] is not None
        engine.destroy()
        engine, _, _ = built(run, "script")
        for options in ({"load_module_only": True}, {"load_lr_scheduler_states": False}):
            assert engine.load_checkpoint(folder, **options)[0] is not None
        engine.destroy()
    return of_schedules(lines)


class Stateless:
    """A scheduler that keeps nothing."""

    def step(self) -> None:
        """Leave the rates as they are."""

    def state_dict(self) -> None:
        """Return nothing."""

    def load_state_dict(self, state: None) -> None:
        """Take nothing."""
        assert state is None


def stateless(run: Run, folder: str, save: bool) -> list[str]:
    """On a rank: save or load with such a scheduler; what is said of schedules."""
    engine = build_engine(run)
    engine.lr_scheduler = Stateless()
    with logged() as lines:
        if save:
            train_step(engine, run, 1)
            engine.save_checkpoint(folder)
        else:
            assert engine.load_checkpoint(folder)[0] is not None and engine.global_steps == 1
    engine.destroy()
    return of_schedules(lines)


def test_a_scheduler_without_a_state(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed by itself resumes with it."""
    run = Run("mlp", zero={"stage": 1}, universal={"enabled": True})
    ranks(2).run(stateless, run, str(tmp_path), True)
    assert ranks(2).run(stateless, run, str(tmp_path), False) == [[], []]
    assert ranks(1).run(stateless, run, str(tmp_path), False) == [[]]


def refused_alone(run: Run, folder: str) -> tuple[str, int]:
    """On a rank: save without a scheduler and load with one, where the engine is left to DeepSpeed; its step after a load without
    the schedule."""
    engine = build_engine(run)
    scheduler, engine.lr_scheduler = engine.lr_scheduler, None
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)
    engine.lr_scheduler, engine.global_steps = scheduler, 0
    with pytest.raises(MismatchError) as caught:
        engine.load_checkpoint(folder)
    assert engine.global_steps == 0
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    engine.destroy()
    return str(caught.value), engine.global_steps


def test_engines_that_are_left_to_deepspeed(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 0}, optimizer=(left_alone.Wrapped, {"lr": 1e-3}), universal={"enabled": True})
    for message, step in ranks(2).run(refused_alone, run, str(tmp_path)):
        assert message.endswith("or let the live one begin anew: load_lr_scheduler_states=False") and step == 1
