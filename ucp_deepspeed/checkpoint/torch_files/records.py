"""CRC-32 of the records of archives, from parts that threads read in any order. torch writes them and never compares them."""

from __future__ import annotations

import threading
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY, telling_damage
from ucp_deepspeed.checkpoint.torch_files.parts import FilePart, archives_in
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.remote import located, read_at

_REFLECTED, _ONE, _X = 0xEDB88320, 1 << 31, 1 << 30
"""The polynomial of CRC-32, and two others, with the highest power in the lowest bit."""


def combined(first: int, second: int, numbytes: int) -> int:
    """Return the CRC-32 of two runs of bytes from that of each.

    Args:
        numbytes: length of the second run.
    """
    return _times(_shift(numbytes), first) ^ second


def _times(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo the one of CRC-32."""
    product, power = 0, _ONE
    while power:
        if a & power:
            product ^= b
        power >>= 1
        b = b >> 1 ^ (_REFLECTED if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(numbytes: int) -> int:
    """Return x to the power of a number of bits: by that factor so many bytes behind them change the sum of other bytes."""
    shift, square, bits = _ONE, _X, 8 * numbytes
    while bits:
        if bits & 1:
            shift = _times(square, shift)
        square, bits = _times(square, square), bits >> 1
    return shift


@dataclass(frozen=True, slots=True)
class Record:
    """A record that isn't empty: its place in the file, in bytes, and its CRC-32 as the archive's directory has it.

    ``crc`` is None if the archive was saved without (``torch.serialization.set_crc32_options``).
    """

    name: str
    start: int
    stop: int
    crc: int | None

    @property
    def numbytes(self) -> int:
        """Size of the record in bytes."""
        return self.stop - self.start


def records_of(path: Path) -> tuple[Record, ...]:
    """Return the records of an archive, or of several in one file, in the order of the file; none for a file of another kind.

    Raises:
        DamagedCheckpointError: the directory, or what it leads to, is damaged.
    """
    found: list[Record] = []
    for _, stop in archives_in(path):
        with telling_damage(path), closing(FilePart(path, 0, stop)) as part:
            with zipfile.ZipFile(cast(IO[bytes], part)) as archive:
                listed = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            summed = any(entry.CRC for entry in listed)
            for entry in listed:
                if not entry.file_size or entry.compress_type != zipfile.ZIP_STORED:
                    continue
                part.seek(entry.header_offset)
                header = part.read(30)
                lengths = (int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
                start = entry.header_offset + 30 + sum(lengths)
                if header[:4] != b"PK\x03\x04" or start + entry.file_size > stop:
                    raise zipfile.BadZipFile(f"record {entry.filename} isn't where the directory says")
                found.append(Record(entry.filename, start, start + entry.file_size, entry.CRC if summed else None))
    return tuple(found)


class Run(NamedTuple):
    """Bytes of a file that were read in a row, and their CRC-32."""

    start: int
    stop: int
    crc: int


def joined(runs: Iterable[Run]) -> list[Run]:
    """Join runs that lie end to end; leave out those that begin before the end of another."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.start, -run.stop)):
        if not found or run.start > found[-1].stop:
            found.append(run)
        elif run.start == found[-1].stop:
            last = found[-1]
            found[-1] = Run(last.start, run.stop, combined(last.crc, run.crc, run.stop - run.start))
    return found


@dataclass
class _FileSums:
    """The runs that were read of a file, for each record by its number, until it is checked."""

    records: tuple[Record, ...]
    starts: list[int]
    runs: dict[int, dict[tuple[int, int], Run]] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)


class RecordSums:
    """Collects sums of what is read of archives, and compares those of whole records with the directory's. Thread-safe.

    Attributes:
        bytes_checked: bytes in records that agree with their sums.
    """

    def __init__(self) -> None:
        self.bytes_checked = 0
        self._files: dict[str, _FileSums] = {}
        self._lock = threading.Lock()

    def _sums(self, path: str) -> _FileSums:
        with self._lock:
            found = self._files.get(path)
        if found is None:
            records = records_of(located(path))
            with self._lock:
                found = self._files.setdefault(path, _FileSums(records, [record.start for record in records]))
        return found

    def place(self, path: str, start: int, stop: int) -> int | None:
        """Return the number of the record that bytes lie in; None if they needn't be summed, as in a record that was checked."""
        sums = self._sums(path)
        number = bisect_right(sums.starts, start) - 1
        if number < 0 or number in sums.checked:
            return None
        record = sums.records[number]
        return number if stop <= record.stop and record.crc is not None else None

    def add(self, path: str, number: int, run: Run) -> None:
        """Add a run of bytes of a record that was read. If all of the record has been read, check it.

        Raises:
            DamagedCheckpointError: it isn't what was saved.
        """
        sums = self._sums(path)
        record = sums.records[number]
        with self._lock:
            runs = sums.runs.setdefault(number, {})
            if (run.start, run.stop) in runs:
                return
            runs[run.start, run.stop] = run
            sums.read[number] = sums.read.get(number, 0) + run.stop - run.start
            if sums.read[number] < record.numbytes or number in sums.checked:
                return
            held = joined(runs.values())
        if len(held) == 1 and held[0][:2] == (record.start, record.stop):
            self._compare(path, number, held[0].crc)

    def _compare(self, path: str, number: int, crc: int) -> None:
        sums = self._files[path]
        record = sums.records[number]
        assert record.crc is not None
        if crc != record.crc:
            raise DamagedCheckpointError(
                f"{path} is damaged: bytes {record.start} to {record.stop}, record {record.name}, have the CRC-32 {crc:08x}, and "
                f"{record.crc:08x} was saved; {REMEDY}"
            )
        with self._lock:
            if number not in sums.checked:
                sums.checked.add(number)
                self.bytes_checked += record.numbytes
            sums.runs.pop(number, None)

    def partial(self, least: float = 0.0) -> list[tuple[str, int, int, int, int]]:
        """Return what was read of records in part: path, number of the record, and the `Run`. Plain data, for other processes.

        Args:
            least: leave out records of which a smaller part was read.
        """
        with self._lock:
            return [
                (path, number, *run)
                for path, sums in self._files.items()
                for number, runs in sums.runs.items()
                if sums.read[number] >= least * sums.records[number].numbytes
                for run in joined(runs.values())
            ]

    def finish(self, found: Iterable[Sequence[Any]] | None = None, part: tuple[int, int] = (0, 1)) -> None:
        """Check the records that were read in part, if little of them is missing: read that too.

        Args:
            found: what all processes have read of them, as `partial` gives it; by default what this one has.
            part: (number of this process, number of processes): each checks its share of the records.

        Raises:
            DamagedCheckpointError: see `add`; or a file can't be read.
        """
        held: dict[tuple[str, int], list[Run]] = {}
        for path, number, *run in self.partial(1 - tunables.MOST_UNREAD) if found is None else found:
            held.setdefault((path, number), []).append(Run(*run))
        for place, (record, runs) in enumerate(sorted(held.items())):
            if place % part[1] == part[0]:
                self._finish_record(*record, joined(runs))

    def _finish_record(self, path: str, number: int, runs: list[Run]) -> None:
        record = self._sums(path).records[number]
        gaps = list(_gaps(record, runs))
        if sum(stop - start for start, stop in gaps) > record.numbytes * tunables.MOST_UNREAD:
            return
        if gaps:
            with telling_damage(located(path)), located(path).open("rb", buffering=0) as file:
                runs = joined([*runs, *(Run(start, stop, crc_of(file, start, stop)) for start, stop in gaps)])
        assert len(runs) == 1, (record, runs)
        self._compare(path, number, runs[0].crc)


def _gaps(record: Record, runs: Iterable[Run]) -> Iterator[tuple[int, int]]:
    """Yield the bytes of a record between runs."""
    place = record.start
    for run in runs:
        if run.start > place:
            yield place, run.start
        place = run.stop
    if place < record.stop:
        yield place, record.stop


def crc_of(file: IO[bytes], start: int, stop: int) -> int:
    """Return the CRC-32 of a range of an open file.

    Raises:
        OSError: it can't be read, or ends before.
    """
    crc = 0
    while start < stop:
        part = read_at(file, start, min(tunables.SUMMED_NUMBYTES, stop - start))
        if not part:
            raise OSError("became shorter while it was read")
        crc, start = zlib.crc32(part, crc), start + len(part)
    return crc
