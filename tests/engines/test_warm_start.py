"""Beginning anew from the weights of another model, and loads that would only seem to be one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Outcome, Run, build_engine, train

Ranks = Callable[[int], RankPool]

ANYTHING = {"enabled": True, "on_missing": "init", "on_extra": "drop"}

WARM = {"load_module_strict": False, "load_optimizer_states": False}

REST = tuple(name for name, _ in build_mlp().named_parameters())
"""All parameters but the adapter's."""

ADAPTER = ("adapter.weight", "adapter.bias")


def loaded(run: Run, folder: str, options: Mapping[str, Any]) -> tuple[Any, int, list[str]]:
    """On a rank: the report, the step, and the warnings of a load."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    kept = Kept(logging.WARNING)
    logging.getLogger("ucp_deepspeed").addHandler(kept)
    engine = build_engine(run)
    engine.load_checkpoint(folder, **options)
    logging.getLogger("ucp_deepspeed").removeHandler(kept)
    found = engine.universal_checkpoint_report, engine.global_steps, lines
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_what_was_and_what_was_not_restored_is_listed(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """A layer more, and from another data-parallel size."""
    ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, save=str(tmp_path))
    report, step, lines = ranks(1).run(
        loaded, Run("mlp", size={"adapter": True}, zero={"stage": stage}), str(tmp_path), WARM
    )[0]
    assert (set(report.initialised), report.dropped, step) == (set(ADAPTER), (), STEP)
    assert "2 parameters kept the model's own values, in whole or in part: adapter.weight, adapter.bias" in lines


def refusal(ranks: Ranks, run: Run, folder: Path, options: Mapping[str, Any]) -> str:
    with pytest.raises(RankError) as caught:
        ranks(1).run(loaded, run, str(folder), options)
    assert isinstance(caught.value.original, MismatchError)
    return str(caught.value.original)


def test_a_load_of_nothing_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """An adapter that was saved alone, and a model that has none of this name."""
    source = Run("mlp", size={"adapter": True}, frozen=REST)
    saving: Mapping[str, Any] = {"save": str(tmp_path), "save_options": {"exclude_frozen_parameters": True}}
    ranks(1).run(train, source, STEP, **saving)
    found = refusal(ranks, Run("mlp", universal=ANYTHING), tmp_path, {"load_module_strict": False})
    assert "holds no parameter of the model: it has adapter.weight, adapter.bias, and the model" in found
    assert "a spec can say so" in found
    assert "holds no parameter of the model" in refusal(ranks, Run("mlp"), tmp_path, WARM)


def test_nothing_to_go_on_with_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """All that the model trains is new; what the message advises loads the rest."""
    ranks(1).run(train, Run("mlp"), STEP, save=str(tmp_path))
    target = Run("mlp", size={"adapter": True}, frozen=REST, universal=ANYTHING)
    found = refusal(ranks, target, tmp_path, {})
    assert "holds none of the parameters that the model trains (adapter.weight, adapter.bias)" in found
    assert "call load_checkpoint(…, load_module_strict=False, load_optimizer_states=False)" in found
    report, _, _ = ranks(1).run(loaded, target, str(tmp_path), WARM)[0]
    assert report.initialised == ADAPTER and report.bytes_read > 0


def test_kinds_do_not_count_where_no_states_are_restored(ranks: Ranks, tmp_path: Path) -> None:
    """Frozen on one side and trained on the other, strictly, with the states left as they were or begun anew."""
    ranks(1).run(train, Run("mlp", frozen=("gain",)), STEP, save=str(tmp_path))
    for options, block in (({"load_optimizer_states": False}, {}), ({}, {"optimizer_states": "reset"})):
        target = Run("mlp", frozen=("norm.weight",), zero={"stage": 3}, universal={"enabled": True, **block})
        outcome: Outcome = ranks(1).run(train, target, STEP + 1, load=str(tmp_path), options=options)[0]
        assert (outcome.report.initialised, outcome.report.dropped) == ((), ())


def test_another_optimizer_is_told_what_loses_least(ranks: Ranks, tmp_path: Path) -> None:
    """The message's settings, tried: what both optimizers keep is restored."""
    source = Run("mlp", optimizer=("AdamW", {"lr": 1e-3}))
    ranks(1).run(train, source, STEP, save=str(tmp_path))
    target = Run("mlp", optimizer=("Adagrad", {"lr": 1e-3}))
    found = refusal(ranks, target, tmp_path, {})
    assert (
        """"on_missing": "init" starts ['sum'] at zero and "on_extra": "drop" leaves ['exp_avg', 'exp_avg_sq'] out"""
        in found
    )
    again = Run("mlp", optimizer=target.optimizer, universal=ANYTHING)
    ranks(1).run(train, again, STEP, load=str(tmp_path), save=str(tmp_path / "b"), save_first=True)
    parameters = open_checkpoint(tmp_path / "b").parameters
    assert {parameters[name].scalars["step"] for name in REST} == {STEP}
