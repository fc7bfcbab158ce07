"""Files of older versions of DeepSpeed in live engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import warnings_of_loading

from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train

Ranks = Callable[[int], RankPool]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], pattern: str = "*model_states.pt") -> None:
    """Change files of a checkpoint, of which no manifest is left then."""
    (folder / "ucp_manifest.json").unlink(missing_ok=True)
    for path in folder.glob(pattern):
        content = torch.load(path, map_location="cpu", weights_only=False)
        change(content)
        torch.save(content, path)


def forget_frozen(content: dict[str, Any]) -> None:
    """As before DeepSpeed 0.9.1."""
    del content["frozen_param_shapes"], content["frozen_param_fragments"], content["shared_params"]


def fill_placeholders(content: dict[str, Any]) -> None:
    """As before DeepSpeed 0.6: with an element in the place of each weight that is cut."""
    module = content["module"]
    content["module"] = {name: held if held.numel() else torch.ones(1) for name, held in module.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_files_of_zero_3_that_deepspeed_no_longer_loads(precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """On the same topology too, where DeepSpeed doesn't find them or refuses them."""
    run = Run("mlp", zero={"stage": 3}, precision=precision)
    [saved, _] = ranks(2).run(train, run, 4, save=str(tmp_path), save_tag="step", save_at=2)
    rewrite(tmp_path / "step", fill_placeholders if precision == "fp32" else lambda content: None)
    for path in (tmp_path / "step").glob("bf16_*"):
        path.rename(path.with_name(path.name.removeprefix("bf16_")))
    [again, _] = ranks(2).run(train, replace(run, seed=1), 4, load=str(tmp_path), tag="step")
    assert again.report is not None and not again.report.initialised
    assert again.losses == {step: saved.losses[step] for step in (3, 4)}


def test_steps_that_a_group_counted(ranks: Ranks, tmp_path: Path) -> None:
    """As DeepSpeed's FusedAdam did up to 0.6; the next step's bias correction needs them."""
    run = Run("mlp", zero={"stage": 1})
    [saved] = ranks(1).run(train, run, 4, save=str(tmp_path), save_tag="step", save_at=2)
    [path] = (tmp_path / "step").glob("*optim_states.pt")
    (tmp_path / "step" / "ucp_manifest.json").unlink()
    content = torch.load(path, map_location="cpu", weights_only=False)
    base = content["optimizer_state_dict"]["base_optimizer_state"]
    for number, group in enumerate(base["param_groups"]):
        group["step"] = int(base["state"][number].pop("step"))
    torch.save(content, path)
    for stage in (1, 3):
        target = replace(run, zero={"stage": stage}, universal={"enabled": True, "load": "always"})
        [again] = ranks(1).run(train, target, 4, load=str(tmp_path), tag="step")
        assert again.report is not None and list(again.losses) == [3, 4]
        assert stage == 3 or again.losses == {step: saved.losses[step] for step in (3, 4)}


def test_frozen_weights_that_zero_3_left_out(ranks: Ranks, tmp_path: Path) -> None:
    """The model may keep its own, as of a base model that was fetched again; never without being asked to."""
    run = Run("mlp", zero={"stage": 3}, frozen=("linear_in.weight",))
    ranks(2).run(train, run, 2, save=str(tmp_path), save_tag="step")
    (tmp_path / "step" / "ucp_manifest.json").unlink()
    rewrite(tmp_path / "step", forget_frozen)
    [(told, _), _] = ranks(2).run(warnings_of_loading, run, 3, str(tmp_path))  # DeepSpeed alone says nothing
    assert any("linear_in.weight" in line and "its own values" in line for line in told)
    target = replace(run, zero={"stage": 2})
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, target, 2, load=str(tmp_path), tag="step")
    assert isinstance(caught.value.original, MismatchError)
    for part in ("linear_in.weight: DeepSpeed ", "left its value out", "load_module_strict=False"):
        assert part in str(caught.value.original)
    options = {"load_module_strict": False}
    [again] = ranks(1).run(train, target, 3, load=str(tmp_path), tag="step", options=options)
    assert list(again.losses) == [3] and again.report is not None and "linear_in.weight" in again.report.initialised
