"""A process killed at any moment of an asynchronous save, and processes that end before it is through."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from async_saves import ASYNC, FILE_LIMIT, contents, save_and_wait, trained
from checkpoints import differences
from deepspeed import comm as dist
from left_alone import Wrapped

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK, REPLACED_MARK
from ucp_deepspeed.engine.saving import save
from ucp_deepspeed.engine.saving.snapshot import FileSnapshot
from ucp_deepspeed.testing.ranks import RankError, RankPool, free_port
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer import commit

Ranks = Callable[[int], RankPool]

RUN = Run("mlp", zero={"stage": 1}, universal=ASYNC)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that there is before: tag ``old``, at another step than what is saved then."""
    folder = tmp_path_factory.mktemp("before")
    pool = RankPool(1)
    pool.run(save_and_wait, RUN, str(folder), "old")
    pool.close()
    return folder


def kill(*_: Any, **__: Any) -> None:
    """As the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def save_until(moment: str, folder: str, tag: str, run: Run = RUN) -> None:
    """Save, and be killed at that moment."""
    written: list[str] = []
    write, replace, move = FileSnapshot.write, save.replace_folder, save.write_atomically

    def write_some(self: FileSnapshot, partial: Path, checksums: bool) -> Any:
        if moment == f"after {len(written)} files":
            kill()
        sums = write(self, partial, checksums)
        written.append(self.name)
        if moment == "within a file" and len(written) == 2:
            os.truncate(partial / self.name, 100)
            kill()
        return sums

    def replace_or_not(*arguments: Any) -> None:
        if moment == "before the folder takes its place":
            kill()
        replace(*arguments)

    def move_or_not(path: Path, text: str) -> None:
        if path.name == "latest" and moment == "before latest moves":
            kill()
        move(path, text)

    FileSnapshot.write = write_some  # type: ignore[method-assign]
    save.replace_folder, save.write_atomically = replace_or_not, move_or_not
    if moment == "before the old folder is removed":
        commit.shutil.rmtree = kill  # type: ignore[assignment]
    trained(run, 1).save_checkpoint(folder, tag=tag)
    save.wait_for_save()


@pytest.mark.parametrize(
    ("moment", "tag"),
    [
        ("after 0 files", "new"),
        ("after 1 files", "old"),
        ("within a file", "new"),
        ("before the folder takes its place", "old"),
        ("before latest moves", "new"),
    ],
)
def test_the_checkpoint_before_stays(moment: str, tag: str, before: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    pool = RankPool(1)
    with pytest.raises(RankError, match="died"):
        pool.run(save_until, moment, str(folder), tag)
    assert (folder / "latest").read_text() == "old"
    assert contents(folder / "old") == contents(before / "old")
    assert open_checkpoint(folder).run.global_steps == 3
    pool.close()


def test_a_tag_that_lies_aside_is_loaded_there_and_put_back_by_the_next_save(
    before: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """As a process leaves it that is killed between two renames. DeepSpeed's own load finds it too."""
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    aside = tmp_path / f".old{PARTIAL_MARK}elsewhere-7{REPLACED_MARK}"
    (tmp_path / "old").rename(aside)
    held = contents(tmp_path)
    stage_3 = replace(RUN, zero={"stage": 3})
    for run, tag, universal in ((RUN, None, False), (stage_3, "old", True)):
        found = ranks(1).run(train, run, 3, load=str(tmp_path), tag=tag)[0]
        assert Path(str(found.load_path)).parent == aside
        assert (found.counters["global_steps"], found.report is not None) == (3, universal)
    assert contents(tmp_path) == held
    plain = replace(RUN, universal={"enabled": True})
    ranks(1).run(train, plain, 4, load=str(tmp_path), save=str(tmp_path), save_tag="next")
    assert contents(tmp_path / "old") == contents(before / "old")
    assert not aside.exists() and (tmp_path / "next").is_dir()


def test_an_engine_that_is_left_to_deepspeed_finds_a_tag_that_lies_aside(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 0}, optimizer=(Wrapped, {"lr": 1e-3}))
    ranks(1).run(train, run, 2, save=str(tmp_path), save_tag="old")
    aside = tmp_path / f".old{PARTIAL_MARK}elsewhere-7{REPLACED_MARK}"
    (tmp_path / "old").rename(aside)
    found = ranks(1).run(train, run, 2, load=str(tmp_path))[0]
    assert (Path(str(found.load_path)).parent, found.counters["global_steps"]) == (aside, 2)


def save_until_one_is_killed(run: Run, folder: str, killed: int, tag: str) -> None:
    """Two ranks, one of which dies before its last file."""
    last = "after 1 files" if killed == 0 else "after 0 files"
    save_until(last if dist.get_rank() == killed else "never", folder, tag, run)


@pytest.mark.parametrize("tag", ["old", "new"])
@pytest.mark.parametrize(("stage", "killed"), [(1, 0), (1, 1), (3, 1)])
def test_one_rank_of_two_is_killed(stage: int, killed: int, tag: str, tmp_path: Path) -> None:
    """Whichever it is, a run goes on from the checkpoint before, and its next save tidies up."""
    run, pool = replace(RUN, zero={"stage": stage}), RankPool(2)
    pool.run(save_and_wait, run, str(tmp_path), "old")
    before = contents(tmp_path / "old")
    with pytest.raises(RankError):
        pool.run(save_until_one_is_killed, run, str(tmp_path), killed, tag)
    pool.close()
    assert contents(tmp_path / "old") == before
    assert (tmp_path / "latest").read_text() == "old"
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all(name.startswith(f".{tag}.partial-") for name in left) and len(left) == (killed == 0)

    pool = RankPool(2)
    outcome = pool.run(train, run, 4, load=str(tmp_path))
    assert sorted(outcome[0].losses) == [4]
    pool.run(save_and_wait, run, str(tmp_path), "next")
    pool.close()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"old", "next"}
    assert differences(tmp_path / "old", tmp_path / "next") == []


def test_a_tag_whose_folder_has_just_taken_its_place(before: Path, tmp_path: Path) -> None:
    """Killed while the old one is being removed: the new one is there, whole. The next save of the tag tidies up."""
    folder = tmp_path / "run"
    shutil.copytree(before, folder)
    pool = RankPool(1)
    with pytest.raises(RankError, match="died"):
        pool.run(save_until, "before the old folder is removed", str(folder), "old")
    assert open_checkpoint(folder).run.global_steps == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".old.partial-")]

    outcome = pool.run(train, RUN, 3, load=str(folder))
    assert sorted(outcome[0].losses) == [2, 3]
    pool.run(save_and_wait, RUN, str(folder), "old")
    pool.close()
    assert differences(folder, before) == []
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


SCRIPT = """
import atexit, multiprocessing, os, resource, sys, time
import ucp_deepspeed
import deepspeed, torch
from ucp_deepspeed.engine.saving.snapshot import FileSnapshot
from ucp_deepspeed.testing.ranks import _use_gloo_only

folder, limit, how = sys.argv[1:]
def work():
    _use_gloo_only()
    model = torch.nn.Linear(200, 200)
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "universal_checkpoint": {"enabled": True, "save": {"async": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    write = FileSnapshot.write
    def late(self, *arguments):
        time.sleep(0.3)
        return write(self, *arguments)
    FileSnapshot.write = late

    def save():
        engine.save_checkpoint(folder)
        assert not os.path.exists(folder + "/latest")
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        engine.destroy()
        torch.distributed.destroy_process_group()

    if how == "at exit":
        atexit.register(save)
        return
    save()

if how == "forked":
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    os._exit(child.exitcode)
work()
"""


@pytest.mark.parametrize("how", ["plain", "forked", "at exit"])
def test_a_process_that_ends_finishes_its_save_or_fails(how: str, tmp_path: Path) -> None:
    """Its process group is gone by then, as a rule."""
    places = {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    started = {}
    for name, limit in (("sound", 10**9), ("full", FILE_LIMIT)):
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        environment = os.environ | places | {key: str(value) for key, value in ranks.items()}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(limit), how]
        started[name] = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    ended = {name: (process.communicate(timeout=120)[1], process.returncode) for name, process in started.items()}

    assert ended["sound"][1] == 0, ended["sound"][0]
    assert open_checkpoint(tmp_path / "sound").run.global_steps == 0
    assert ended["full"][1] == 1, ended["full"][0]
    assert "ucp_deepspeed: the last asynchronous save failed: " in ended["full"][0]
    assert not (tmp_path / "full" / "latest").exists()
