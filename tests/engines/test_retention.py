"""Retention in a run: what stays when a checkpoint is on disk, in the foreground and in the background."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from async_saves import Ranks, held_back, trained
from deepspeed import comm as dist

import ucp_deepspeed
from ucp_deepspeed.checkpoint.retention import PIN_NAME
from ucp_deepspeed.engine.saving import save
from ucp_deepspeed.testing.runs import Run, train_step

KEEP = {"enabled": True, "save": {"keep": {"last": 2, "every": 5}}}


def there(root: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("global_step")) for entry in root.glob("global_step*"))


def save_each_step(run: Run, folder: str, background: bool) -> list[list[int]]:
    """Save after each of seven steps; return the steps that are there after each save."""
    root, seen = Path(folder), []
    engine = trained(run, 1)
    while engine.global_steps <= 7:
        engine.save_checkpoint(folder)
        ucp_deepspeed.wait_for_save()
        dist.barrier()
        seen.append(there(root))
        if engine.global_steps == 1 and dist.get_rank() == 0:
            (root / "global_step1" / PIN_NAME).touch()
        train_step(engine, run, engine.global_steps + 1)
    if background:
        with held_back():  # a save that isn't finished neither counts nor goes
            engine.save_checkpoint(folder, tag="global_step8")
            seen.append(there(root))
        ucp_deepspeed.wait_for_save()
        dist.barrier()
        seen.append(there(root))
    engine.destroy()
    return seen


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_the_newest_and_each_fifth_stay(background: bool, ranks: Ranks, tmp_path: Path) -> None:
    block = {"enabled": True, "save": KEEP["save"] | {"async": background}}
    run = Run("mlp", zero={"stage": 1}, universal=block)
    seen, _ = ranks(2).run(save_each_step, run, str(tmp_path), background)
    assert seen[:7] == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 5, 6], [1, 5, 6, 7]]
    assert seen[7:] == ([[1, 5, 6, 7, 8], [1, 5, 7, 8]] if background else [])
    assert (tmp_path / "latest").read_text() == ("global_step8" if background else "global_step7")


def refuse_removal(run: Run, folder: str) -> list[str]:
    """Save twice where nothing can be removed; return the warnings."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    save.logger.addHandler(handler)

    def failing(*arguments: object, **settings: object) -> None:
        raise OSError("the disk is stuck")

    pruned, save.prune = save.prune, failing
    try:
        engine = trained(run, 1)
        engine.save_checkpoint(folder)
        engine.destroy()
    finally:
        save.prune = pruned
        save.logger.removeHandler(handler)
    return told


def test_a_removal_that_fails_is_told_and_the_save_is_whole(ranks: Ranks, tmp_path: Path) -> None:
    run = replace(Run("mlp", zero={"stage": 1}), universal=KEEP)
    told, _ = ranks(2).run(refuse_removal, run, str(tmp_path))
    assert any("aren't removed: the disk is stuck" in each for each in told)
    assert ucp_deepspeed.last_checkpoint(tmp_path) == str(tmp_path / "global_step1")
