"""Versions of files: what counts as another file, on file systems that keep inode numbers and on others."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from pathlib import Path

import pytest

from ucp_deepspeed.checkpoint import versions
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError


@pytest.fixture(params=["kept", "numbered anew"])
def inodes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that keeps inode numbers, or one that gives another at each look, as FUSE's may and CIFS's without
    ``serverino``."""
    if request.param != "kept":
        numbers, of_status = itertools.count(1), versions._version
        monkeypatch.setattr(versions, "_version", lambda status: of_status(status)._replace(inode=next(numbers)))
    return str(request.param)


def noted(path: Path) -> FileVersions:
    """Write a file, and note its version."""
    path.write_text("first")
    time.sleep(0.02)  # more than a tick of the clock of files
    found = FileVersions()
    found.note(path)
    return found


@pytest.mark.usefixtures("inodes")
def test_a_file_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    found = noted(path)
    found.note(path)
    with path.open("rb") as file:
        found.note(path, os.fstat(file.fileno()))
    found.check()
    found.note(tmp_path / "none")
    found.check()


def test_a_link_or_mode_is_no_change(tmp_path: Path) -> None:
    """As of a backup by links. Where inodes are numbered anew that can't be told from a copy."""
    path = tmp_path / "a"
    found = noted(path)
    os.link(path, tmp_path / "backup")
    path.chmod(0o400)
    found.check()


@pytest.mark.usefixtures("inodes")
@pytest.mark.parametrize("change", ["size", "time", "copy", "renamed", "gone", "folder"])
def test_a_file_that_changes(change: str, tmp_path: Path) -> None:
    """A copy has the size and the time of writing, as of ``cp -p``; ``renamed`` was there with these before the first look."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("first")
    other.write_text("other")
    shutil.copystat(path, other)
    time.sleep(0.02)
    found = noted(path)
    shutil.copystat(path, other)
    if change == "size":
        path.write_text("longer")
        os.utime(path, ns=(0, other.stat().st_mtime_ns))
    elif change == "time":
        path.write_text("again")
    elif change == "copy":
        shutil.copy2(other, tmp_path / "c")
        (tmp_path / "c").replace(path)
    elif change == "renamed":
        other.replace(path)
    else:
        path.unlink()
        if change == "folder":
            path.mkdir()
    with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
        found.check()


@pytest.mark.usefixtures("inodes")
def test_a_file_that_appears(tmp_path: Path) -> None:
    found = FileVersions()
    found.note(tmp_path / "a")
    (tmp_path / "a").write_text("new")
    with pytest.raises(DamagedCheckpointError):
        found.check()
    with pytest.raises(DamagedCheckpointError):
        found.note(tmp_path / "a")


def test_a_disk_that_fails_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system's stale handle tells of a file that was replaced."""
    (tmp_path / "a").write_text("a")
    found = FileVersions()
    found.note(tmp_path / "a")
    for number, told in ((errno.EIO, "a can't be read: Input/output error"), (errno.ESTALE, "a was changed while")):

        def fail(path: object, number: int = number, **settings: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr("ucp_deepspeed.checkpoint.versions.os.stat", fail)
            with pytest.raises(DamagedCheckpointError, match=told):
                found.check()
