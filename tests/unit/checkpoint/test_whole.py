"""The newest whole checkpoint of a folder: of tags, and of folders that a framework makes for each save."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from native_files import NativeRun, write_native
from spec_models import model_of

import ucp_deepspeed
from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME
from ucp_deepspeed.checkpoint.tags import mark_of
from ucp_deepspeed.integrations.rotation import rotate


def saved(root: Path, step: int, *, companion: str | None = None) -> Path:
    """Write a folder as a framework makes one for each save, with a tag of DeepSpeed's in it."""
    write_native(root, model_of(), NativeRun(dp=2, stage=2, steps=step), f"global_step{step}")
    if companion:
        (root / companion).write_text("{}")
    return root


def mark(tag: Path) -> None:
    (tag / MARK_NAME).write_text(mark_of(tag, "0123456789abcdef").model_dump_json())


def of_trainer(root: Path, *steps: int) -> list[Path]:
    return [saved(root / f"checkpoint-{step}", step, companion="trainer_state.json") for step in steps]


def test_tags_of_a_run(tmp_path: Path) -> None:
    """The latest step counts, also if the names say otherwise and the files were copied without their times."""
    for step in (9, 10, 8):
        write_native(tmp_path, model_of(), NativeRun(dp=2, stage=2, steps=step), f"tag{100 - step}")
    assert ucp_deepspeed.last_checkpoint(tmp_path) == str(tmp_path / "tag90")
    mark(tmp_path / "tag90")
    assert ucp_deepspeed.last_checkpoint(str(tmp_path)) == str(tmp_path / "tag91")
    assert ucp_deepspeed.last_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("how", ["marked", "cut", "lacking a file", "no latest", "no trainer_state", "empty"])
def test_what_is_not_whole_is_passed_over(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, older, newest = of_trainer(tmp_path, 9, 10, 11)
    tag = newest / "global_step11"
    if how == "marked":
        mark(tag)
    elif how == "cut":
        file = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "lacking a file":
        (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    elif how == "no latest":
        (newest / "latest").unlink()
    elif how == "no trainer_state":
        (newest / "trainer_state.json").unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    with caplog.at_level(logging.WARNING, "ucp_deepspeed"):
        assert ucp_deepspeed.last_checkpoint(tmp_path) == str(older)
    assert str(newest) in caplog.text and "aren't whole" in caplog.text


def test_none_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (only,) = of_trainer(tmp_path, 9)
    mark(only / "global_step9")
    with caplog.at_level(logging.WARNING, "ucp_deepspeed"):
        assert ucp_deepspeed.last_checkpoint(tmp_path) is None
    assert "no checkpoint of" in caplog.text


def test_rotation_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    first, second, third, fourth = of_trainer(tmp_path, 1, 2, 3, 4)
    mark(second / "global_step2")
    mark(fourth / "global_step4")
    assert rotate([first, second, third, fourth], 1) == [first, second]
    assert rotate([third, fourth], 1) == [] and third.is_dir() and fourth.is_dir()
    mark(third / "global_step3")
    assert rotate([third, fourth], 1) == []


def test_pinned_checkpoints_count_and_stay(tmp_path: Path) -> None:
    best, second, third = of_trainer(tmp_path, 1, 2, 3)
    assert rotate([best, second, third], 2, pinned=[best]) == [second]
    assert best.is_dir() and third.is_dir()
