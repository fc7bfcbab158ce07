"""Versions of a checkpoint's files: are they still the files that were opened first?"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, cast

from ucp_deepspeed.checkpoint.bounds import check_regular
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.remote import RemotePath, RemoteStatus, is_url, located


class _Version(NamedTuple):
    """Version of a file: its size, the time of its last write, its inode, and the time of the inode's last change. Of an object:
    its size, and what its store tells versions apart by."""

    size: int
    written: int | str
    inode: int
    changed: int

    def is_same(self, other: _Version) -> bool:
        """Return whether a file is still of this version.

        A file that another takes the place of, with its size and its time of writing (``cp -p``), has another inode. That alone
        isn't enough: some network and FUSE file systems number inodes anew whenever they forget them. So the time of the inode's
        change must differ too. It differs for any other file, and alone says nothing: a new link or mode sets it as well.
        """
        replaced = self.inode != other.inode and self.changed != other.changed
        return (self.size, self.written) == (other.size, other.written) and not replaced


class FileVersions:
    """The version of each file of a checkpoint when it was opened first.

    A run may save the same tag again while somebody reads it. A catalog's facts about one save must not be joined with another
    save's tensors; so the catalog and all code that reads by it share one of these. Thread-safe.

    Attributes:
        sums: returns the checksums of a file, by which a reader checks what it reads; None if there are none.
    """

    def __init__(self) -> None:
        self.sums: Callable[[str], FileSums | None] = lambda path: None
        self._first: dict[str, _Version | None] = {}

    def note(self, path: str | Path, status: os.stat_result | RemoteStatus | None = None) -> None:
        """Note that a file is about to be read.

        Args:
            status: status of the opened file. Without it the file is opened for that; if that fails, nothing is noted.

        Raises:
            DamagedCheckpointError: it isn't the file that was noted first under this path, or there is no file.
        """
        if status is None:
            check_regular(path)
        try:
            version = _opened_version(located(path)) if status is None else _version(status)
        except OSError:  # the code that reads it tells why
            return
        if not _are_same(version, self._first.setdefault(str(path), version)):
            raise _changed(path)

    def check(self, paths: Iterable[str] | None = None) -> None:
        """Check that the files are still those that were noted.

        Args:
            paths: paths of the files; by default all that were noted.

        Raises:
            DamagedCheckpointError: one was written, replaced or removed meanwhile, for example by a run that saves the tag again.
        """
        checked = list(self._first) if paths is None else list(paths)
        for folder in {located(path).parent for path in checked if is_url(path)}:
            cast(RemotePath, folder).refresh()
        for path in checked:
            try:
                now = _version(located(path).stat())
            except FileNotFoundError:
                now = None
            except OSError as error:
                if error.errno in (errno.ESTALE, errno.ENOTDIR):  # it was replaced, or a folder became a file
                    raise _changed(path) from None
                raise DamagedCheckpointError(f"{path} can't be read: {error.strerror or error}") from error
            if not _are_same(now, self._first[path]):
                raise _changed(path)


def _are_same(version: _Version | None, first: _Version | None) -> bool:
    return version is first if version is None or first is None else version.is_same(first)


def _opened_version(path: Path) -> _Version | None:
    """Return the version of a file, or None if there is no file."""
    try:
        return _version(status_of(path))
    except FileNotFoundError:
        return None


def status_of(path: Path) -> os.stat_result | RemoteStatus:
    """Open a file and return its status: a network file system may report an outdated one of an unopened file."""
    if isinstance(path, RemotePath):
        return path.stat()
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno())


def _version(status: os.stat_result | RemoteStatus) -> _Version:
    if isinstance(status, RemoteStatus):
        return _Version(status.st_size, status.identity, 0, 0)
    return _Version(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


def _changed(path: str | Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} was changed while it was read; try again when nobody writes the checkpoint")
