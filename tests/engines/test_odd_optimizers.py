"""Optimizers with numbers of their own, numbers in their groups, and states that aren't element-wise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.testing import odd_optimizers
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

ALWAYS = {"enabled": True, "load": "always"}


def groups_and_numbers(run: Run, folder: str, steps: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """After a load: parameter groups of the base optimizer, and of each state the numbers."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    for _ in range(steps):
        train_step(engine, run, engine.global_steps + 1)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
    states = [
        {key: float(v) for key, v in state.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
        for state in base.state.values()
    ]
    return groups, states


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_groups_count_from_the_first_step_on(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Apex's FusedAdam has no step in its groups before the first one: without it the next step is off by a tenth."""
    run = Run("mlp", zero={"stage": stage}, optimizer=(odd_optimizers.GroupStepFusedAdam, {}), universal=ALWAYS)
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    for world_size in (2, 1, 4):
        again = tmp_path / str(world_size)
        outcome = ranks(world_size).run(
            train, run, STEP + 1, load=str(tmp_path / "0"), save=str(again), save_first=True
        )
        assert differences(tmp_path / "0", again) == []
        assert outcome[0].report.kept_settings == ()
        if world_size == 2:
            assert outcome[0].losses[STEP + 1] == source[0].losses[STEP + 1]


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", ["Adafactor", "OneElement"])
def test_an_unchanged_topology_with_states_of_other_forms(kind: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Unchanged is unchanged: it is left to DeepSpeed. On another topology the refusal names the state and the ways on."""
    optimizer = {"Adafactor": "Adafactor", "OneElement": odd_optimizers.OneElement}[kind]
    run = Run("mlp", zero={"stage": stage}, optimizer=(optimizer, {"lr": 1e-3}))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)
    outcome = ranks(2).run(train, run, LAST_STEP, load=str(tmp_path))
    assert outcome[0].report is None
    assert outcome[0].losses == {step: source[0].losses[step] for step in outcome[0].losses}
    if kind == "Adafactor" and stage > 0:  # whose buffers are flat
        return
    state = "scale" if kind == "OneElement" else "row_var"
    with pytest.raises(RankError) as refused:
        ranks(1).run(train, run, STEP, load=str(tmp_path))
    assert f"optimizer state {state!r} isn't element-wise" in str(refused.value)
    assert '"load": "auto" restores it on the topology' in str(refused.value) and '"reset"' in str(refused.value)
    reset = replace(run, universal={"enabled": True, "optimizer_states": "reset"})
    assert ranks(1).run(train, reset, STEP, load=str(tmp_path))[0].report is not None


def test_groups_without_a_key_that_the_engines_class_needs(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed puts the saved groups in place of the live ones: then the step raises KeyError('bias_correction')."""
    run = Run("mlp", zero={"stage": 1}, optimizer=("AdamW", {"lr": 1e-3}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    target = replace(run, optimizer=(odd_optimizers.StateStepFusedAdam, {}))
    outcome = ranks(2).run(train, target, STEP + 1, load=str(tmp_path))
    assert outcome[0].report is not None and STEP + 1 in outcome[0].losses
    back = ranks(2).run(train, replace(target, universal={"enabled": True}), STEP, load=str(tmp_path))
    assert back[0].report is not None


@pytest.mark.parametrize("stage", [1, 3])
def test_adagrad_with_two_groups(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed makes it anew with one group, and can't step; what it can, it still does."""
    run = Run("mlp", zero={"stage": 0}, groups="decay", optimizer=("Adagrad", {"lr": 1e-3}))
    ranks(2).run(train, run, STEP, save=str(tmp_path / "0"))
    target = replace(run, zero={"stage": stage})
    outcome = ranks(2).run(train, target, STEP, load=str(tmp_path / "0"))
    assert "parameter group 1: Adagrad has one group for all under ZeRO" in outcome[0].report.kept_settings
    if stage == 1:  # DeepSpeed saves it, and loads it
        ranks(2).run(train, target, 0, save=str(tmp_path / "1"))
        assert ranks(2).run(train, target, 0, load=str(tmp_path / "1"))[0].load_path is not None
