"""One folder in the place of another."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK, REPLACED_MARK
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.transfer import commit


def is_part(name: str) -> bool:
    return name.endswith(".pt")


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def ours(folder: Path, **files: str) -> Path:
    """A folder that a process of the package's has left half-written."""
    (make(folder, **files) / MARK_NAME).touch()
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_in_the_place_of_none_or_an_empty_one(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "a").mkdir()
    commit.replace_folder(make(tmp_path / ".a", x_pt="1"), tmp_path / "a", is_part)
    assert read(tmp_path / "a") == {"x.pt": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_in_the_place_of_another(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With folders that change names in one step, and on file systems that can't."""
    if not exchanges:
        monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
        monkeypatch.setattr(commit.ctypes, "get_errno", lambda: errno.EINVAL)
    old = make(tmp_path / "a", x_pt="old", y_pt="old", notes_txt="mine")
    make(old / "logs", b_log="1")
    with (old / "notes.txt").open("a") as still_open:
        commit.replace_folder(make(tmp_path / ".a", x_pt="new", z_pt="new"), old, is_part)
        still_open.write(" and more")
    assert read(tmp_path / "a") == {"x.pt": "new", "z.pt": "new", "notes.txt": "mine and more"}
    assert read(tmp_path / "a" / "logs") == {"b.log": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_replaced_and_stays_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commit.shutil, "rmtree", lambda *_, **__: None)
    commit.replace_folder(make(tmp_path / ".a", x_pt="new"), make(tmp_path / "a", x_pt="old"), is_part)
    assert read(tmp_path / "a") == {"x.pt": "new"} and f"it is in {tmp_path / '.a'}" in caplog.text


def test_an_exchange_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EACCES)
    old = make(tmp_path / "a", x_pt="old")
    with pytest.raises(PermissionError):
        commit.replace_folder(make(tmp_path / ".a", x_pt="new"), old, is_part)
    assert read(old) == {"x.pt": "old"}


def test_what_a_killed_run_left_of_another_tag(tmp_path: Path) -> None:
    """Its next save is of another tag; what other processes are writing stays."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    mark = f"{PARTIAL_MARK}{socket.gethostname()}-"
    names = [
        f".step1{mark}{pid}" for pid in (ended.pid, f"{ended.pid}.0a1b2c3d", os.getppid(), f"{os.getppid()}.0a1b2c3d")
    ]
    names += [f".step1{PARTIAL_MARK}elsewhere-{ended.pid}", f".step1{mark}0.7-{ended.pid}.0a1b2c3d"]  # of other hosts
    for name in names:
        (tmp_path / name).mkdir()
    commit.remove_abandoned(tmp_path / "step2")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    commit.remove_abandoned(tmp_path / "step2", of_any_name=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])


def test_no_hidden_path_comes_twice(tmp_path: Path) -> None:
    """A machine that still knows the last save's entry would write into the folder that was committed."""
    folders = []
    for _ in range(2):
        folders.append(commit.make_partial_folder(tmp_path / "a"))
        commit.replace_folder(folders[-1], tmp_path / "a", is_part)
    assert len({*folders, *(commit._partial_path(tmp_path / "latest") for _ in range(2))}) == 4


def test_a_folder_that_is_seen_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The time is told once, and only if it is long; also the folder around it may be new."""
    folder = tmp_path / "runs" / ".a"
    caplog.set_level("INFO", "ucp_deepspeed")
    monkeypatch.setattr(tunables, "TOLD_SECONDS", 0.05)
    timer = threading.Timer(0.3, folder.mkdir, kwargs={"parents": True})
    timer.start()
    assert commit.is_seen(folder)
    timer.join()
    [line] = caplog.messages
    assert line.startswith(
        f"waiting until {folder}, which rank 0 has made, is seen on {socket.gethostname()}, for at most 120 s"
    )
    assert commit.is_seen(folder) and len(caplog.messages) == 1
    monkeypatch.setattr(tunables, "VISIBLE_SECONDS", 0.1)
    assert not commit.is_seen(tmp_path / "never", tells=False) and len(caplog.messages) == 1


def test_links_stay_links(tmp_path: Path) -> None:
    old = make(tmp_path / "a", x_pt="old")
    links = {"up": "..", "gone": "nowhere", "file": "../../etc/hostname"}
    for name, target in links.items():
        (old / name).symlink_to(target)
    commit.replace_folder(make(tmp_path / ".a", x_pt="new"), old, is_part)
    assert {name: str((tmp_path / "a" / name).readlink()) for name in links} == links
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cant_be_taken_along_at_the_end_undoes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, calls = commit._take_along, iter((True, False))

    def once(*arguments: Any) -> None:
        if not next(calls):
            raise OSError(errno.EIO, "failed")
        take(*arguments)

    monkeypatch.setattr(commit, "_take_along", once)
    commit.replace_folder(make(tmp_path / ".a", x_pt="new"), make(tmp_path / "a", x_pt="old"), is_part)
    assert read(tmp_path / "a") == {"x.pt": "new"}


def abandoned(folder: Path, name: str, mark: str = "") -> Path:
    """A folder of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return folder / f".{name}{PARTIAL_MARK}{socket.gethostname()}-{ended.pid}{mark}"


def test_what_is_held_is_not_abandoned(tmp_path: Path) -> None:
    """In a container with this host's name a process may write whose id is nobody's here, or even ours."""
    for folder in (abandoned(tmp_path, "a"), commit._partial_path(tmp_path / "a")):
        ours(folder, x_pt="half")
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        commit.remove_abandoned(tmp_path / "a")
        with pytest.raises(ConfigError, match="another process is writing"), commit.committed_folder(tmp_path / "a"):
            pass
        commit.remove_partial_folder(commit.make_partial_folder(tmp_path / "other"))
        assert read(folder) == {"x.pt": "half", MARK_NAME: ""}
        os.close(held)
        commit.remove_abandoned(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


def test_what_this_process_makes_is_held_until_it_is_done(tmp_path: Path) -> None:
    with commit.committed_folder(tmp_path / "a") as folder:
        assert commit._is_written(folder, os.getpid())
    with pytest.raises(ZeroDivisionError), commit.committed_folder(tmp_path / "b") as folder:
        raise ZeroDivisionError
    commit.replace_folder(commit.make_partial_folder(tmp_path / "a"), tmp_path / "a", is_part)
    assert commit._holding == {} and not commit._is_written(tmp_path / "a", os.getpid())


def test_of_writers_that_start_together_one_goes_on(tmp_path: Path) -> None:
    """Processes, and threads of one."""

    def write(_: int) -> str:
        try:
            with commit.committed_folder(tmp_path / "a") as folder:
                everybody.wait()
                (folder / "x.pt").write_text("whole")
        except ConfigError as error:
            everybody.wait()
            return str(error)
        return "written"

    everybody = threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        refused, written = sorted(pool.map(write, range(2)))
    assert "another process is writing" in refused and written == "written"
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and read(tmp_path / "a") == {"x.pt": "whole"}

    context = multiprocessing.get_context("fork")
    both, outcomes = context.Barrier(2, timeout=30), context.Queue()
    started = [context.Process(target=_written_by_a_process, args=(tmp_path / "b", both, outcomes)) for _ in range(2)]
    for process in started:
        process.start()
    assert sorted(outcomes.get(timeout=30) for _ in started) == ["refused", "written"]
    for process in started:
        process.join()
    assert read(tmp_path / "b") == {"x.pt": "whole"}


def _written_by_a_process(final: Path, both: Any, outcomes: Any) -> None:
    try:
        with commit.committed_folder(final) as folder:
            both.wait()
            (folder / "x.pt").write_text("whole")
    except ConfigError:
        both.wait()
        outcomes.put("refused")
    else:
        outcomes.put("written")


def test_without_locks_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "none here")

    monkeypatch.setattr(commit.fcntl, "flock", flock)
    make(abandoned(tmp_path, "a"))
    with commit.committed_folder(tmp_path / "a") as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        commit.remove_abandoned(tmp_path / "a")
        with pytest.raises(ConfigError, match="another process"), commit.committed_folder(tmp_path / "a"):
            pass
    make(tmp_path / f".b{PARTIAL_MARK}{socket.gethostname()}-{os.getppid()}")
    with pytest.raises(ConfigError, match="another process"), commit.committed_folder(tmp_path / "b"):
        pass


def test_a_forked_child_holds_nothing(tmp_path: Path) -> None:
    with commit.committed_folder(tmp_path / "a") as folder:
        child = os.fork()
        if child == 0:
            os._exit(len(commit._holding) + 2 * (not commit._is_written(folder, os.getpid())))
        assert os.waitpid(child, 0)[1] == 0
        assert commit._is_written(folder, os.getpid())


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_process_killed_between_two_renames_has_lost_nothing(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next writer brings its old folder back, unless there is one of that name: then that counts, and of this machine's
    processes the old one goes."""
    monkeypatch.setattr(tunables, "REPLACING_SECONDS", 0.0)
    for name in "ab":
        hidden = make(abandoned(tmp_path, name, REPLACED_MARK), x_pt="old")
        (hidden / MANIFEST_NAME).write_text("old")
        hidden.rename(tmp_path / hidden.name.replace(socket.gethostname(), host))
    make(tmp_path / "b", x_pt="new")
    commit.remove_partial_folder(commit.make_partial_folder(tmp_path / "c"))
    found = sorted(path.name for path in tmp_path.iterdir() if host != "elsewhere" or not path.name.startswith(".b"))
    assert found == ["a", "b"]
    assert read(tmp_path / "a") == {"x.pt": "old", MANIFEST_NAME: "old"}
    assert read(tmp_path / "b") == {"x.pt": "new"}


def test_a_second_rename_that_fails_undoes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(commit.ctypes, "get_errno", lambda: errno.EINVAL)
    rename = Path.rename

    def failing(path: Path, to: Path) -> Path:
        if path.name == ".a" and not to.exists():
            raise OSError(errno.ESTALE, "failed")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="failed"):
        commit.replace_folder(make(tmp_path / ".a", x_pt="new"), make(tmp_path / "a", x_pt="old"), is_part)
    assert read(tmp_path / "a") == {"x.pt": "old"}


def test_what_cant_be_removed_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(abandoned(tmp_path, "a"))
    monkeypatch.setattr(commit.shutil, "rmtree", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    commit.remove_abandoned(tmp_path / "a")


def test_whoever_sees_a_text_may_rename_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = make(tmp_path / "a"), Path.replace

    def renamed_at_once(path: Path, to: Path) -> Path:
        found = replace(path, to)
        folder.rename(tmp_path / "b")
        return found

    monkeypatch.setattr(Path, "replace", renamed_at_once)
    commit.replace_text(folder / "x", "text")
    assert (tmp_path / "b" / "x").read_text() == "text"


def test_only_what_looks_like_ours_is_removed(tmp_path: Path) -> None:
    """Anybody can give a folder such a name. One without a tag's name in it led to the folder around it."""
    folder = tmp_path / "run"
    folder.mkdir()
    nameless = [abandoned(folder, name) for name in ("", ".")]
    theirs, link = make(abandoned(folder, "a"), notes_txt="mine", x_pt="my features"), abandoned(folder, "b")
    target = make(tmp_path / "c", x_pt="theirs")
    link.symlink_to(target)
    for name in nameless:
        name.mkdir()
    commit.remove_abandoned(folder / "a", of_any_name=True)
    assert read(theirs) == {"notes.txt": "mine", "x.pt": "my features"} and read(target) == {"x.pt": "theirs"}
    assert sorted(folder.iterdir()) == sorted([*nameless, theirs, link])
    ours(abandoned(folder, "d"), x_pt="half")
    make(abandoned(folder, "e"))
    commit.remove_abandoned(folder / "a", of_any_name=True)
    assert sorted(folder.iterdir()) == sorted([*nameless, theirs, link])


def test_files_that_killed_processes_were_writing(tmp_path: Path) -> None:
    """Another process's is held by a lock; a link and files of other names aren't ours."""
    left = [abandoned(tmp_path, name, ".0a") for name in ("latest", "ucp_manifest.json", "ucp_checksums.jsonl")]
    held, theirs = abandoned(tmp_path, "latest", ".0b"), abandoned(tmp_path, "notes.txt", ".0c")
    for path in (*left, held, theirs):
        path.write_text("half")
    (link := abandoned(tmp_path, "latest", ".0d")).symlink_to("notes")
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        commit.write_atomically(tmp_path / "latest", "a")
        assert sorted(tmp_path.iterdir()) == sorted([held, theirs, link, tmp_path / "latest"])
    commit.write_atomically(tmp_path / "latest", "b")
    assert sorted(tmp_path.iterdir()) == sorted([theirs, link, tmp_path / "latest"])


def test_a_file_that_is_written_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, seen = Path.replace, list[bool]()

    def looked_at(path: Path, to: Path) -> Path:
        seen.append(commit._is_written(path, os.getpid()))
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", looked_at)
    commit.write_atomically(tmp_path / "latest", "a")
    assert seen == [True] and (tmp_path / "latest").read_text() == "a"


def test_what_killed_saves_were_writing_is_not_taken_along(tmp_path: Path) -> None:
    old = make(tmp_path / "a", x_pt="old")
    for name in ("ucp_manifest.json", "ucp_unfinished.json"):
        abandoned(old, name, ".0a").write_text("half")
    commit.replace_folder(make(tmp_path / ".a", x_pt="new"), old, is_part)
    assert read(old) == {"x.pt": "new"}


def test_a_removal_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With somebody's files in the folder, these could be all that was left, and nothing showed that the folder is ours."""
    left = ours(abandoned(tmp_path, "a"), x_pt="half", notes_txt="theirs")
    make(left / "logs", b_log="1")

    def unlucky(path: Path) -> None:
        for file in path.glob("ucp_*"):
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", unlucky)
    with pytest.raises(KeyboardInterrupt):
        commit.remove_abandoned(tmp_path / "a")
    monkeypatch.undo()
    commit.remove_abandoned(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_removal_during_which_another_process_writes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of another rank was all that was left, and nothing showed that the folder is ours."""
    folder, rmtree = ours(abandoned(tmp_path, "a"), x_pt="half"), shutil.rmtree

    def late(path: Path, **kwargs: Any) -> None:
        (path / MARK_NAME).unlink()
        (path / "y.pt").write_text("half")

    monkeypatch.setattr(shutil, "rmtree", late)
    commit.remove_partial_folder(folder)
    assert read(folder) == {"y.pt": "half", MARK_NAME: ""}
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    commit.remove_abandoned(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_made_when_the_signal_comes_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt), commit.committed_folder(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_file_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written through a link that lies there; the mode is that of other files."""
    (tmp_path / "precious").write_text("theirs")
    taken = tmp_path / ".latest.partial"
    monkeypatch.setattr(commit, "_partial_path", lambda path: taken)
    taken.symlink_to("precious")
    with pytest.raises(FileExistsError):
        commit.write_atomically(tmp_path / "latest", "text")
    assert (tmp_path / "precious").read_text() == "theirs"
    taken.unlink(missing_ok=True)
    before = os.umask(0o027)
    try:
        commit.write_atomically(tmp_path / "latest", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "latest").stat().st_mode & 0o777 == 0o640
