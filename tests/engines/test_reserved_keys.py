"""Entries of the client state under names of DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP

import ucp_deepspeed
from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_what_a_resume_would_go_by_is_refused(asynchronous: bool, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed saves them in place of its own: the run would go on at step 1000."""
    run = Run("mlp", universal={"enabled": True, "save": {"async": asynchronous}})
    state = {"global_steps": 1000, "lr_scheduler": None, "epoch": 3}
    with pytest.raises(RankError, match=r"keys of DeepSpeed's, .* resumes from: global_steps, lr_scheduler;") as caught:
        ranks(2).run(train, run, 1, save=str(tmp_path / "a"), client_state=state)
    assert isinstance(caught.value.original, SaveError)
    assert not (tmp_path / "a").exists()
    # which the same step isn't, and a name of the script's own
    ranks(2).run(train, run, 1, save=str(tmp_path / "a"), client_state={"global_steps": 1, "my_steps": 1000})


def saved_with_a_method_of_that_name(run: Run, folder: str) -> Any:
    """On a rank: save layouts as Megatron-DeepSpeed does, whose models have a method to make them."""
    engine = build_engine(run)
    engine.module.universal_checkpoint_info = engine.train  # a method of what can't be pickled
    engine.save_checkpoint(folder, client_state={"universal_checkpoint_info": {"original_vocab_size": 7}})
    ucp_deepspeed.wait_for_save()
    _, state = engine.load_checkpoint(folder)
    engine.destroy()
    return state["universal_checkpoint_info"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_layouts_of_megatron_deepspeed_take_the_place_of_its_models_method(
    asynchronous: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """DeepSpeed would pickle the method, and with it the engine's hooks."""
    run = Run("mlp", universal={"enabled": True, "save": {"async": asynchronous}})
    assert ranks(2).run(saved_with_a_method_of_that_name, run, str(tmp_path)) == [{"original_vocab_size": 7}] * 2


def saved_with_what_was_returned(run: Run, folder: str) -> tuple[int, Any]:
    """On a rank: load, train, save with the returned state, load in a new engine: its samples, and the script's entry."""
    engine = build_engine(run)
    _, state = engine.load_checkpoint(folder)
    train_step(engine, run, STEP + 1)
    engine.save_checkpoint(folder, client_state={**state, "ds_config": "settings.yaml"})
    engine.destroy()
    engine = build_engine(run)
    _, state = engine.load_checkpoint(folder)
    found = engine.global_samples, state["ds_config"]
    engine.destroy()
    return found


def test_what_a_load_returned_does_not_hide_what_is_now(ranks: Ranks, tmp_path: Path) -> None:
    """With DeepSpeed alone the count of samples would be that of the first save. A name that is the script's own is kept."""
    ranks(1).run(train, Run("mlp"), STEP, save=str(tmp_path))
    [(samples, own)] = ranks(1).run(saved_with_what_was_returned, Run("mlp"), str(tmp_path))
    assert (samples, own) == (8 * (STEP + 1), "settings.yaml")
