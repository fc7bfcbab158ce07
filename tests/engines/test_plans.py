"""An engine reads what ``ucp plan`` said without an engine. No peer tells before a load what it will restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import STEP

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.targeting import plan_target

Ranks = Callable[[int], RankPool]

TARGETS = [Topology(1, 1, 2, 3), Topology(1, 1, 4, 2), Topology(2, 1, 2, 1), Topology(2, 1, 1, 0), Topology(4, 1, 1, 3)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bytes_of_each_rank(target: Topology, ranks: Ranks, tmp_path: Path) -> None:
    run = Run("llama", tp=2, zero={"stage": 1}, precision="bf16", universal={"enabled": True, "load": "always"})
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    wanted = replace(run, tp=target.tp, zero={"stage": target.zero_stage})
    outcomes = ranks(target.tp * target.dp).run(train, wanted, STEP, load=str(tmp_path))
    plan = plan_target(open_checkpoint(tmp_path), target)
    by_place = {(rank.data_parallel_rank, rank.model_parallel_rank): rank for rank in plan.ranks}
    planned = [
        by_place[divmod(rank, target.tp)] for rank in range(len(outcomes))
    ]  # tensor-parallel ranks are neighbours
    assert [rank.bytes_read for rank in planned] == [outcome.report.bytes_read for outcome in outcomes]
    assert [len(rank.files) for rank in planned] == [outcome.report.files for outcome in outcomes]


@pytest.mark.parametrize(("ep", "stage", "world_size"), [(1, 1, 2), (2, 2, 4), (4, 1, 4), (2, 0, 2)])
def test_experts(ep: int, stage: int, world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    source = Run("moe", size={"ep": (2, 2)}, zero={"stage": 1}, universal={"enabled": True, "load": "always"})
    ranks(2).run(train, source, STEP, save=str(tmp_path))
    target = replace(source, size={"ep": (ep, ep)}, zero={"stage": stage})
    outcomes = ranks(world_size).run(train, target, STEP, load=str(tmp_path))
    plan = plan_target(open_checkpoint(tmp_path), Topology(1, 1, world_size, stage, ep))
    assert [rank.bytes_read for rank in plan.ranks] == [outcome.report.bytes_read for outcome in outcomes]
    impossible = plan_target(open_checkpoint(tmp_path), Topology(1, 1, 3, 3, 3))
    assert {obstacle.reason for obstacle in impossible.obstacles} == {
        "DeepSpeed's own mixture-of-experts layers can't be trained with ZeRO-3; take ZeRO 0 to 2",
        "EP 3 doesn't divide its 4 experts; take one that does",
    }


def test_a_model_that_changed(ranks: Ranks, tmp_path: Path) -> None:
    old, new = Run("mlp", frozen=("norm.bias",)), Run("mlp", {"adapter": True, "vocabulary": 50}, seed=2)
    ranks(2).run(train, old, STEP, save=str(tmp_path / "old"))
    ranks(1).run(train, new, 0, save=str(tmp_path / "new"))
    policies = {"enabled": True, "on_missing": "init", "on_extra": "drop"}
    target = replace(new, zero={"stage": 3}, universal=policies)
    outcomes = ranks(2).run(train, target, STEP, load=str(tmp_path / "old"))
    plan = plan_target(
        open_checkpoint(tmp_path / "old"),
        Topology(1, 1, 2, 3),
        model=open_checkpoint(tmp_path / "new"),
        policies=Policies(initialise=True, drop=True),
    )
    assert set(plan.initialised) == set(outcomes[0].report.initialised)
    assert set(plan.dropped) == set(outcomes[0].report.dropped)
    assert [rank.bytes_read for rank in plan.ranks] == [outcome.report.bytes_read for outcome in outcomes]
