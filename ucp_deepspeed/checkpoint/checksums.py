"""Checksums of pieces of files: how a save takes them, how they lie on disk, and how a reader compares with them.

`docs/format.md`, *Checksums*, is the specification. The sum is xxh3, which is as fast as memory. A file is cut so that a load
checks whatever it reads: each storage of tensors has pieces of its own, and one sum covers all bytes between the storages.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import accumulate, chain
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from xxhash import xxh3_64, xxh3_64_hexdigest, xxh3_64_intdigest

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.bounds import check_regular
from ucp_deepspeed.errors import DamagedCheckpointError, FormatError
from ucp_deepspeed.remote import numbytes_of, read_at

CHECKSUMS_NAME = "ucp_checksums.jsonl"
CHECKSUMS_VERSION = 1

WAY_ON = 'copy the file again from where it is whole, or use another tag; "verify": "off" loads what is there'

Sums = np.ndarray[Any, np.dtype[np.uint64]]
"""Sums of pieces, in order."""

sum_of = xxh3_64_intdigest
"""Return the sum of a piece, a buffer of bytes: an integer of 64 bits."""

_LARGEST_PIECE = 1 << 26
"""Bytes of a piece above which a file of sums counts as damaged: a reader holds one piece."""

_LONGEST_LINE = 1 << 27
"""Bytes of a line above which a file of sums counts as damaged: the sums of a file of 12 TB have fewer."""

_BUFFERED = 8192
"""Bytes that are read ahead between storages: a few headers, and no large part of a storage."""


@dataclass(frozen=True)
class FileSums:
    """The sums of one file.

    Attributes:
        file: its name in the tag folder.
        size: its bytes.
        piece: bytes of a piece; the last one of a range may have fewer.
        ranges: (first byte, bytes) of each storage, in the order of the file; of the whole file if it is no archive.
        sums: sums of the pieces of all ranges, in order, as little-endian integers of 64 bits.
        rest: sum of all other bytes, in order.

    Raises:
        ValueError: the ranges overlap or leave the file, or there are more or fewer sums than pieces.
    """

    file: str
    size: int
    piece: int
    ranges: tuple[tuple[int, int], ...]
    sums: bytes
    rest: int

    def __post_init__(self) -> None:
        end = 0
        for start, numbytes in self.ranges:
            if start < end or numbytes < 1:
                raise ValueError(f"range {start} of {numbytes} bytes")
            end = start + numbytes
        if end > self.size or not 1 <= self.piece <= _LARGEST_PIECE:
            raise ValueError(f"ranges up to byte {end} of {self.size}, in pieces of {self.piece}")
        if len(self.sums) != 8 * self._first[-1]:
            raise ValueError(f"{len(self.sums)} bytes of sums of {self._first[-1]} pieces")

    @cached_property
    def of_pieces(self) -> Sums:
        """The sum of each piece."""
        return np.frombuffer(self.sums, dtype="<u8")

    @cached_property
    def _first(self) -> list[int]:
        """Number of the first piece of each range, and at the end the number of all pieces."""
        return list(accumulate((-(-numbytes // self.piece) for _, numbytes in self.ranges), initial=0))

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.ranges]

    def pieces_of(self, start: int, stop: int) -> range | None:
        """Return the numbers of the pieces that hold bytes of a part of one range; None if the part lies in no range."""
        index = bisect_right(self._starts, start) - 1
        if index < 0 or start >= stop or stop > sum(self.ranges[index]):
            return None
        low, first = self._starts[index], self._first[index]
        return range(first + (start - low) // self.piece, first + (stop - low - 1) // self.piece + 1)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first byte of a piece, and the byte behind it."""
        index = bisect_right(self._first, number) - 1
        start, numbytes = self.ranges[index]
        low = (number - self._first[index]) * self.piece
        return start + low, start + min(low + self.piece, numbytes)

    def spans(self, numbers: range) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each of some pieces of one range, its first byte, and the byte behind it."""
        if numbers:
            low, end = self.span(numbers[0])[0], self.span(numbers[-1])[1]
            for number in numbers:
                yield number, low, min(low + self.piece, end)
                low += self.piece

    def line(self) -> str:
        """Return the line of `CHECKSUMS_NAME`, without its end."""
        sums = base64.b64encode(self.sums).decode("ascii")
        ranges = [list(each) for each in self.ranges]
        told = {"file": self.file, "size": self.size, "piece": self.piece, "ranges": ranges, "sums": sums}
        return json.dumps({**told, "rest": f"{self.rest:016x}"})

    @classmethod
    def of_line(cls, line: bytes | str) -> FileSums:
        """Read such a line.

        Raises:
            ValueError: it is damaged.
        """
        read = _Line.model_validate_json(line)
        sums = base64.b64decode(read.sums, validate=True)
        return cls(read.file, read.size, read.piece, read.ranges, sums, int(read.rest, 16))

    def differences(self, path: Path, at_most: int | None = None) -> list[str]:
        """Compare a file, and return which bytes differ, each part as a text.

        Args:
            at_most: leave storages of more bytes unread.

        Raises:
            OSError: it can't be read.
        """
        found = _summed(path, self.ranges, self.piece, self.of_pieces, at_most)
        if found is None or len(found[0]) != len(self.of_pieces):  # it ends before they do
            return [f"{path.stat().st_size} bytes instead of {self.size}"]
        sums, rest, size = found
        spans = map(self.span, np.flatnonzero(sums != self.of_pieces).tolist())
        told = [f"bytes {low} to {high - 1}" for low, high in spans]
        if size != self.size:
            told.append(f"{size} bytes instead of {self.size}")
        return told + ["bytes outside of its tensors"] * (rest != self.rest)

    def check_opened(self, path: Path) -> None:
        """Compare all of a file that opening it reads, or may: everything but the larger storages. Errors are those of `check`;
        a missing file is left to who opens it."""
        archive = self.ranges != ((0, self.size),)
        if path.is_file():
            self.check(path, tunables.SMALL_NUMBYTES if archive else None)

    def check_parts(self, path: Path, parts: Iterable[tuple[int, int]]) -> None:
        """Compare the pieces that hold these parts, each from its first byte to behind its last. Errors are those of `check`."""
        with path.open("rb", buffering=0) as file:
            for start, stop in parts:
                if (numbers := self.pieces_of(start, stop)) is None:
                    raise damaged(path, f"the places of its tensors, such as bytes {start} to {stop - 1},")
                for number in numbers:
                    low, high = self.span(number)
                    if sum_of(read_at(file, low, high - low)) != self.of_pieces[number]:
                        raise damaged(path, f"bytes {low} to {high - 1}")

    def check(self, path: Path, at_most: int | None = None) -> None:
        """Compare a file; for ``at_most`` see `differences`.

        Raises:
            DamagedCheckpointError: some bytes aren't those that were saved, or it can't be read.
        """
        check_regular(path)
        try:
            told = self.differences(path, at_most)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} can't be read: {error.strerror or error}") from error
        if told:
            more = f" and {len(told) - 1} more parts" if len(told) > 1 else ""
            raise damaged(path, told[0] + more)


def damaged(path: str | Path, part: str) -> DamagedCheckpointError:
    """Return the error for a part of a file that isn't what was saved."""
    return DamagedCheckpointError(f"{path} is damaged: {part} differ from what was saved; {WAY_ON}")


class _Line(BaseModel):
    """See `FileSums`; ``sums`` is in base64."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    file: str
    size: NonNegativeInt
    piece: NonNegativeInt
    ranges: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    sums: str
    rest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


def sums_of(path: Path, known: dict[int, Iterable[int]] | None = None) -> FileSums:
    """Take the sums of a file: one pass over it.

    Args:
        known: ranges that needn't be read, by their first byte: sums of their pieces.

    Raises:
        OSError: it can't be read.
    """
    size, piece = path.stat().st_size, tunables.PIECE_NUMBYTES
    ranges = storage_ranges(path)
    given = [list((known or {}).get(start, ())) for start, _ in ranges]
    counts = [-(-numbytes // piece) for _, numbytes in ranges]
    if known and [len(sums) for sums in given] == counts:
        found = _summed(path, ranges, piece, np.array([*chain(*given)], dtype=np.uint64), at_most=0)
    else:
        found = _summed(path, ranges, piece)
    if found is None or found[2] != size:
        raise OSError(f"{path} was changed while it was read")
    return FileSums(path.name, size, piece, ranges, found[0].astype("<u8").tobytes(), found[1])


def sums_with(path: Path, ranges: tuple[tuple[int, int], ...], known: Mapping[int, int]) -> FileSums:
    """Return the sums of a file, of whose pieces some are known: the others are read, and all bytes outside of the ranges.

    Args:
        ranges: see `FileSums.ranges`.
        known: number of a piece, over all ranges → its sum.

    Raises:
        OSError: it can't be read.
    """
    size, piece = path.stat().st_size, tunables.PIECE_NUMBYTES
    count = sum(-(-numbytes // piece) for _, numbytes in ranges)
    sums = np.array([known.get(number, 0) for number in range(count)], dtype="<u8")
    found = _summed(path, ranges, piece, sums, at_most=0)
    if found is None:
        raise OSError(f"{path} was changed while it was read")
    laid_out = FileSums(path.name, size, piece, ranges, sums.tobytes(), found[1])
    with path.open("rb", buffering=0) as file:
        for number in (each for each in range(count) if each not in known):
            start, stop = laid_out.span(number)
            sums[number] = sum_of(read_at(file, start, stop - start))
    return replace(laid_out, sums=sums.tobytes())


def _summed(
    path: Path,
    ranges: Sequence[tuple[int, int]],
    piece: int,
    known: Sums | None = None,
    at_most: int | None = None,
) -> tuple[Sums, int, int] | None:
    """Return sums of a file's pieces, of its other bytes, and its size; None if it ends before its ranges do.

    Args:
        known: sums to return for ranges of more than ``at_most`` bytes, which aren't read.
    """
    sums: list[int] = []
    rest, buffer = xxh3_64(), memoryview(bytearray(piece))
    with path.open("rb", buffering=_BUFFERED) as file:
        size, position = numbytes_of(file), 0
        for start, numbytes in (*ranges, (size, 0)):
            if start < position:  # the file is shorter now
                return None
            file.seek(position)
            for part in _parts(file, start - position, buffer):
                rest.update(part)
            position = start + numbytes
            if at_most is not None and numbytes > at_most:
                assert known is not None
                count = -(-numbytes // piece)
                sums += known[len(sums) : len(sums) + count].tolist()
            else:
                sums += map(sum_of, _parts(file, numbytes, buffer))
            if position > size:
                return None
    return np.array(sums, dtype=np.uint64), rest.intdigest(), size


def _parts(file: IO[bytes], numbytes: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the next bytes of a file in parts, all but the last as long as the buffer, in which they lie; fewer at its end."""
    while numbytes > 0:
        part = buffer[: min(numbytes, len(buffer))]
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            return
        if count < len(part):
            yield part[:count]
            return
        yield part
        numbytes -= count


_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The header in front of a record's content: its mark, and the bytes of name and extra field, which follow."""


def storage_ranges(path: Path) -> tuple[tuple[int, int], ...]:
    """Return where the storages lie in an archive of torch's, as `FileSums.ranges`; any other file is one range."""
    size = path.stat().st_size
    whole = ((0, size),) if size else ()
    try:
        with path.open("rb", buffering=0) as raw, zipfile.ZipFile(raw) as archive:
            found = {name: each for name, each in _starts_of(raw, archive).items() if "data" in name.split("/")[1:-1]}
    except (zipfile.BadZipFile, OSError, struct.error, ValueError, NotImplementedError):
        return whole
    ranges = sorted((start, numbytes) for start, numbytes in found.values() if numbytes)
    ends = [0, *(start + numbytes for start, numbytes in ranges)]
    if any(start < end for (start, _), end in zip(ranges, ends, strict=False)) or ends[-1] > size:
        return whole
    return tuple(ranges)


def records_of(path: Path) -> dict[str, int]:
    """Return where the content of each record of an archive begins, by its name without the archive's."""
    with path.open("rb", buffering=0) as raw, zipfile.ZipFile(raw) as archive:
        return {name.partition("/")[2]: start for name, (start, _) in _starts_of(raw, archive).items()}


def _starts_of(raw: IO[bytes], archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Return where the content of each record begins, and its bytes, by name."""
    found = {}
    for record in archive.infolist():
        header = read_at(raw, record.header_offset, _LOCAL_HEADER.size)
        mark, name_length, extra = _LOCAL_HEADER.unpack(header)
        if mark != b"PK\x03\x04":
            raise ValueError(f"no header of {record.filename}")
        start = record.header_offset + _LOCAL_HEADER.size + name_length + extra
        found[record.filename] = start, record.compress_size
    return found


class _Header(BaseModel):
    """The first line of the file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = CHECKSUMS_VERSION
    save_id: str


def joined(save_id: str, lines: Iterable[str]) -> str:
    """Return the content of `CHECKSUMS_NAME`."""
    header = {"format_version": CHECKSUMS_VERSION, "save_id": save_id}
    return "".join(f"{line}\n" for line in (json.dumps(header), *lines))


def digest_of_sums(content: bytes) -> str:
    """Return what a manifest says of the content of `CHECKSUMS_NAME`."""
    return xxh3_64_hexdigest(content)


_FILE = re.compile(rb'\{"file": ("(?:[^"\\]|\\.)*")')


class SavedSums:
    """The sums that a save took, of all of its files. Their file is read once for its own sum, and then a line when it is asked
    for.

    Args:
        digest: what the manifest says of the file (`digest_of_sums`).
        save_id: of the save, by the manifest.

    Raises:
        DamagedCheckpointError: the file is missing, isn't the one that the manifest tells of, or can't be read.
        FormatError: a later version wrote it.
    """

    def __init__(self, folder: Path, digest: str, save_id: str | None) -> None:
        self.path = folder / CHECKSUMS_NAME
        check_regular(self.path)
        self._places: dict[str, tuple[int, int]] = {}
        state, position, first = xxh3_64(), 0, b""
        try:
            with self.path.open("rb") as file:
                for line in iter(partial(file.readline, _LONGEST_LINE), b""):
                    if len(line) == _LONGEST_LINE:
                        raise ValueError("a line without an end")
                    first = first or line
                    state.update(line)
                    if (named := _FILE.match(line)) is not None:
                        self._places[json.loads(named[1])] = position, len(line)
                    position += len(line)
        except FileNotFoundError as error:
            told = f"{self.path} is missing, and the manifest tells of it: nothing says whether the files are whole"
            raise DamagedCheckpointError(f"{told}; {WAY_ON}") from error
        except OSError as error:
            raise DamagedCheckpointError(f"{self.path} can't be read: {error.strerror or error}; {WAY_ON}") from error
        except ValueError as error:
            raise damaged(self.path, "some bytes") from error
        if state.hexdigest() != digest:
            raise DamagedCheckpointError(f"{self.path} isn't the file that the manifest tells of; {WAY_ON}")
        try:
            header = _Header.model_validate_json(first)
        except ValidationError as error:
            raise damaged(self.path, "some bytes of the first line") from error
        if header.format_version > CHECKSUMS_VERSION:
            found = f"{self.path} has format version {header.format_version}"
            raise FormatError(f"{found}; this release reads up to {CHECKSUMS_VERSION}")
        if header.save_id != save_id:
            raise DamagedCheckpointError(f"{self.path} is of another save than the manifest; {WAY_ON}")

    @property
    def names(self) -> list[str]:
        """Names of all files that have sums."""
        return list(self._places)

    def of(self, name: str) -> FileSums | None:
        """Return the sums of a file; None if none were taken.

        Raises:
            DamagedCheckpointError: they can't be read.
        """
        if name not in self._places:
            return None
        position, numbytes = self._places[name]
        try:
            with self.path.open("rb") as file:
                file.seek(position)
                return FileSums.of_line(file.read(numbytes))
        except (OSError, ValueError, ValidationError) as error:
            raise DamagedCheckpointError(f"{self.path} can't be read: {error}; {WAY_ON}") from error


def sums_by(folder: Path, digest: str | None, save_id: str | None) -> Callable[[str], FileSums | None]:
    """Return a function that returns the checksums of a file by its path, or None if none were taken. It reads their file when it
    is first called; see `SavedSums` for the errors, and for the arguments."""

    @cache
    def saved() -> SavedSums | None:
        return None if digest is None else SavedSums(folder, digest, save_id)

    @cache
    def sums(path: str) -> FileSums | None:
        held = saved()
        return None if held is None else held.of(PurePosixPath(path).name)

    return sums
