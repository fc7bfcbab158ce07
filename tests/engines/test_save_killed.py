"""Saves that write straight into the tag's folder, and are killed on one rank or on all: readers tell it, and name the way on."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from async_saves import ASYNC, contents, save_and_wait, trained
from checkpoints import STEP, differences
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME
from ucp_deepspeed.checkpoint.tags import Mark
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK
from ucp_deepspeed.engine.saving import save
from ucp_deepspeed.errors import DamagedCheckpointError, SaveError, UniversalCheckpointError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

RUN = Run("mlp", zero={"stage": 1})


def kill(*_: Any, **__: Any) -> None:
    """As the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def save_until(run: Run, folder: str, tag: str, moment: str, killed: tuple[int, ...]) -> None:
    """On a rank: take a step, save, and be killed at that moment, if it is this rank's turn."""
    engine, written = trained(run, 1), list[str]()
    if dist.get_rank() in killed:
        real, commit, move = TorchCheckpointEngine.save, save.write_manifest, save.write_atomically

        def save_some(self: Any, state_dict: Any, path: str) -> Any:
            if moment == f"after {len(written)} files":
                kill()
            done = real(self, state_dict, path)
            written.append(path)
            if moment == f"within file {len(written)}":
                os.truncate(path, Path(path).stat().st_size // 2)
                kill()
            return done

        def commit_some(*arguments: Any) -> None:
            if moment == "before the manifest":
                kill()
            commit(*arguments)
            if moment == "after the manifest":
                kill()

        def move_or_not(path: Path, text: str) -> None:
            if path.name == "latest" and moment == "before latest moves":
                kill()
            move(path, text)

        TorchCheckpointEngine.save = save_some
        save.write_manifest, save.write_atomically = commit_some, move_or_not
    engine.save_checkpoint(folder, tag=tag)


def killed(run: Run, folder: Path, moment: str, ranks: tuple[int, ...], size: int, tag: str = "a") -> None:
    """Save until ranks are killed; the others are left waiting, and go too."""
    pool = RankPool(size)
    with pytest.raises(RankError, match=r"died|closed by peer|reset by peer"):  # or what gloo tells the others first
        pool.run(save_until, run, str(folder), tag, moment, ranks, timeout=60.0)
    pool.close()


def two_tags(run: Run, folder: Path, size: int) -> Path:
    """Save tags ``b`` and ``a``, which ``latest`` names, long ago. Returns the folder of ``a``."""
    pool = RankPool(size)
    for step, tag in ((2, "b"), (3, "a")):
        pool.run(train, run, step, save=str(folder), save_tag=tag)
    pool.close()
    made_old(folder / "a")
    return folder / "a"


def made_old(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != MARK_NAME:
            os.utime(path, (1e9, 1e9))


def load_it(run: Run, folder: str) -> str:
    """On a rank: load what ``latest`` names; returns what is told."""
    engine = build_engine(run)
    with pytest.raises(UniversalCheckpointError) as caught:
        engine.load_checkpoint(folder)
    assert engine.global_steps == 0
    return str(caught.value)


def check_told(run: Run, folder: Path, size: int, *texts: str) -> None:
    """Check that loads, of DeepSpeed's kind and of ours, and readers tell that the tag isn't whole, and which tag is."""
    tag = folder / "a"
    ways = [
        f"a save into {tag} was not finished",
        f"load another tag of {folder}: tag='b'.",
        f"remove {MARK_NAME}",
        *texts,
    ]
    for open_it in (open_checkpoint, ucp_deepspeed.open_checkpoint):
        for place in (folder, tag):
            with pytest.raises(DamagedCheckpointError) as caught:
                open_it(place)
            assert all(text in str(caught.value) for text in ways), str(caught.value)
    pool = RankPool(size)
    for load in ("auto", "always"):
        universal = {"enabled": True, "load": load, "fallback": "none"}
        for told in pool.run(load_it, replace(run, universal=universal), str(folder), timeout=60.0):
            assert all(text in told for text in ways), told
    outcome = pool.run(train, run, 3, load=str(folder), tag="b", save=str(folder), save_tag="a")
    assert sorted(outcome[0].losses) == [3]
    pool.close()
    assert not (tag / MARK_NAME).exists() and open_checkpoint(tag).run.global_steps == 3


@pytest.mark.parametrize(
    ("moment", "ranks", "stage"),
    [
        ("after 0 files", (0, 1), 1),
        ("within file 1", (1,), 1),
        ("after 1 files", (1,), 3),
    ],
)
def test_a_save_that_is_killed(moment: str, ranks: tuple[int, ...], stage: int, tmp_path: Path) -> None:
    run = replace(RUN, zero={"stage": stage})
    two_tags(run, tmp_path, 2)
    killed(run, tmp_path, moment, ranks, 2)
    assert (tmp_path / "latest").read_text() == "a"
    check_told(run, tmp_path, 2)


@pytest.mark.parametrize(
    ("run", "size"),
    [
        (Run("gpt", pp=2, zero={"stage": 0}, precision="bf16"), 2),
        (Run("moe", zero={"stage": 1}), 2),
        (Run("mlp", zero={"stage": 0}), 1),
    ],
    ids=["pipeline", "experts", "stage 0"],
)
def test_files_that_the_topology_does_not_tell(run: Run, size: int, tmp_path: Path) -> None:
    """Layers and experts have files of their own."""
    tag = two_tags(run, tmp_path, size)
    last = {1: "within file 1", 2: "after 1 files"}[size]
    killed(run, tmp_path, last, (0,), size)
    with pytest.raises(DamagedCheckpointError, match=f"a save into {tag} was not finished .*: tag='b'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("moment", ["after 0 files", "within file 1"])
def test_a_new_tag_that_is_killed(moment: str, tmp_path: Path) -> None:
    """``latest`` still names the tag before; a tag that nothing was written into is told as well."""
    pool = RankPool(1)
    pool.run(train, RUN, 2, save=str(tmp_path), save_tag="b")
    pool.close()
    killed(RUN, tmp_path, moment, (0,), 1)
    assert open_checkpoint(tmp_path).run.global_steps == 2
    for place, tag in ((tmp_path, "a"), (tmp_path / "a", None)):
        with pytest.raises(DamagedCheckpointError, match=r"was not finished .*: tag='b'"):
            open_checkpoint(place, tag)


@pytest.mark.parametrize("moment", ["before the manifest", "after the manifest", "before latest moves"])
def test_a_save_whose_files_are_whole(moment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a manifest it is like any other. Without it, what is there counts as DeepSpeed's own, and that is told."""
    tag = two_tags(RUN, tmp_path, 1)
    killed(RUN, tmp_path, moment, (0,), 1)
    caplog.set_level("WARNING", "ucp_deepspeed")
    found = open_checkpoint(tmp_path)
    assert found.run.global_steps == 1 and (found.manifest is None) == (moment == "before the manifest")
    assert (tag / MARK_NAME).exists() == (moment != "before latest moves")
    lines = [line for line in caplog.messages if f"{tag}: a save was not finished there" in line]
    assert len(lines) == (moment == "before the manifest")
    copy = tmp_path / "copy"
    shutil.copytree(tag, copy, copy_function=shutil.copyfile)  # which keeps no times
    os.utime(copy / MARK_NAME, (1e9, 1e9)) if (copy / MARK_NAME).exists() else None
    if moment == "before the manifest":
        with pytest.raises(DamagedCheckpointError, match=r"was not finished .*files are from before it"):
            open_checkpoint(copy)
    else:
        assert open_checkpoint(copy).run.global_steps == 1


def test_stock_deepspeed_saves_over_a_mark(tmp_path: Path) -> None:
    """Its files are read, and the same files as another stage's are not mixed with them."""
    two_tags(RUN, tmp_path, 2)
    killed(RUN, tmp_path, "after 0 files", (1,), 2)
    made_old(tmp_path / "a")
    mark = Mark.model_validate_json((tmp_path / "a" / MARK_NAME).read_text())
    assert mark.files.keys() >= {"mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    pool = RankPool(2)
    stock = replace(RUN, universal=None)
    pool.run(train, stock, 4, save=str(tmp_path), save_tag="a")
    outcome = pool.run(train, RUN, 5, load=str(tmp_path))
    assert sorted(outcome[0].losses) == [5]
    pool.run(train, RUN, 4, save=str(tmp_path), save_tag="ours")
    pool.close()
    assert differences(tmp_path / "a", tmp_path / "ours") == []


def test_a_save_in_the_background_over_a_mark(tmp_path: Path) -> None:
    two_tags(RUN, tmp_path, 1)
    killed(RUN, tmp_path, "within file 1", (0,), 1)
    pool = RankPool(1)
    pool.run(save_and_wait, replace(RUN, universal=ASYNC), str(tmp_path), "a")
    pool.close()
    assert not (tmp_path / "a" / MARK_NAME).exists() and open_checkpoint(tmp_path).run.global_steps == STEP


@pytest.mark.parametrize("universal", [{"enabled": True}, ASYNC], ids=["in the foreground", "in the background"])
def test_the_next_save_removes_what_killed_ones_left(universal: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Hidden folders of saves in the background, and hidden files of both kinds, whatever kind of save comes next."""
    run = replace(RUN, universal=universal)
    ended = subprocess.Popen(["true"])
    ended.wait()
    mark = f"{PARTIAL_MARK}{socket.gethostname()}-{ended.pid}"
    (tmp_path / "a").mkdir()  # which a killed save in the background had made
    for folder in (tmp_path / f".a{mark}.0a", tmp_path / f".b{mark}.0b"):
        folder.mkdir()
        (folder / "mp_rank_00_model_states.pt").write_text("half")
        (folder / MARK_NAME).touch()
    ranks(1).run(save_and_wait, run, str(tmp_path), "a")
    for name in ("latest", "a/ucp_manifest.json", "a/ucp_checksums.jsonl", "a/ucp_unfinished.json"):
        path = tmp_path / name
        path.with_name(f".{path.name}{mark}.0c").write_text("half")
    ranks(1).run(save_and_wait, run, str(tmp_path), "a")
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    assert open_checkpoint(tmp_path).run.global_steps == STEP


def save_beside_another(run: Run, folder: str, how: str) -> str:
    """On a rank: save tag ``a`` while another job does; returns what is told."""
    engine, mark = trained(run, 1), Path(folder, "a", MARK_NAME)
    write = engine.checkpoint_engine.save

    def write_beside(state_dict: Any, path: str) -> Any:
        if dist.get_rank() == 0 and how == "its mark":
            mark.write_text(mark.read_text().replace(Mark.model_validate_json(mark.read_text()).save_id, "0" * 16))
        return write(state_dict, path)

    engine.checkpoint_engine.save = write_beside
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(folder, tag="a")
        ucp_deepspeed.wait_for_save()
    engine.checkpoint_engine.save = write
    engine.save_checkpoint(folder, tag="other")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "universal"), [("its lock", {"enabled": True}), ("its lock", ASYNC), ("its mark", {"enabled": True})]
)
def test_two_jobs_that_save_one_tag(how: str, universal: Any, ranks: Ranks, tmp_path: Path) -> None:
    """The second is refused, where the file system has locks. The first finds the second's mark, and describes no files of both:
    the manifest of one used to have sums of the other's files."""
    ranks(2).run(train, RUN, 2, save=str(tmp_path), save_tag="a")
    before, descriptor = contents(tmp_path), os.open(tmp_path / "a", os.O_RDONLY)
    if how == "its lock":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    told = ranks(2).run(save_beside_another, replace(RUN, universal=universal), str(tmp_path), how)
    os.close(descriptor)
    after = {name: content for name, content in contents(tmp_path).items() if not name.startswith("other")}
    if how == "its lock":
        assert all(f"another job is saving into {tmp_path / 'a'} just now" in text for text in told)
        assert after == before | {"latest": b"other"}
    else:
        assert all(f"another job has saved into {tmp_path / 'a'} at the same time" in text for text in told)
        with pytest.raises(DamagedCheckpointError, match=r"was not finished .*: tag='other'"):
            open_checkpoint(tmp_path, "a")
    assert open_checkpoint(tmp_path).run.global_steps == 1


def save_elsewhere(run: Run, folders: list[str | None], tags: list[str]) -> str:
    """On a rank: save into this rank's folder and tag, which others don't see; returns what is told."""
    rank, seconds = dist.get_rank(), tunables.VISIBLE_SECONDS
    with patch.dict(os.environ, LOCAL_RANK=str(rank)):
        engine = build_engine(run)
    train_step(engine, run, 1)
    try:
        tunables.VISIBLE_SECONDS = 0.2
        engine.save_checkpoint(folders[rank], tag=tags[rank])
        assert engine.load_checkpoint(folders[0], tag=tags[0])[0] is not None
    except UniversalCheckpointError as error:
        assert isinstance(error, SaveError)
        return str(error)
    finally:
        tunables.VISIBLE_SECONDS = seconds
        engine.destroy()
    return ""


LOCAL = {"checkpoint": {"use_node_local_storage": True}}


@pytest.mark.parametrize(
    ("run", "folders", "tags"),
    [
        (RUN, ["a", "b"], ["t", "t"]),
        (replace(RUN, zero={"stage": 3}), ["a", "a"], ["t", "u"]),
        (replace(RUN, config=LOCAL), ["a", "b"], ["t", "t"]),
    ],
    ids=["folders", "tags", "on one machine's own disk"],
)
def test_a_rank_that_saves_elsewhere(
    run: Run, folders: list[str], tags: list[str], ranks: Ranks, tmp_path: Path
) -> None:
    """The files used to scatter. Nothing is written, and what was there stays as it was, with the mark of a save before."""
    ranks(2).run(train, RUN, 1, save=str(tmp_path / "a"), save_tag="t")
    old = (tmp_path / "a" / "t" / MARK_NAME, tmp_path / "a" / "t" / "notes.txt")
    for path in old:
        path.write_text("{}")
    before = contents(tmp_path)
    own, other = ranks(2).run(save_elsewhere, run, [str(tmp_path / each) for each in folders], tags, timeout=60.0)
    place = tmp_path / folders[1] / tags[1]
    if tags[0] != tags[1]:
        assert own == other and own.endswith(f"ranks save different tags into {tmp_path / 'a'}: t, u")
    else:
        assert f"rank 1 saves into {place}, where it doesn't see" in other and "rank 1: rank 1 saves into" in own
        assert "give all ranks the same save_dir and tag" in other
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "folders", "kind"), [(0, ["a", "b"], ""), (1, ["a", ""], "rank 1 gives no save_dir, and others do")]
)
def test_ranks_that_write_nothing_may_name_any_folder(
    stage: int, folders: list[str], kind: str, ranks: Ranks, tmp_path: Path
) -> None:
    """As with DeepSpeed alone, where none is an error at every stage. The other ranks used to wait."""
    places = [folder and str(tmp_path / folder) for folder in folders]
    run = replace(RUN, zero={"stage": stage})
    for told in ranks(2).run(save_elsewhere, run, places, ["t", "t"], timeout=60.0):
        assert kind in told and bool(kind) == bool(told)
