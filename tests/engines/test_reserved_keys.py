"""Entries of the client state under names of DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP, differences

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


def saved_nested(run: Run, folder: str) -> None:
    """On a rank: save as it is, and with the module's state in nested dictionaries, as plain models of Megatron-DeepSpeed do."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    engine.save_checkpoint(folder, tag="flat")
    flat = engine.module.state_dict

    def state_dict(*inputs: Any, **named: Any) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in flat(*inputs, **named).items():
            first, _, rest = name.partition(".")
            nested.setdefault(first, {}).update({rest: value}) if rest else nested.update({first: value})
        return nested

    engine.module.state_dict = state_dict
    engine.save_checkpoint(folder, tag="nested")
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1])
def test_nested_states_of_modules(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Also where the weights are in them alone, and on another topology."""
    run = Run("mlp", zero={"stage": stage}, precision="bf16")
    ranks(2).run(saved_nested, run, str(tmp_path))
    assert differences(tmp_path / "flat", tmp_path / "nested") == []
    target = Run("mlp", zero={"stage": 2}, precision="bf16", seed=5)
    ranks(1).run(train, target, 0, load=str(tmp_path), tag="nested", save=str(tmp_path / "again"), save_tag="again")
    assert differences(tmp_path / "flat", tmp_path / "again") == []


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
