"""Archives as torch writes them, whose tensors are filled later: the places of all bytes are known before any tensor is read."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import DEFAULT_PROTOCOL

from ucp_deepspeed.checkpoint.output import Literal, OutputFile, Region, StoredTensor
from ucp_deepspeed.checkpoint.torch_files.archives import DEFAULT_ALIGNMENT
from ucp_deepspeed.checkpoint.torch_files.records import Run, joined
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.torch_files.structure import (
    CRC_IN_DESCRIPTOR,
    CRC_IN_DIRECTORY,
    descriptor_of,
    end_of,
    header_of,
    listed_as,
)
from ucp_deepspeed.checkpoint.torch_files.unpickling import STAND_INS
from ucp_deepspeed.errors import naming

_InPython: Any = pickle._Pickler  # type: ignore[attr-defined]
"""pickle's own pickler in Python. Single steps of it can be replaced."""

_LAST = (("version", b"3\n"), (".data/serialization_id", b"0" * 40))
"""Records that torch's writer adds at the end. The id is one for logs: nothing compares it."""


@dataclass(frozen=True)
class _Sum:
    """A record whose CRC-32 isn't known yet: its bytes, and the two places of the sum."""

    start: int
    stop: int
    places: tuple[int, int]


@dataclass(frozen=True)
class ArchiveFile:
    """A file to write, and the sums that are still zero in it."""

    file: OutputFile
    sums: tuple[_Sum, ...]

    @classmethod
    def of(cls, file_name: str, numbytes: int, parts: Sequence[Region | Literal], sums: Sequence[_Sum]) -> ArchiveFile:
        """Make the file, which asks for the sums of its records."""
        records = tuple((each.start, each.stop) for each in sums)
        return cls(OutputFile(file_name, numbytes, tuple(parts), records), tuple(sums))


def write_sums(files: Sequence[ArchiveFile], folder: Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Put the CRC-32 of the tensors that were written into the files: an `OutputPlan.finish_records`.

    Args:
        runs: parts of the tensors, in any order.

    Raises:
        OSError: a file can't be written.
    """
    for file in (each for each in files if each.sums):
        path = folder / file.file.file_name
        known = {run[:2]: run.crc for run in joined(runs.get(file.file.file_name, ()))}
        with naming(path), path.open("r+b", buffering=0) as opened:
            for each in file.sums:
                crc = known[each.start, each.stop].to_bytes(4, "little")
                for place in each.places:
                    os.pwrite(opened.fileno(), crc, place)
            os.fsync(opened.fileno())


def archive_file(file_name: str, tensors: Mapping[str, StoredTensor], tied: Mapping[str, str]) -> ArchiveFile:
    """Lay out the archive that ``torch.save`` makes of a dictionary of tensors, for ``torch.load`` with ``weights_only``.

    Args:
        tied: further keys → the key of the tensor that each stands for; in the file they share its storage.
    """
    return value_archive(file_name, {**tensors, **{alias: tensors[owner] for alias, owner in tied.items()}})


def tensor_archive(tensor: StoredTensor) -> ArchiveFile:
    """Lay out the archive that ``torch.save`` writes of one tensor to a stream."""
    return value_archive("archive", tensor)


def value_archive(file_name: str, value: Any) -> ArchiveFile:
    """Lay out the archive that ``torch.save`` makes of a value.

    Args:
        value: plain data and tensors. A `StoredTensor` stands for a tensor to come; the same object at several places stands for
            one. Objects of the classes of `unpickling.STAND_INS` are saved as DeepSpeed's own.
    """
    contents: dict[int, StoredTensor] = {}

    class Pickler(_ByName):
        """Base of the pickler in torch's ``_save``."""

        def reducer_override(self, held: Any) -> Any:
            return (
                _empty(held, contents).__reduce_ex__(self.proto) if isinstance(held, StoredTensor) else NotImplemented
            )

    records, storages = records_to_save(value, Pickler)
    filled = {f"data/{key}": contents.get(held._cdata) or _bytes_of(held) for key, held in storages.items()}
    return _laid_out(
        file_name, Path(file_name).stem, [*((name, data or filled[name]) for name, data in records), *_LAST]
    )


def _bytes_of(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()  # type: ignore[call-overload]


def one_behind_another(
    file_name: str, archives: Sequence[ArchiveFile], alignment: int = DEFAULT_ALIGNMENT
) -> tuple[ArchiveFile, list[tuple[int, int]]]:
    """Lay out a file of several archives; return the first byte and the number of bytes of each too.

    Args:
        alignment: each begins at a multiple of so many bytes; zeros lie before it.
    """
    parts: list[Region | Literal] = []
    sums: list[_Sum] = []
    places: list[tuple[int, int]] = []
    stop = 0
    for archive in archives:
        start = -(-stop // alignment) * alignment
        parts += [replace(part, file_offset=start + part.file_offset) for part in archive.file.parts]
        for each in archive.sums:
            first, second = each.places
            sums.append(_Sum(start + each.start, start + each.stop, (start + first, start + second)))
        places.append((start, archive.file.numbytes))
        stop = start + archive.file.numbytes
    return ArchiveFile.of(file_name, stop, parts, sums), places


def _empty(tensor: StoredTensor, contents: dict[int, StoredTensor]) -> torch.Tensor:
    """Return a tensor that stands for one to write, and note whose storage it has."""
    storage = torch.UntypedStorage(tensor.numbytes, device="cpu")  # nobody touches its memory
    contents[storage._cdata] = tensor
    return torch.empty(0, dtype=NAMED_DTYPES[tensor.dtype], device="cpu").set_(storage).view(tensor.shape)


def _laid_out(file_name: str, title: str, records: Sequence[tuple[str, bytes | StoredTensor]]) -> ArchiveFile:
    """Place the records one after another, and the directory behind them."""
    parts: list[Region | Literal] = []
    entries: list[tuple[zipfile.ZipInfo, int, int]] = []
    place = 0
    for name, data in records:
        entry = _entry(f"{title}/{name}", data, place)
        header = header_of(entry, DEFAULT_ALIGNMENT)
        parts.append(Literal(header, place))
        start = place + len(header)
        if isinstance(data, StoredTensor):
            parts += [region for region in data.placed(start) if region.numel]
        elif data:
            parts.append(Literal(data, start))
        place = start + entry.file_size
        if entry.file_size:
            parts.append(Literal(descriptor_of(entry), place))
        entries.append((entry, start, place))
        place += len(descriptor_of(entry)) if entry.file_size else 0
    directory, lines, sums = place, [], []
    for (entry, start, stop), (_, data) in zip(entries, records, strict=True):
        if isinstance(data, StoredTensor) and entry.file_size:
            sums.append(_Sum(start, stop, (stop + CRC_IN_DESCRIPTOR, place + CRC_IN_DIRECTORY)))
        lines.append(listed_as(entry))
        place += len(lines[-1])
    tail = b"".join(lines) + end_of(len(lines), directory, place - directory)
    parts.append(Literal(tail, directory))
    return ArchiveFile.of(file_name, directory + len(tail), parts, sums)


def _entry(name: str, data: bytes | StoredTensor, place: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.header_offset = place
    entry.file_size = data.numbytes if isinstance(data, StoredTensor) else len(data)
    entry.CRC = 0 if isinstance(data, StoredTensor) else zlib.crc32(data)
    return entry


class _ByName(_InPython):  # type: ignore[misc]
    """Pickles a class that stands in for DeepSpeed's by the name of DeepSpeed's, without importing it."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function."""
        found = STAND_INS.get(obj) if isinstance(obj, type) else None
        if found is None:
            super().save_global(obj, name)
        else:
            module, name = found
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())  # in torch's protocol, 2
            self.memoize(obj)


def records_to_save(
    state: Any, pickler: type[pickle.Pickler] = pickle.Pickler
) -> tuple[list[tuple[str, bytes | None]], dict[str, torch.UntypedStorage]]:
    """Return the records of the zip file, in order, with None for the contents of storages; and the storages by their keys.

    torch's own ``_save`` makes the records, so that they are those of its version.
    """
    zip_file = _Collector()
    storages: dict[str, torch.UntypedStorage] = {}

    class Pickler(pickler):  # type: ignore[misc, valid-type]
        """Base of the pickler in ``_save``; it sees which key the pickler gives to which storage."""

        def __init_subclass__(cls) -> None:
            identify = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                identity = identify(self, obj)
                if identity is not None:
                    storages[identity[2]] = getattr(obj, "_untyped_storage", obj)
                return identity

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

    with torch.serialization.skip_data():
        torch.serialization._save(state, zip_file, SimpleNamespace(Pickler=Pickler), DEFAULT_PROTOCOL, False)
    found = dict(storages)
    storages.clear()  # the class would keep them, and only the garbage collector frees it
    return zip_file.records, found


class _Collector:
    """Stands in for torch's ``PyTorchFileWriter``, and collects the records."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes | None]] = []

    def write_record(self, name: str, data: str | bytes, size: int) -> None:
        self.records.append((name, data.encode() if isinstance(data, str) else data))

    def write_record_metadata(self, name: str, size: int) -> None:
        self.records.append((name, None))
