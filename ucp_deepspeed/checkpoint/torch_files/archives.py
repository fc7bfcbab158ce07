"""Zip archives: checks that torch laid one out, so that the bytes of a tensor are where torch says.

An archive that another program has written anew holds the same data, and ``torch.load`` reads it; but its records may be
compressed. Besides, since 2.7 torch calculates where a storage begins from its own layout of archives
(``torch/serialization.py::_load``), when it describes tensors and doesn't read them.
"""

from __future__ import annotations

import sys
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.torch_files.damage import telling_damage
from ucp_deepspeed.checkpoint.torch_files.foreign import everything_in
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.remote import read_at

T = TypeVar("T")

REWRITE_HINT = "if you trust it, write it anew with torch.save(torch.load(path, weights_only=False), path)"

DEFAULT_ALIGNMENT = 64
"""Torch pads the beginning of each record to a multiple of this many bytes, unless the archive names another number."""


def storage_start(tensor: torch.Tensor) -> int:
    """Return the position in its file where the storage of a described tensor begins, in bytes. Views share a storage."""
    start: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", 0)
    return start


def storages_of(described: Any) -> list[tuple[int, int]]:
    """Return where the storages of tensors in a described value begin and end in its file, in bytes."""
    found = (value for value in everything_in(described) if isinstance(value, torch.Tensor) and value.is_meta)
    places = {storage_start(each): each.untyped_storage().nbytes() for each in found if each.layout is torch.strided}
    return [(start, start + numbytes) for start, numbytes in places.items() if numbytes]


def fill_described(value: T, path: Path) -> T:
    """Return a value of `safe_load.open_torch_file`, with all tensors in it read where they stand. They go on sharing storages.

    Raises:
        UnsupportedError: one isn't strided.
    """
    read: dict[tuple[int, int], torch.UntypedStorage] = {}
    for tensor in [each for each in everything_in(value) if isinstance(each, torch.Tensor) and each.is_meta]:
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            kind = type(tensor).__name__ if tensor.layout is torch.strided else str(tensor.layout)
            raise UnsupportedError(
                f"{path} holds a {kind} among what the script saved, which is read of local files alone"
            )
        place = start, numbytes = storage_start(tensor), tensor.untyped_storage().nbytes()
        if place not in read:
            with telling_damage(path), path.open("rb", buffering=0) as file:
                raw = bytearray(read_at(file, start, numbytes))
            read[place] = (
                torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
            ).untyped_storage()
        filled = torch.empty(0, dtype=tensor.dtype, device="cpu")
        filled.set_(read[place], tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
        if isinstance(tensor, torch.nn.Parameter):
            filled = torch.nn.Parameter(filled, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, filled)
    return value


def is_archive_file(path: Path) -> bool:
    """Return whether a file has the end of an archive; a file that can't be read has none."""
    with suppress(OSError), path.open("rb", buffering=0) as file:
        return zipfile.is_zipfile(file)
    return False


LARGE = 2**32 - 1
"""The first number that is too large for a field of 32 bits."""


@dataclass(frozen=True)
class Archive:
    """The directory of an archive: its records, in the order of the file."""

    path: Path
    records: Sequence[zipfile.ZipInfo]

    @classmethod
    def of(cls, path: Path, summed: bool = False) -> Archive:
        """Read a directory, and compare the CRC-32 of small records, such as step counts, which torch ignores.

        Args:
            summed: the small records are known to be what was saved.

        Raises:
            DamagedCheckpointError: there is none, or it is damaged.
            UnsupportedError: torch reads the file but can't say where the bytes of a tensor are.
        """
        with telling_damage(path):
            raw = path.open("rb", buffering=0)
        with raw:
            return cls.in_file(path, raw, summed)

    @classmethod
    def in_file(cls, path: Path, raw: IO[bytes] | RawIOBase, summed: bool = False) -> Archive:
        """Read the directory of an archive that is an open file, or a part of one; see `of`."""
        with telling_damage(path), zipfile.ZipFile(cast(IO[bytes], raw)) as file:
            records = sorted(file.infolist(), key=lambda record: record.header_offset)
            named = {record.filename.partition("/")[2]: record for record in reversed(records)}
            if not any(record.CRC for record in records):  # torch was told to compute none
                for record in records:
                    record.CRC = None  # type: ignore[assignment]
            for name, record in named.items():
                if name == "data.pkl" or (record.file_size <= tunables.SMALL_NUMBYTES and not summed):
                    file.read(record)  # compares the CRC-32
            settings = {name: named[name] for name in ("byteorder", ".storage_alignment") if name in named}
            told = {name: file.read(record) for name, record in settings.items() if record.file_size <= 64}
            alignment = int(told.get(".storage_alignment", DEFAULT_ALIGNMENT))
            if alignment < 1:
                raise ValueError(f"begins its records at multiples of {alignment} bytes")
        if told.get("byteorder") not in (None, sys.byteorder.encode()):
            raise UnsupportedError(f"{path} was written on a machine of the other byte order; {REWRITE_HINT}")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise UnsupportedError(f"{path} is compressed, which torch doesn't do; {REWRITE_HINT}")
        archive = cls(path, records)
        if ".format_version" in named:
            archive._check_layout(alignment)
        return archive

    def _check_layout(self, alignment: int) -> None:
        """Check that each storage's record ends where torch assumes the next one begins."""
        for record, following in pairwise(self.records):
            if not all(each.filename.partition("/")[2].startswith("data/") for each in (record, following)):
                continue
            header, numbytes = record.header_offset, record.file_size
            end = content_start(header, len(record.filename.encode()), numbytes, alignment) + numbytes
            if numbytes:  # behind its content torch writes a descriptor
                end += 24 if max(header, numbytes) >= LARGE else 16
            if end != following.header_offset:
                raise UnsupportedError(f"{self.path} was written anew by another program than torch; {REWRITE_HINT}")

    def check_storages(self, loaded: Any) -> None:
        """Check that each storage of described tensors lies in a record of its size.

        Raises:
            DamagedCheckpointError: a record is shorter or longer; the bytes behind it belong to another.
        """
        headers = [record.header_offset for record in self.records]
        for value in everything_in(loaded):
            if not isinstance(value, torch.Tensor) or value.device.type != "meta":
                continue
            with telling_damage(self.path):  # sparse tensors have none
                storage = value.untyped_storage()
            if not storage.nbytes():
                continue
            record = self.records[bisect_right(headers, storage_start(value)) - 1]
            if record.file_size != storage.nbytes():
                raise DamagedCheckpointError(
                    f"{self.path} holds {record.file_size} bytes in {record.filename}, for a storage of {storage.nbytes()}"
                )


def content_start(header: int, name_length: int, numbytes: int, alignment: int) -> int:
    """Return the position where torch writes the content of a record whose header begins at ``header``.

    Source: ``caffe2/serialize/inline_container.cc``, ``getPadding``."""
    start = header + 30 + name_length + 4
    if max(header, numbytes) >= LARGE:  # each of the two may need fields of 64 bits
        start += 4 + 16 * (numbytes >= LARGE) + 8 * (header >= LARGE)
    return -(-start // alignment) * alignment
