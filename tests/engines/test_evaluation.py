"""Engines without an optimizer take the weights out of any checkpoint, and see what the run that saved it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, build_evaluator, loss_of, train_step
from ucp_deepspeed.transfer.conversion import convert

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


def evaluated(run: Run, folder: str, options: Mapping[str, Any]) -> tuple[float, int, tuple[str, ...]]:
    """On a rank: the same batch's loss in an engine without an optimizer; steps of the run; what wasn't restored."""
    engine = build_evaluator(run)
    path, _ = engine.load_checkpoint(folder, **options)
    assert path is not None
    report = getattr(engine, "universal_checkpoint_report", None)
    found = loss_of(engine, run), engine.global_steps, () if report is None else report.initialised + report.dropped
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("source", "stage", "ranks_after"),
    [
        (Run("mlp", zero={"stage": 3}), 0, 1),
        (Run("mlp", zero={"stage": 3}, precision="bf16"), 3, 2),
        (Run("mlp", zero={"stage": 3}), 3, 1),
        (Run("mlp", zero={"stage": 0}, precision="bf16"), 0, 2),
        (Run("mlp", zero={"stage": 1}, precision="bf16"), 3, 1),
    ],
    ids=lambda value: f"{value.zero['stage']} {value.precision}" if isinstance(value, Run) else str(value),
)
@pytest.mark.parametrize("converted", [False, True], ids=["native", "universal"])
def test_the_loss_is_the_same(
    source: Run, stage: int, ranks_after: int, converted: bool, ranks: Ranks, tmp_path: Path
) -> None:
    expected = ranks(2).run(trained, source, str(tmp_path / "a"))[0]
    folder = tmp_path / "a"
    if converted:
        folder = tmp_path / "u"
        convert(UniversalView.of(open_checkpoint(tmp_path / "a"), None), folder)
    target = replace(source, zero={"stage": stage}, seed=1)
    for found in ranks(ranks_after).run(evaluated, target, str(folder), {}):
        assert found == (expected, STEP, ())


def test_a_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    source = Run("gpt", pp=2, zero={"stage": 1}, precision="bf16")
    expected = ranks(2).run(trained, source, str(tmp_path))[0]
    target = replace(source, pp=1, zero={"stage": 0}, seed=1)
    assert ranks(1).run(evaluated, target, str(tmp_path), {}) == [(expected, STEP, ())]


def test_nothing_that_matches_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Also where everything may be missing and extra."""
    ranks(2).run(trained, Run("mlp", zero={"stage": 3}), str(tmp_path))
    lenient = {"enabled": True, "on_missing": "init", "on_extra": "drop"}
    target = Run("gpt", zero={"stage": 0}, universal=lenient)
    with pytest.raises(RankError, match="holds no parameter of the model: it has gain, odd_offset") as caught:
        ranks(1).run(evaluated, target, str(tmp_path), {"load_module_strict": False})
    assert isinstance(caught.value.original, MismatchError)
