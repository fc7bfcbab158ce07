"""Checkpoints whose optimizer files were deleted, to publish the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP

from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, build_evaluator, loss_of, train_step

Ranks = Callable[[int], RankPool]


def trained(run: Run, folder: str) -> float:
    """On a rank: train, save, and the loss of a batch without a step."""
    engine = build_engine(run)
    for step in range(1, STEP + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(folder)
    loss = loss_of(engine, run)
    engine.destroy()
    return loss


def published(ranks: Ranks, run: Run, folder: Path) -> float:
    losses = ranks(2).run(trained, run, str(folder))
    for path in folder.rglob("*_optim_states.pt"):
        path.unlink()
    return losses[0]


def seen(run: Run, folder: str, options: Mapping[str, Any]) -> tuple[float, bool]:
    """On a rank: load; the same loss; whether training goes on from there."""
    engine = build_evaluator(run) if run.optimizer == "none" else build_engine(run)
    engine.load_checkpoint(folder, **options)
    loss = loss_of(engine, run)
    engine.train()
    after = train_step(engine, run, STEP + 1) if run.optimizer != "none" else 0.0
    engine.destroy()
    return loss, after == after


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    "options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=["only", "without"]
)
def test_weights_load_on_another_topology(stage: int, options: Mapping[str, Any], ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 2}, precision="bf16")
    expected = published(ranks, run, tmp_path)
    target = replace(run, zero={"stage": stage}, seed=1)
    assert ranks(1).run(seen, target, str(tmp_path), options) == [(expected, True)]


def test_a_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("gpt", pp=2, precision="bf16")
    expected = published(ranks, run, tmp_path)
    target = replace(run, pp=1, seed=1)
    assert ranks(1).run(seen, target, str(tmp_path), {"load_module_only": True}) == [(expected, True)]


def test_without_an_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1})
    expected = published(ranks, run, tmp_path)
    target = replace(run, zero={"stage": 3}, optimizer="none")  # type: ignore[arg-type]
    assert ranks(1).run(seen, target, str(tmp_path), {}) == [(expected, True)]


def test_states_that_are_not_there_are_told(ranks: Ranks, tmp_path: Path) -> None:
    published(ranks, Run("mlp", zero={"stage": 1}), tmp_path)
    with pytest.raises(
        RankError, match=r"holds no optimizer state.*load_module_only=True or load_optimizer_states=False"
    ):
        ranks(2).run(seen, Run("mlp", zero={"stage": 1}), str(tmp_path), {})


def test_of_zero_3_the_weights_are_gone_too(ranks: Ranks, tmp_path: Path) -> None:
    published(ranks, Run("mlp", zero={"stage": 3}), tmp_path)
    for options in ({}, {"load_module_only": True}):
        with pytest.raises(RankError) as caught:
            ranks(2).run(seen, Run("mlp", zero={"stage": 3}), str(tmp_path), options)
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in str(caught.value)
        assert "with ZeRO-3 these hold the weights too, so that without them nothing can be loaded" in str(caught.value)
