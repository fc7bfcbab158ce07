"""Checkpoints on machines' own disks, here a folder for each rank: the same topology goes on, and others say what they need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from checkpoints import STEP, differences
from deepspeed import comm as dist

from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

LOCAL = {"checkpoint": {"use_node_local_storage": True}}


def on_own_disk(run: Run, base: str, load: str | None, save: str | None, first: int, last: int) -> dict[int, float]:
    """On a rank that is the only one of its machine."""
    folder = Path(base) / f"node{dist.get_rank()}"
    with patch.dict(os.environ, LOCAL_RANK="0"):
        engine = build_engine(run)
    if load:
        path, state = engine.load_checkpoint(str(folder / load), tag=f"global_step{first - 1}")
        assert path is not None and state["epoch"] == 7 and engine.global_steps == first - 1
    losses = {step: train_step(engine, run, step) for step in range(first, last + 1)}
    if save:
        engine.save_checkpoint(str(folder / save), client_state={"epoch": 7})
    engine.destroy()
    return losses


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "bf16"), (3, "fp32")], ids=lambda value: str(value))
def test_the_same_topology_goes_on(stage: int, precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """As without the package, which is the baseline; also from what was saved without it."""
    run = Run("mlp", zero={"stage": stage}, precision=precision, config=LOCAL)
    stock = replace(run, universal=None)
    ranks(2).run(on_own_disk, run, str(tmp_path), None, "a", 1, STEP)
    whole = ranks(2).run(on_own_disk, stock, str(tmp_path), "a", None, STEP + 1, STEP + 2)
    ranks(2).run(on_own_disk, stock, str(tmp_path), None, "b", 1, STEP)
    for saved in ("a", "b"):
        assert ranks(2).run(on_own_disk, run, str(tmp_path), saved, None, STEP + 1, STEP + 2) == whole
    assert all((tmp_path / f"node{rank}" / "a" / "latest").is_file() for rank in range(2))


@pytest.mark.parametrize("stage", [1, 3])
def test_another_topology_needs_all(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """The error names what each machine lacks; with that copied it loads."""
    run = Run("mlp", zero={"stage": stage}, config=LOCAL)
    ranks(2).run(on_own_disk, run, str(tmp_path), None, "a", 1, STEP)
    target = Run("mlp", zero={"stage": 2 if stage == 3 else 3}, config=LOCAL)
    with pytest.raises(RankError) as caught:
        ranks(2).run(on_own_disk, target, str(tmp_path), "a", None, STEP + 1, STEP + 1)
    assert isinstance(caught.value.original, MismatchError)
    for rank, other in ((0, 1), (1, 0)):
        folder = tmp_path / f"node{rank}" / "a" / f"global_step{STEP}"
        [line] = [line for line in caught.value.original.problems if f"{folder} lacks " in line]
        assert line.endswith(f"zero_pp_rank_{other}_mp_rank_00_optim_states.pt")
    assert "copy the files of all machines" in str(caught.value.original)
    whole = tmp_path / "whole"
    for rank in (0, 1):
        shutil.copytree(tmp_path / f"node{rank}" / "a" / f"global_step{STEP}", whole, dirs_exist_ok=True)
    for rank in (0, 1):
        shutil.copytree(whole, tmp_path / f"node{rank}" / "a" / f"global_step{STEP}", dirs_exist_ok=True)
    ranks(2).run(on_own_disk, target, str(tmp_path), "a", None, STEP + 1, STEP)
    shared = Run("mlp", zero={"stage": 0})
    ranks(1).run(again, shared, str(whole), str(tmp_path / "again"))
    assert differences(whole, tmp_path / "again") == []


def again(run: Run, folder: str, to: str) -> None:
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(to)
    engine.destroy()
