"""One folder in the place of another."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ucp_deepspeed.checkpoint.universal import PARTIAL_MARK
from ucp_deepspeed.transfer import commit


def is_part(name: str) -> bool:
    return name.endswith(".pt")


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
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
    names = [f".step1{mark}{pid}" for pid in (ended.pid, os.getppid())] + [f".step1{PARTIAL_MARK}elsewhere-{ended.pid}"]
    for name in names:
        (tmp_path / name).mkdir()
    commit.remove_abandoned(tmp_path / "step2")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    commit.remove_abandoned(tmp_path / "step2", of_any_name=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
