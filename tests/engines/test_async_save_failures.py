"""Saving in the background when something fails: who learns of it, and what is left."""

from __future__ import annotations

import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
from async_saves import ASYNC, FILE_LIMIT, LARGE, Ranks, held_back, trained
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import FastCheckpointEngine, TorchCheckpointEngine

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.engine.saving import background, host_memory, marking, save, snapshot
from ucp_deepspeed.errors import ConfigError, SaveError, UniversalCheckpointError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError
from ucp_deepspeed.testing.runs import GLOBAL_BATCH, Run, train_step


def fail_once(run: Run, folder: str, failing: int, then: str) -> tuple[Any, str]:
    """A save that fails on one rank for want of space; what the next call raises, and what ``latest`` says then."""
    engine = trained(run, 1)
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    with held_back():
        engine.save_checkpoint(folder, tag="b")
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, unlimited[1]))
    found, calls = (
        None,
        {
            "save": lambda: engine.save_checkpoint(folder, tag="c"),
            "load": lambda: engine.load_checkpoint(folder),
            "wait": ucp_deepspeed.wait_for_save,
        },
    )
    try:
        calls[then]()
    except SaveError as error:
        found = error
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    latest = (Path(folder) / "latest").read_text()
    ucp_deepspeed.wait_for_save()  # told once
    engine.save_checkpoint(folder, tag="d")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return found, latest


@pytest.mark.parametrize(("failing", "then"), [(0, "save"), (1, "save"), (1, "load"), (0, "wait")])
def test_a_failure_surfaces_on_all_ranks_at_the_next_call(
    failing: int, then: str, ranks: Ranks, tmp_path: Path
) -> None:
    """As on a full disk: torch's writer would end the process (``std::terminate``)."""
    outcomes = ranks(2).run(fail_once, LARGE, str(tmp_path), failing, then)
    for rank, (error, latest) in enumerate(outcomes):
        assert "b could not be saved, and 'latest' was not moved: OSError: [Errno 27] File too large" in str(error)
        assert ("rank" in str(error).split(":")[0]) == (rank != failing)
        assert latest == "a"
    assert (tmp_path / "latest").read_text() == "d"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "d"}


def save_without_room(run: Run, folder: str, short: int) -> list[str]:
    """Return what three saves raise: a machine has too little memory, the system refuses it, and a copy fails otherwise."""
    engine, told = trained(run, 1), []
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    vars(engine)[background.BUFFERS] = snapshot.HostBuffers()
    with pytest.MonkeyPatch.context() as patch:
        for place, name, answer in (
            (host_memory, "free_numbytes", (1000, 0)),
            (host_memory.mmap, "mmap", OSError(12, "no")),
            (host_memory.HostMemory, "fill", RuntimeError("launch failure")),
        ):
            if dist.get_rank() == short:
                patch.setattr(place, name, _answering(answer))
            try:
                engine.save_checkpoint(folder, tag="b")
            except SaveError as error:
                told.append(str(error))
            patch.undo()
    engine.save_checkpoint(folder, tag="c")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return told


def _answering(answer: Any) -> Any:
    def called(*arguments: Any, **settings: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return called


def test_memory_that_is_short_is_told_on_all_ranks_before_anything_is_copied(
    ranks: Ranks, tmp_path: Path, device: str
) -> None:
    of_accelerators, others = ("0 bytes", "0.2 MB") if device == "cpu" else ("0.2 MB", "0 bytes")
    taken = f"snapshots take {of_accelerators} of host memory for tensors of accelerators, and {others} for others"
    for rank, (room, refused, other) in enumerate(ranks(2).run(save_without_room, LARGE, str(tmp_path), 1)):
        assert "has 1.0 kB of host memory left, and the snapshots of 2 ranks take" in room
        assert f"since memory is short; {taken}" in refused
        assert refused.startswith("rank 1: ") == other.startswith("rank 1: ") == (rank == 0)
        assert other.endswith("b can't be saved, and 'latest' was not moved: RuntimeError: launch failure")
    assert (tmp_path / "latest").read_text() == "c"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c"]


def save_what_cant_be_pickled(run: Run, folder: str) -> str:
    """On one rank only; DeepSpeed's barriers come after."""
    engine = trained(run, 1)
    with pytest.raises(Exception) as caught:
        engine.save_checkpoint(
            folder, client_state={"function": lambda: dist.get_rank()} if dist.get_rank() == 0 else {}
        )
    engine.save_checkpoint(folder)
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


def test_what_cant_be_pickled_is_refused_at_once_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, universal=ASYNC)
    for message in ranks(2).run(save_what_cant_be_pickled, run, str(tmp_path)):
        assert "lambda" in message
    assert open_checkpoint(tmp_path).run.global_steps == 1
    assert not [path for path in tmp_path.rglob(".*")]


def save_where_nothing_can_be(run: Run, folder: str) -> str:
    """Into a folder whose name a file has."""
    engine = trained(run, 0)
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(f"{folder}/file/run")
    assert type(engine.checkpoint_engine) is TorchCheckpointEngine
    engine.destroy()
    return str(caught.value)


def test_a_folder_that_cant_be_made(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in ranks(2).run(save_where_nothing_can_be, Run("mlp", universal=ASYNC), str(tmp_path)):
        assert "can't be saved, and 'latest' was not moved" in message


def save_in_vain(run: Run, folder: str, tags: list[str]) -> str:
    """On a rank: a save that fails while DeepSpeed's own ``save_checkpoint`` runs, or before; then one that doesn't."""
    engine = trained(run, 1)
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(folder, tag=tags[dist.get_rank()])
    if dist.get_rank() == 0:
        (Path(folder) / "zero_to_fp32.py").rmdir()
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["b", "b"], "can't be saved, and 'latest' was not moved: IsADirectoryError"),
        (["b", "c"], "ranks save different tags into"),
        (["file", "file"], "file is a file; save under another tag"),
    ],
    ids=["what DeepSpeed writes itself", "different tags", "tag that is a file"],
)
def test_what_fails_between_barriers_is_told_on_all_ranks(
    tags: list[str], message: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Rank 0 copies DeepSpeed's recovery scripts, which a full disk doesn't let it; the others used to wait for it."""
    (tmp_path / "zero_to_fp32.py").mkdir()
    (tmp_path / "file").write_text("")
    for found in ranks(2).run(save_in_vain, Run("mlp", universal=ASYNC), str(tmp_path), tags, timeout=60.0):
        assert message in found
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a"}


def save_into_what_goes(run: Run, root: str, what: str, how: str, late: int) -> tuple[str, float]:
    """Rename or remove the save's folder, or the tag's in it, while a rank still has its files to write; returns what was told,
    and the seconds until then."""
    engine, folder = trained(run, 0), Path(root) / "tmp-1"
    begun = time.monotonic()
    with held_back() as gate:
        engine.save_checkpoint(str(folder), tag="a")
        if dist.get_rank() != late:
            gate.set()
            vars(engine)[background.OWN].written.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            gone = folder / "a" if what == "tag" else folder
            shutil.rmtree(gone) if how == "removed" else gone.rename(gone.with_name("final"))
        dist.barrier()
        gate.set()
        with pytest.raises(SaveError) as caught:
            engine.save_checkpoint(f"{root}/next")
    engine.save_checkpoint(f"{root}/next")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value), time.monotonic() - begun


@pytest.mark.parametrize(
    ("what", "how", "late"),
    [("folder", "renamed", 0), ("folder", "renamed", 1), ("folder", "removed", 1), ("tag", "removed", 1)],
)
def test_a_folder_that_goes_while_it_is_written(what: str, how: str, late: int, ranks: Ranks, tmp_path: Path) -> None:
    """As Hugging Face's Trainer renamed ``tmp-checkpoint``: told at once on all ranks, and nothing is left, wherever it is."""
    told = ranks(2).run(save_into_what_goes, Run("mlp", universal=ASYNC), str(tmp_path), what, how, late)
    gone = tmp_path / "tmp-1" / ("a" if what == "tag" else "")
    for message, seconds in told:
        assert (
            f"{tmp_path}/tmp-1/a could not be saved, and 'latest' was not moved: {gone} was renamed or removed"
            in message
        )
        assert "call ucp_deepspeed.wait_for_save() before" in message and seconds < 20
    assert not [path for path in tmp_path.rglob("*") if path.name == "a" or path.name.startswith(".")]
    assert open_checkpoint(tmp_path / "next").run.global_steps == 0


def save_two_engines(run: Run, root: str, failing: int) -> dict[str, Any]:
    """The first engine's save fails on one rank, while the second saves and loads; then both into one folder."""
    first, found = trained(run, 0), dict[str, Any]()
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "universal_checkpoint": ASYNC,
    }
    second, *_ = deepspeed.initialize(model=build_mlp(), config=config)
    train_step(second, run, 1)
    with held_back():
        first.save_checkpoint(f"{root}/first", tag="t")
        second.save_checkpoint(f"{root}/second", tag="t")
        found["waiting"] = [vars(each)[background.OWN].is_alive() for each in (first, second)]
        if dist.get_rank() == failing:
            shutil.rmtree(next(Path(f"{root}/first").glob(".t.partial*")))
        dist.barrier()
    second.save_checkpoint(f"{root}/second", tag="u")
    second.load_checkpoint(f"{root}/second")
    found["steps"] = second.global_steps
    try:
        first.save_checkpoint(f"{root}/first", tag="u")
    except SaveError as error:
        found["first"] = str(error)
    for number, engine in enumerate((first, second)):
        engine.save_checkpoint(f"{root}/both", tag=str(number))
    ucp_deepspeed.wait_for_save()
    found["both"] = (Path(root) / "both" / "latest").read_text()
    for engine in (first, second):
        engine.destroy()
    return found


@pytest.mark.parametrize("failing", [0, 1])
def test_each_engine_has_a_save_of_its_own(failing: int, ranks: Ranks, tmp_path: Path) -> None:
    """One engine's failure is told to it, with its folder, and neither keeps the other from saving."""
    run = Run("mlp", universal=ASYNC)
    for found in ranks(2).run(save_two_engines, run, str(tmp_path), failing):
        assert found["waiting"] == [True, True] and found["steps"] == 1
        assert f"{tmp_path}/first/t could not be saved" in found["first"]
        assert found["both"] == "1"
    assert open_checkpoint(tmp_path / "second").path.name == "u"
    assert not (tmp_path / "first" / "latest").exists()
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_node_local_storage": True},
            "needs a folder that all ranks see, and 'checkpoint.use_node_local_storage'",
        ),
        ({"checkpoint_serialization": False}, "'checkpoint.checkpoint_serialization' turns it off"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str, ranks: Ranks) -> None:
    run = Run("mlp", universal=ASYNC, config={"checkpoint": settings})
    with pytest.raises(RankError, match=message) as caught:
        ranks(2).run(trained, run, 0)
    assert isinstance(caught.value.original, ConfigError)


def test_another_checkpoint_engine_is_refused() -> None:
    """DeepSpeed builds it only under its launcher."""
    native = FastCheckpointEngine.__new__(FastCheckpointEngine)
    with pytest.raises(ConfigError, match=r"FastCheckpointEngine.* exclude one another"):
        background.check_background(SimpleNamespace(checkpoint_engine=native))


def save_where_rank_1_sees_nothing(run: Run, folder: str) -> str:
    """Save to a folder that rank 1 doesn't see; returns what a rank is told."""
    engine = trained(run, 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(save, "is_seen", lambda partial, tells: False)
        with pytest.raises(SaveError) as caught:
            engine.save_checkpoint(folder)
    return str(caught.value)


def test_a_folder_that_another_node_does_not_see(ranks: Ranks, tmp_path: Path) -> None:
    told = ranks(2).run(save_where_rank_1_sees_nothing, Run("mlp", universal=ASYNC), str(tmp_path))
    assert all("isn't the same folder on all ranks: rank 1 doesn't see what rank 0 made" in each for each in told)
    assert list(tmp_path.iterdir()) == []


def save_when_a_thread_cant_start(run: Run, folder: str) -> str:
    """On rank 1 the first save's can't; returns what that rank was told."""
    engine = trained(run, 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
        with pytest.raises(UniversalCheckpointError if dist.get_rank() == 0 else RuntimeError) as caught:
            engine.save_checkpoint(folder, tag="a")
    engine.save_checkpoint(folder, tag="b")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


def test_all_ranks_write_or_none(ranks: Ranks, tmp_path: Path) -> None:
    told = ranks(2).run(save_when_a_thread_cant_start, Run("mlp", universal=ASYNC), str(tmp_path))
    assert all("no thread" in text for text in told)
    assert open_checkpoint(tmp_path).path.name == "b" and not (tmp_path / "a").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_log_that_cant_be_written_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background.logger, "error", lambda *_: 1 / 0)
    job = background.Job(tmp_path / "gone", tmp_path / "a", (), {"x": ""}, lambda: None, 1, 2, timeout=1.0)
    writing = background.Writing(job)
    writing.start()
    assert writing.written.wait(10) and "renamed or removed" in str(writing.own_error)
    writing.join()


def test_rank_0_gives_up_on_a_rank_that_never_ends(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    writing = background.Writing(
        background.Job(partial, tmp_path / "a", (), {}, lambda: pytest.fail("committed"), 0, 2, timeout=0.05)
    )
    writing.start()
    writing.join()
    assert "ranks [1] didn't write their files" in str(writing.error)


def save_while_a_call_fails(run: Run, folder: str, failing: int) -> str:
    """On a rank: a call of the system fails on one of them, outside of DeepSpeed's own save."""
    engine = trained(run, 0)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == failing:
            patch.setattr(Path, "is_symlink", _answering(OSError(5, "no luck")))
            patch.setattr(marking, "flush", _answering(OSError(5, "no luck")))
        with pytest.raises(SaveError) as caught:
            engine.save_checkpoint(folder, tag="a")
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize(("asynchronous", "failing"), [(True, 1), (False, 0)])
def test_a_call_that_fails_is_told_on_all_ranks(asynchronous: bool, failing: int, ranks: Ranks, tmp_path: Path) -> None:
    """The others waited for ever, or one rank raised a bare OSError."""
    run = Run("mlp", universal=ASYNC if asynchronous else {"enabled": True})
    for message in ranks(2).run(save_while_a_call_fails, run, str(tmp_path), failing, timeout=60.0):
        assert message.startswith(f"{tmp_path}/a can't be saved: ") and "OSError: [Errno 5] no luck" in message
    assert open_checkpoint(tmp_path).run.global_steps == 0
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tag_that_latest_cant_name(asynchronous: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resume by ``latest`` found nothing. One that names the tag finds it, also without the package."""
    with pytest.raises(SaveError, match="'latest' can't name the tag"):
        save._check_tag(str(tmp_path), "\udc80", asynchronous, save_latest=True)
    for tag in ("a ", "\ta", "a\n"):
        save._check_tag(str(tmp_path), tag, asynchronous, save_latest=False)
        assert not caplog.records
        save._check_tag(str(tmp_path), tag, asynchronous, save_latest=True)
        assert f"a load has to name {tag!r} itself" in caplog.text
        caplog.clear()


def test_a_mark_that_cant_be_read_is_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an odd umask: the advice was to give all ranks the same folder, after two minutes."""
    monkeypatch.setattr(Path, "read_text", _answering(PermissionError(13, "no")))
    with pytest.raises(PermissionError):
        marking._has(tmp_path / "mark", "id")


def save_while_calls_fail_in_the_background(run: Run, folder: str, failing: int) -> str:
    """On a rank: the thread can't write, and can't look whether the folder is there."""
    engine, is_dir = trained(run, 0), Path.is_dir

    def refused(self: Path) -> bool:
        if threading.current_thread() is not threading.main_thread() and ".partial" in self.name:
            raise PermissionError(13, "no")
        return is_dir(self)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == failing:
            patch.setattr(Path, "is_dir", refused)
            patch.setattr(snapshot.FileSnapshot, "write", _answering(PermissionError(13, "no")))
        engine.save_checkpoint(folder, tag="a")
        with pytest.raises(SaveError) as caught:
            ucp_deepspeed.wait_for_save()
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_calls_that_fail_in_the_background_are_told_on_all_ranks(failing: int, ranks: Ranks, tmp_path: Path) -> None:
    """The thread ended with an error of its own, and rank 0 waited for it for half an hour."""
    run = Run("mlp", universal=ASYNC)
    for message in ranks(2).run(save_while_calls_fail_in_the_background, run, str(tmp_path), failing, timeout=60.0):
        assert "a could not be saved, and 'latest' was not moved: PermissionError: [Errno 13] no" in message
    assert open_checkpoint(tmp_path).run.global_steps == 0
