"""Single files that are cut, foreign or no files at all: refused, with the file's name and the reason."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FIRST, LAST, MODEL, ZERO_2, edit, read_all, refused
from native_models import SHAPES, write_manifest

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.torch_files.archives import content_start
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError


@pytest.mark.parametrize("name", [MODEL, FIRST, LAST])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99, -1])
def test_cut_file(folder: Path, name: str, keep: float) -> None:
    """Wherever a file was cut off, it is refused by name."""
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if 0 < keep < 1 else int(keep) if keep >= 0 else size - 1)
    refused(folder, DamagedCheckpointError, name)


def test_a_cut_file_is_called_truncated(folder: Path) -> None:
    os.truncate(folder / LAST, 500)
    refused(folder, DamagedCheckpointError, LAST, "truncated (500 bytes)")


def test_manifest_knows_the_size(folder: Path) -> None:
    """A file that is whole by itself but not the one that was committed."""
    write_manifest(folder, ZERO_2, (tuple(SHAPES),))
    size = (folder / LAST).stat().st_size
    edit(folder / LAST, lambda saved: saved.update(more=list(range(500))))
    found = (folder / LAST).stat().st_size
    assert found > size
    refused(folder, DamagedCheckpointError, LAST, "isn't the file that", f"{size} bytes then, {found} now")
    os.truncate(folder / LAST, size - 10)
    refused(folder, DamagedCheckpointError, LAST, f"truncated: expected {size} bytes, found {size - 10}")


class WritesAFile:
    """Pickles as a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


class Foreign:
    """Any class of the user's."""


@pytest.mark.parametrize("name", [MODEL, FIRST, LAST])
def test_foreign_code_is_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "code-was-run"
    edit(folder / name, lambda saved: saved.update(mine=WritesAFile(mark)))
    if name == MODEL:  # in the client state, which is left out
        assert open_checkpoint(folder).unreadable() == {"mine": "pathlib.Path.touch"}
        assert "mine" not in open_checkpoint(folder).client_state()[1]
        edit(folder / name, lambda saved: saved.update(lr_scheduler=WritesAFile(mark)))
        mark.unlink()  # `edit` has loaded it
    refused(folder, DamagedCheckpointError, name, "refused")
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()


def test_foreign_class_is_named(folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved.update(lr_scheduler=Foreign()))
    refused(folder, DamagedCheckpointError, MODEL, f"{__name__}.Foreign", "add_safe_globals([Foreign])")


def in_older_format(path: Path) -> bytes:
    """Save a file anew, in torch's format from before its zip archives."""
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [1, 20, 100, 1000, -1])
@pytest.mark.parametrize("name", [MODEL, LAST])
def test_cut_in_the_older_format(name: str, kept: int, folder: Path) -> None:
    whole = in_older_format(folder / name)
    (folder / name).write_bytes(whole[:kept])
    refused(folder, DamagedCheckpointError, name, "can't be read")


@pytest.mark.parametrize(
    ("held", "put", "reason"),
    [
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00another", "isn't a storage"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03.", "begins with"),
    ],
)
def test_another_than_the_older_format(held: bytes, put: bytes, reason: str, folder: Path) -> None:
    whole = in_older_format(folder / MODEL)
    assert held in whole
    (folder / MODEL).write_bytes(whole.replace(held, put))
    refused(folder, DamagedCheckpointError, MODEL, "can't be read", reason)


def test_code_in_the_older_format(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    saved = torch.load(folder / MODEL, weights_only=False)
    saved["lr_scheduler"] = WritesAFile(mark)
    torch.save(saved, folder / MODEL, _use_new_zipfile_serialization=False)
    refused(folder, DamagedCheckpointError, MODEL, "refused")
    assert not mark.exists()


@pytest.mark.parametrize(("content", "kind"), [(b"", "empty"), (b"hello", "not a torch file")])
def test_not_a_torch_file(folder: Path, content: bytes, kind: str) -> None:
    (folder / LAST).write_bytes(content)
    refused(folder, DamagedCheckpointError, LAST, f"{kind} ({len(content)} bytes)")


def test_not_a_dictionary(folder: Path) -> None:
    torch.save([1, 2], folder / MODEL)
    refused(folder, DamagedCheckpointError, MODEL, "holds a list")


def test_another_zip_file(folder: Path) -> None:
    with zipfile.ZipFile(folder / LAST, "w") as archive:
        archive.writestr("a.txt", "a")
    refused(folder, DamagedCheckpointError, LAST)


def test_an_archive_with_an_empty_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / MODEL) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / MODEL, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"" if name.endswith("data.pkl") else content)
    refused(folder, DamagedCheckpointError, MODEL)


@pytest.mark.parametrize("name", [MODEL, LAST, MANIFEST_NAME])
@pytest.mark.parametrize("kind", ["a device", "a pipe", "a folder"])
def test_what_is_no_file_is_not_read(kind: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(folder, DamagedCheckpointError, f"{name} is {kind}, not a file")
    if name == LAST:
        with pytest.raises(DamagedCheckpointError, match=f"{name} is {kind}"):
            open_checkpoint(folder).check_sizes()


def test_what_lies_in_the_place_of_a_file(folder: Path) -> None:
    """A pointer that nobody has followed, and an archive behind something else."""
    path = folder / LAST
    whole = path.read_bytes()
    path.write_bytes(b"\n" + whole)
    refused(folder, DamagedCheckpointError, LAST, "is not a torch file")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(folder, DamagedCheckpointError, LAST, 'a pointer to a file, which "git lfs pull" would fetch')


def rewrite(path: Path, how: int, change: Callable[[str, bytes], bytes] = lambda name, content: content) -> None:
    """Write an archive anew, as other programs than torch do; ``change``: of each record, by its name."""
    with zipfile.ZipFile(path) as file:
        records = [(record.filename, file.read(record)) for record in file.infolist()]
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in records:
            file.writestr(name, change(name.partition("/")[2], content))


def swapped(name: str, content: bytes) -> bytes:
    return b"big" if name == "byteorder" else content


@pytest.mark.parametrize(
    ("name", "how", "change", "told"),
    [
        (MODEL, zipfile.ZIP_DEFLATED, None, "is compressed, which torch doesn't do"),
        (LAST, zipfile.ZIP_DEFLATED, None, "is compressed, which torch doesn't do"),
        (LAST, zipfile.ZIP_STORED, None, "was written anew by another program than torch"),
        (MODEL, zipfile.ZIP_STORED, swapped, "was written on a machine of the other byte order"),
    ],
    ids=["compressed weights", "compressed states", "stored", "byte order"],
)
def test_an_archive_that_torch_did_not_lay_out(name: str, how: int, change: Any, told: str, folder: Path) -> None:
    """torch looks where its own archives would have the tensors; written anew by torch all is as it was."""
    before = torch.load(folder / name, weights_only=False)
    rewrite(folder / name, how, *([] if change is None else [change]))
    refused(folder, UnsupportedError, name, told, "torch.save(torch.load(path, weights_only=False), path)")
    if change is None:
        torch.save(torch.load(folder / name, weights_only=False), folder / name)
        read_all(folder)
        assert str(torch.load(folder / name, weights_only=False)) == str(before)


def test_torch_lays_records_out_as_is_calculated(folder: Path) -> None:
    """Also records that are too large for a test, and that begin behind the first 4 GiB."""
    reader = torch._C.PyTorchFileReader(str(folder / MODEL))
    with zipfile.ZipFile(folder / MODEL) as file:
        prefix = len(file.namelist()[0].partition("/")[0]) + 1
    for header in (0, 63, 64, 2**32 - 2, 2**32 - 1, 2**40 + 7):
        for numbytes in (0, 1, 100, 2**32 - 2, 2**32 - 1, 2**35):
            for name in ("data/0", "data/12345"):
                expected = reader.get_record_offset_no_read(header, name, numbytes, 64)
                assert content_start(header, prefix + len(name), numbytes, 64) == expected


@pytest.mark.parametrize("length", [8, 80])
def test_a_record_that_is_shorter_or_longer_than_its_tensor(length: int, folder: Path) -> None:
    """The bytes behind a shorter one are another tensor's."""

    def cut(name: str, content: bytes) -> bytes:
        return content[:length].ljust(length, b"\0") if name == "data/0" else content

    path = folder / LAST
    rewrite(path, zipfile.ZIP_STORED, cut)
    with zipfile.ZipFile(path) as file:
        kept = [(record.filename, file.read(record)) for record in file.infolist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in kept:
            if not name.endswith(
                (".format_version", ".storage_alignment")
            ):  # so that torch looks, and doesn't calculate
                file.writestr(name, content)
    refused(folder, DamagedCheckpointError, LAST, f"holds {length} bytes in", "data/0, for a storage of ")
