"""Hyper-parameters of parameter groups and schedules of learning rates: they follow their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences
from deepspeed.runtime.lr_schedules import WarmupLR

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.engine.loading.training_state import check_scheduler
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.planning.policies import Obstacles

Ranks = Callable[[int], RankPool]


def test_hyperparameters_follow_their_parameters(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load gives every ZeRO-3 group the weight decay of group 0."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 3}, groups="decay")
    ranks(1).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))

    for folder in ("a", "b"):
        groups = open_checkpoint(tmp_path / folder).groups
        assert [group.hyperparameters["weight_decay"] for group in groups] == [0.1, 0.0]
        assert "linear_in.weight" in groups[0].names
        assert "linear_in.bias" in groups[1].names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_may_be_split_and_reordered(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed restores groups by index, and refuses another number of them; here the values follow the parameters."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": stage}, groups="shuffled")
    ranks(1).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    expected, found = (
        {name: group.hyperparameters for group in open_checkpoint(tmp_path / folder).groups for name in group.names}
        for folder in "ab"
    )
    assert len(open_checkpoint(tmp_path / "b").groups) == 3
    assert found == expected
    assert {found[name]["weight_decay"] for name in ("embedding.weight", "linear_out.weight")} == {0.1}
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_groups_with_different_values_are_not_merged_unasked(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, Run("mlp", zero={"stage": 2}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 3})
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, target, STEP, load=str(tmp_path / "a"))
    assert isinstance(caught.value.original, MismatchError)
    message = str(caught.value.original)
    assert "parameter group 0: 'weight_decay' is 0.0 for gain and 0.1 for embedding.weight" in message
    kept = replace(target, universal={"enabled": True, "hyperparameters": "keep"})
    ranks(1).run(train, kept, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert [group.hyperparameters["weight_decay"] for group in open_checkpoint(tmp_path / "b").groups] == [0.1]
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found and all(" weight_decay " in line or " lr " in line for line in found), found


def test_learning_rate_is_not_left_to_the_scheduler(ranks: Ranks, tmp_path: Path) -> None:
    """The scheduler's state lacks the rate itself: WarmupLR would take one step at the new engine's first rate, 0."""
    run = Run("mlp", zero={"stage": 2})
    whole = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)[0]
    resumed = ranks(1).run(train, Run("mlp", zero={"stage": 3}), LAST_STEP, load=str(tmp_path))[0]
    stopped = ranks(1).run(train, Run("mlp", zero={"stage": 3}), STEP, load=str(tmp_path))[0]
    assert resumed.rates == whole.rates
    assert 0 < stopped.rates[0] < whole.rates[0]


def test_groups_that_keep_their_hyperparameters_have_the_schedulers_rate(ranks: Ranks, tmp_path: Path) -> None:
    """Here too the first step would be at rate 0, and lost."""
    whole = ranks(2).run(train, Run("mlp", zero={"stage": 2}), LAST_STEP, save=str(tmp_path), save_at=STEP)[0]
    at_once = ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, load=str(tmp_path))[0]
    target = Run("mlp", zero={"stage": 3}, universal={"enabled": True, "hyperparameters": "keep"})
    assert ranks(1).run(train, target, STEP, load=str(tmp_path))[0].rates == at_once.rates
    assert ranks(1).run(train, target, LAST_STEP, load=str(tmp_path))[0].rates == whole.rates


def save_with_scheduler(run: Run, folder: str) -> None:
    """On a rank: save a step with one of torch's schedulers."""
    engine = build_engine(run)
    engine.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine_optimizer(engine).base, 10)
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)


def load_with_another_scheduler(run: Run, folder: str) -> tuple[str, bool]:
    """On a rank: what is told of the load, and whether the engine is as it was; then a load without the schedule."""
    engine = build_engine(run)
    before = [slot.master.clone() for slot in engine_optimizer(engine).slots()], engine.lr_scheduler.state_dict()
    with pytest.raises(MismatchError) as caught:
        engine.load_checkpoint(folder)
    after = [slot.master for slot in engine_optimizer(engine).slots()], engine.lr_scheduler.state_dict()
    untouched = all(map(torch.equal, before[0], after[0])) and before[1] == after[1] and engine.global_steps == 0
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    return str(caught.value), untouched and engine.global_steps == 1


def test_a_scheduler_of_another_class(ranks: Ranks, tmp_path: Path) -> None:
    """Its ``KeyError`` came when all else had been loaded."""
    run = Run("mlp", universal={"enabled": True, "load": "always"})
    ranks(2).run(save_with_scheduler, run, str(tmp_path))
    for message, untouched in ranks(2).run(load_with_another_scheduler, run, str(tmp_path)):
        assert "WarmupLR keeps ['last_batch_iteration'], and can't take over the saved scheduler's ['T_max'" in message
        assert "load_lr_scheduler_states=False" in message and untouched


@pytest.mark.parametrize("value", ["x", [3], {"a": 1}])
def test_a_schedule_that_is_no_number(value: Any) -> None:
    """Its ``TypeError`` came when all else had been loaded."""
    scheduler = WarmupLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    for held, expected in ((value, 1), (3, 0), (3.0, 0), (None, 0)):
        check_scheduler(scheduler, {"last_batch_iteration": held}, (), None, found := Obstacles())  # type: ignore[arg-type]
        assert len(found) == expected, held
        assert all("last_batch_iteration = " in obstacle.reason for obstacle in found)


def trained_in_order(
    run: Run, order: str, last: int, folder: str | None, save: str | None, scale: float = 1.0
) -> list[tuple[str, float]]:
    """On a rank: train with a torch scheduler on groups in some order, with scaled rates; the rate of each group."""
    reset_parallel_state()
    model = build_mlp(seed=run.seed)
    named = list(model.named_parameters())
    matrices, rest = [param for _, param in named if param.ndim > 1], [param for _, param in named if param.ndim <= 1]
    groups: dict[str, dict[str, Any]] = {"m": {"params": matrices, "lr": 1e-2}, "r": {"params": rest, "lr": 1e-4}}
    if "x" in order:
        groups |= {"m": {"params": matrices[:1], "lr": 1e-2}, "x": {"params": matrices[1:], "lr": 1e-2}}
    for group in groups.values():
        group["lr"] *= scale
    optimizer = torch.optim.AdamW([groups[key] for key in order])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        config={
            "train_batch_size": 8,
            "zero_optimization": dict(run.zero),
            "zero_allow_untested_optimizer": True,
            "universal_checkpoint": dict(run.universal or {}),
        },
    )
    if folder is not None:
        engine.load_checkpoint(folder)
    while engine.global_steps < last:
        train_step(engine, run, engine.global_steps + 1)
    if save is not None:
        engine.save_checkpoint(save)
    rates = sorted((key, group["lr"]) for key, group in zip(order, optimizer.param_groups, strict=True))
    engine.destroy()
    return rates


@pytest.mark.parametrize(("order", "stage"), [("rm", 1), ("rm", 2), ("xrm", 3), ("mxr", 0)])
def test_a_scheduler_follows_the_parameters_too(order: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """torch's keep the first rates of all groups in the optimizer's order: with the groups in another one, they would change
    sides at the next step, and DeepSpeed gives all groups of ZeRO-3 the first one's."""
    source = Run("mlp", zero={"stage": 1})
    ranks(1).run(trained_in_order, source, "mr", STEP, None, str(tmp_path))
    expected = dict(ranks(1).run(trained_in_order, source, "mr", LAST_STEP, None, None)[0])
    target = Run("mlp", zero={"stage": stage})
    found = dict(ranks(1).run(trained_in_order, target, order, LAST_STEP, str(tmp_path), None)[0])
    assert found == {key: expected["m" if key == "x" else key] for key in order}


def scheduled(kind: str, reverse: bool, folder: str, save: bool) -> list[list[float]]:
    """On a rank: three steps of a scheduler over two groups, in one order or the other; their rates at each, by group."""
    reset_parallel_state()
    model = build_mlp(seed=0)
    groups = [
        {"params": [param for param in model.parameters() if param.ndim > 1], "lr": 1e-3},
        {"params": [param for param in model.parameters() if param.ndim <= 1], "lr": 2e-3},
    ]
    rates = [1e-3, 2e-3][:: -1 if reverse else 1]
    make = {
        "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=10),
        "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.ConstantLR(optimizer, factor) for factor in (0.5, 0.25, 0.125)],
            milestones=[2, 4],
        ),
    }[kind]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups[:: -1 if reverse else 1]),
        lr_scheduler=make,
        config={
            "train_batch_size": 8,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "universal_checkpoint": {"enabled": True},
        },
    )
    if not save:
        engine.load_checkpoint(folder)
    found: list[list[float]] = []
    for _ in range(3):
        train_step(engine, Run("mlp"), engine.global_steps + 1)
        if save and engine.global_steps == 1:
            engine.save_checkpoint(folder)
        found.append(engine.get_lr()[:: -1 if reverse else 1])
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", ["OneCycleLR", "SequentialLR"])
def test_a_schedule_whose_phases_are_as_many_as_the_groups(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """Two phases, two groups: the list is of the schedule, and stays in its order where the groups change theirs."""
    expected = ranks(1).run(scheduled, kind, False, str(tmp_path), True)[0]
    assert ranks(1).run(scheduled, kind, True, str(tmp_path), False)[0][:2] == expected[1:]


def test_a_schedule_from_the_configured_rates(ranks: Ranks, tmp_path: Path) -> None:
    """``"hyperparameters": "keep"`` with half the rates: half of what they would be, at every step after the resume."""
    source = Run("mlp", zero={"stage": 1})
    ranks(1).run(trained_in_order, source, "mr", STEP, None, str(tmp_path))
    keep = Run("mlp", zero={"stage": 2}, universal={"enabled": True, "hyperparameters": "keep"})
    for last in (STEP, LAST_STEP):
        expected = ranks(1).run(trained_in_order, source, "mr", last, None, None)[0]
        found = ranks(1).run(trained_in_order, keep, "rm", last, str(tmp_path), None, 0.5)[0]
        assert found == [(key, pytest.approx(rate / 2)) for key, rate in expected]
