"""The files that the manifest of a synchronous save lists: those that it wrote. Others in the folder are somebody else's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ucp_deepspeed
from ucp_deepspeed.checkpoint.deepspeed.manifest import read_manifest
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_deepspeeds
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train

Ranks = Callable[[int], RankPool]

ONE, THREE = (Run("mlp", zero={"stage": stage}) for stage in (1, 3))


def listed(folder: Path) -> set[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return set(manifest.files)


@pytest.mark.parametrize("checksums", [True, False])
def test_files_of_the_users_own(checksums: bool, ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "last"
    folder.mkdir()
    (folder / "train.log").write_text("step 1\n")
    (folder / "notes.txt").write_text("a note\n")
    Path(os.fsdecode(os.fsencode(folder) + b"/r\xe9sum\xe9.txt")).write_text("not in UTF-8\n")
    run = replace(ONE, universal={"enabled": True, "save": {"checksums": checksums}})
    ranks(1).run(train, run, 1, save=str(tmp_path), save_tag="last")
    written = {entry.name for entry in folder.iterdir() if is_deepspeeds(entry.name)}
    ours = {"ucp_random_states.jsonl", *(["ucp_checksums.jsonl"] if checksums else [])}
    assert listed(folder) == written | ours
    assert not ucp_deepspeed.verify(folder).problems
    (folder / "train.log").write_text("step 1\nstep 2\n")
    (folder / "notes.txt").unlink()
    assert not ucp_deepspeed.verify(folder).problems


def test_files_of_an_earlier_run(ranks: Ranks, tmp_path: Path) -> None:
    """They are no part of the save, whether they stay or go, until DeepSpeed alone writes them again."""
    folder = tmp_path / "last"
    ranks(2).run(train, THREE, 1, save=str(tmp_path), save_tag="last")
    of_before = {entry.name for entry in folder.iterdir() if is_deepspeeds(entry.name)}
    ranks(1).run(train, ONE, 2, save=str(tmp_path), save_tag="last")
    manifest = read_manifest(folder)
    assert manifest is not None
    left = of_before - manifest.files.keys()
    assert left == manifest.earlier.keys() and any("model_states" in name for name in left)
    [weights] = (folder / name for name in sorted(manifest.files) if name.endswith("mp_rank_00_model_states.pt"))

    def check() -> None:
        assert ucp_deepspeed.verify(folder).verdict == "whole"
        [outcome] = ranks(1).run(train, ONE, 2, load=str(tmp_path))
        saved = torch.load(weights, weights_only=False)["module"]
        with ucp_deepspeed.open_checkpoint(folder) as opened:
            assert opened.run.global_steps == 2
            assert all(torch.equal(opened.read(name), value) for name, value in saved.items())
        assert outcome.losses == {}

    check()
    for name in left:
        (folder / name).unlink()
    check()
