"""Errors of the system become errors of the package that name the file and the cause."""

from __future__ import annotations

import errno
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import digest_of
from ucp_deepspeed.checkpoint.tags import tags_in, whole_tags
from ucp_deepspeed.checkpoint.torch_files.damage import telling_damage
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    SaveError,
    UniversalCheckpointError,
    system_errors_as,
    why_not_read,
)
from ucp_deepspeed.transfer.commit import flush, make_partial_folder, remove_partial_folder, replace_text
from ucp_deepspeed.transfer.open_files import OpenFile
from ucp_deepspeed.transfer.writing import _Output


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EIO, "no luck", "a"), "x can't be saved: OSError: [Errno 5] no luck: 'a'"),
        (MemoryError(), "x can't be saved: MemoryError: "),
        (RuntimeError("can't start new thread"), "x can't be saved: RuntimeError: can't start new thread"),
        (UniversalCheckpointError("rank 1: OSError: no"), "x can't be saved: rank 1: OSError: no"),
        (SaveError("it was told already"), "it was told already"),
    ],
)
def test_errors_of_the_system(error: Exception, told: str) -> None:
    with pytest.raises(SaveError) as caught, system_errors_as(SaveError, "x can't be saved"):
        raise error
    assert str(caught.value) == told


def test_faults_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a fault"), system_errors_as(SaveError, ""):
        raise RuntimeError("a fault")


@contextmanager
def size_limited(numbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (numbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_errors_of_writes_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "atoms"
    path.touch()
    output = _Output(path)
    with size_limited(100), pytest.raises(OSError, match=f"too large: '{path}'"):
        output.write(memoryview(bytes(1000)), 0)
    output.close()
    with size_limited(2), pytest.raises(OSError, match=f"too large: '{tmp_path}/latest'"):
        replace_text(tmp_path / "latest", "step1")
    with pytest.raises(OSError, match="'/proc/self/status'"):  # of a kind that can't be flushed
        flush(Path("/proc/self/status"))


def _failing_reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let reads of a file fail as on a broken disk, from now on."""
    opened = Path.open

    def open_it(self: Path, *args: object, **kwargs: object) -> object:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opened(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", open_it)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile says that a file whose end can't be read is no archive; the advice was to remove the manifest."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3)}, path)
    digest = digest_of(path)
    assert digest is not None and why_not_read(path, zipfile.BadZipFile()) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert digest_of(path) is None
    _failing_reads(monkeypatch, path)
    with pytest.raises(OSError, match="Input/output error"):
        digest_of(path)
    with pytest.raises(DamagedCheckpointError, match=r"x\.pt can't be read: Input/output error"), telling_damage(path):
        raise zipfile.BadZipFile("File is not a zip file")


def test_tags_that_cant_be_read_hide_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages list other tags, and were replaced by a bare PermissionError."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mp_rank_00_model_states.pt").touch()
    is_file = Path.is_file

    def refused(self: Path) -> bool:
        if self.parent == tmp_path / "a":
            raise PermissionError(errno.EACCES, "no")
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert tags_in(tmp_path) == whole_tags(tmp_path) == ["b"]
    assert tags_in(tmp_path / "nowhere") == []


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_that_is_cut_while_it_is_read(mapped: bool, tmp_path: Path) -> None:
    """The system ended the process when a map's page was gone."""
    path = tmp_path / "x"
    path.write_bytes(bytes(range(200)) * 100)
    file = OpenFile(str(path), mapped)
    assert file.range(0, 20_000)[300] == 100 and file.is_mapped == mapped
    os.truncate(path, 5000)
    with pytest.raises(DamagedCheckpointError, match="x became shorter while it was read: 20000 bytes were expected"):
        file.range(10_000, 20_000)
    assert file.range(100, 200)[0] == 100
    file.close()


def test_a_folder_that_cant_be_closed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal after a failure raised an error of its own: a bad file descriptor."""
    folder = tmp_path / "a"
    folder.mkdir()

    def fail(descriptor: int) -> None:
        closed(descriptor)
        raise OSError(errno.EIO, "no luck")

    closed = os.close
    monkeypatch.setattr("shutil.os.close", fail)
    remove_partial_folder(folder)


def test_a_reader_that_cant_close_goes_on(tmp_path: Path) -> None:
    """A rank raised it alone, and the others waited for ever."""
    (tmp_path / "x").write_bytes(b"x")
    file = OpenFile(str(tmp_path / "x"), mapped=False)
    os.close(file._descriptor)
    file.close()


def test_a_tag_that_cant_be_looked_at_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message listed the tag among those that are there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").write_text("a")
    is_dir = Path.is_dir

    def refused(self: Path) -> bool:
        if self.name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(DamagedCheckpointError, match="a can't be read: Permission denied"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no tag"):
        open_checkpoint(tmp_path, "a" * 300)


def test_a_folder_that_cant_be_looked_for_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted as written until the process ended."""
    partial = make_partial_folder(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", _raising(errno.ESTALE))
        patch.setattr("shutil.rmtree", _raising(errno.ESTALE))
        remove_partial_folder(partial)
    assert partial.is_dir()
    other = make_partial_folder(tmp_path / "b")
    assert not partial.is_dir()
    remove_partial_folder(other)


def _raising(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
