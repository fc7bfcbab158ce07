"""Values that ``torch.save`` wrote one behind the other into a file, each an archive of its own."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import torch

from ucp_deepspeed.checkpoint.torch_files import unpickling
from ucp_deepspeed.checkpoint.torch_files.archives import DEFAULT_ALIGNMENT, Archive, storage_start
from ucp_deepspeed.checkpoint.torch_files.damage import telling_damage
from ucp_deepspeed.checkpoint.torch_files.foreign import everything_in, opaque
from ucp_deepspeed.remote import read_at


class FilePart(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, path: Path, start: int, numbytes: int) -> None:
        super().__init__()
        self._file, self._start, self._numbytes, self._place = path.open("rb", buffering=0), start, numbytes, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place in the part."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._numbytes}[whence]
        if place < 0:
            raise OSError(22, "a place before the beginning")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        """Read bytes up to the end of the part."""
        view = memoryview(buffer).cast("B")[: max(self._numbytes - self._place, 0)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view) if view else 0  # type: ignore[attr-defined]
        self._place += count
        return int(count)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _Unpickler(unpickling.Unpickler):
    """Returns an `Opaque` for a value in whose making something foreign is called. Each value stands alone in its part."""

    def load(self) -> Any:
        found = super(unpickling.Unpickler, self).load()
        return found if self.notes.foreign is None else opaque(self.notes.foreign)()


_MODULE: Any = SimpleNamespace(Unpickler=_Unpickler, __name__=__name__)
"""torch asks for a module."""


def open_part(path: Path, start: int, numbytes: int) -> Any:
    """Return the value in a part of a file. Its tensors are described, with places in the whole file, as by `open_torch_file`.

    Objects of classes that aren't allowed become `foreign.Opaque`.

    Raises:
        DamagedCheckpointError: the part isn't whole, or isn't an archive.
        UnsupportedError: another program than torch has written it.
    """
    with telling_damage(path):
        opened = FilePart(path, start, numbytes)
    with closing(opened) as part:
        archive = Archive.in_file(path, part)
        with telling_damage(path):
            if any(record.filename.endswith("constants.pkl") for record in archive.records):
                raise pickle.UnpicklingError("Unsupported class TorchScript")
            part.seek(0)
            loaded = torch.load(part, map_location="meta", weights_only=False, pickle_module=_MODULE)  # type: ignore[arg-type]
    archive.check_storages(loaded)
    moved: set[int] = set()
    for value in everything_in(loaded):
        if isinstance(value, torch.Tensor) and value.is_meta and value.layout is torch.strided:
            storage = value.untyped_storage()
            if storage._cdata not in moved:
                moved.add(storage._cdata)
                storage._checkpoint_offset = storage_start(value) + start  # type: ignore[attr-defined]
    return loaded


def is_archive(path: Path, start: int) -> bool:
    """Return whether an archive of ``torch.save`` begins at a place of a file."""
    with telling_damage(path), path.open("rb", buffering=0) as file:
        return read_at(file, start, 4) == zipfile.stringFileHeader  # type: ignore[attr-defined, no-any-return]


def archives_in(path: Path) -> list[tuple[int, int]]:
    """Return the first byte of each archive in a file of archives one behind the other, and the byte behind it; of an ordinary
    file of ``torch.save``, its only one. The list is empty if no archive ends where the file does.

    Raises:
        DamagedCheckpointError: a directory, or what it leads to, is damaged.
    """
    found: list[tuple[int, int]] = []
    with telling_damage(path):
        stop = path.stat().st_size
        while stop:
            with closing(FilePart(path, 0, stop)) as part:
                opened = cast(IO[bytes], part)
                if not zipfile.is_zipfile(opened):
                    break
                with zipfile.ZipFile(opened) as archive:
                    first = min((entry.header_offset for entry in archive.infolist()), default=stop)
            if not 0 <= first < stop:
                raise zipfile.BadZipFile(f"has an archive without records before byte {stop}")
            found.append((first, stop))
            stop = _without_gap(path, first)
    return found[::-1]


_END, _END_NUMBYTES = b"PK\5\6", 22
"""The record at the end of an archive."""


def _without_gap(path: Path, stop: int) -> int:
    """Return where the last archive before a byte ends. This package leaves up to 63 zeros between two (`one_behind_another`)."""
    with path.open("rb", buffering=0) as file:
        start = max(stop - _END_NUMBYTES - DEFAULT_ALIGNMENT, 0)
        tail = read_at(file, start, stop - start)
    end = tail.rfind(_END) + _END_NUMBYTES
    return start + end if _END_NUMBYTES <= end <= len(tail) and not tail[end:].strip(b"\0") else stop
