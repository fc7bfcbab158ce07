"""The bytes of an archive outside of its records: headers, padding and the directory, as torch writes them.

None of them has a checksum. But torch's writer (``caffe2/serialize/inline_container.cc``, miniz) leaves no choice: names,
sizes, CRC-32 and places of the records tell all of these bytes. So an altered one is seen.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from copy import copy
from pathlib import Path
from typing import IO, NamedTuple, cast

from ucp_deepspeed.checkpoint.torch_files.archives import DEFAULT_ALIGNMENT, LARGE, content_start
from ucp_deepspeed.checkpoint.torch_files.damage import telling_damage
from ucp_deepspeed.checkpoint.torch_files.parts import FilePart

_NAMES_IN_UTF8, _DESCRIBED_BEHIND = 0x0800, 0x0008
"""Flags of a record: its CRC-32 stands in a descriptor behind its content, if it has any."""

CRC_IN_DESCRIPTOR, CRC_IN_DIRECTORY = 4, 16
"""Places of the CRC-32, 4 bytes."""

_MADE_BY, _NEEDED = 0x031E, 45
"""Versions of zip in the record at the end of the directory."""


class _Part(NamedTuple):
    """Bytes that torch would have written: where, which, and their name."""

    start: int
    expected: bytes
    what: str


class Structure(NamedTuple):
    """A comparison of an archive's bytes with those that torch would have written.

    Attributes:
        numbytes: bytes outside of records.
        altered: those that differ, in words. If most do, another program laid the archive out: then `is_torchs` is false, and
            nothing is known of these bytes.
    """

    numbytes: int
    altered: Sequence[str]
    is_torchs: bool


def structure_of(path: Path, bounds: tuple[int, int] | None = None) -> Structure:
    """Compare an archive.

    Args:
        bounds: its first byte in the file, and the byte behind it; by default it is the whole file.

    Raises:
        DamagedCheckpointError: it can't be read.
    """
    first, stop = (0, path.stat().st_size) if bounds is None else bounds
    with (
        telling_damage(path),
        closing(FilePart(path, first, stop - first)) as raw,
        zipfile.ZipFile(cast(IO[bytes], raw)) as archive,
    ):
        entries = archive.infolist()
        named = {entry.filename.partition("/")[2]: entry for entry in entries}
        setting = named.get(".storage_alignment")
        alignment = DEFAULT_ALIGNMENT
        if setting is not None and setting.file_size < 9:
            told = copy(setting)
            told.CRC = None  # type: ignore[assignment]  # an archive may have no sums; those of others are compared elsewhere
            alignment = max(int(archive.read(told)), 1)
        size, altered, parts, end = stop - first, [], 0, 0
        for part in _parts(entries, alignment, archive.start_dir):
            parts += 1
            raw.seek(part.start)
            if raw.read(len(part.expected)) != part.expected:
                altered.append(f"bytes {first + part.start} to {first + part.start + len(part.expected)}, {part.what}")
            end = part.start + len(part.expected)
    if end != size:
        altered.append(f"the archive's end: byte {end} of {size}")
    return Structure(size - sum(entry.file_size for entry in entries), altered, 2 * len(altered) <= parts)


def _parts(entries: Sequence[zipfile.ZipInfo], alignment: int, directory: int) -> Iterator[_Part]:
    """Yield all parts of an archive but the contents of records, in the order of the file."""
    end, listed = 0, []
    for entry in entries:
        header = header_of(entry, alignment)
        if entry.header_offset != end:  # torch leaves nothing between records
            yield _Part(end, b"?", f"before the header of {entry.filename}")
        yield _Part(entry.header_offset, header, f"the header of {entry.filename}")
        end = entry.header_offset + len(header) + entry.file_size
        if entry.file_size:
            behind = descriptor_of(entry)
            yield _Part(end, behind, f"the descriptor of {entry.filename}")
            end += len(behind)
        listed.append(listed_as(entry))
    place = directory
    for entry, line in zip(entries, listed, strict=True):
        yield _Part(
            place, line if place != directory or directory == end else b"?", f"{entry.filename} in the directory"
        )
        place += len(line)
    yield _Part(place, end_of(len(listed), directory, place - directory), "the end of the directory")


def _wide(entry: zipfile.ZipInfo, in_header: bool) -> bytes:
    """Return the numbers that need 64 bits, as an extra field: the size, stored and unpacked, and the place."""
    large = [0 if in_header else entry.file_size] * (2 if entry.file_size >= LARGE else 0)
    large += [entry.header_offset] * (entry.header_offset >= LARGE)
    return struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""


def _flags(entry: zipfile.ZipInfo) -> int:
    return _NAMES_IN_UTF8 | (_DESCRIBED_BEHIND if entry.file_size else 0)


def header_of(entry: zipfile.ZipInfo, alignment: int) -> bytes:
    """Return what stands in front of a record: header, name, and padding up to the content."""
    name, wide = entry.filename.encode(), _wide(entry, in_header=True)
    start = content_start(entry.header_offset, len(name), entry.file_size, alignment)
    extra = start - entry.header_offset - 30 - len(name)
    padding = struct.pack("<2sH", b"FB", extra - len(wide) - 4) + b"Z" * (extra - len(wide) - 4)
    zeros = (0,) * 6
    return struct.pack("<4s5H3I2H", b"PK\3\4", 0, _flags(entry), *zeros, len(name), extra) + name + wide + padding


def descriptor_of(entry: zipfile.ZipInfo) -> bytes:
    """Return what stands behind a record that isn't empty. Its CRC-32 is at byte `CRC_IN_DESCRIPTOR`."""
    wide = max(entry.header_offset, entry.file_size) >= LARGE
    return struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", entry.CRC, entry.file_size, entry.file_size)


def listed_as(entry: zipfile.ZipInfo) -> bytes:
    """Return a record's entry in the directory. Its CRC-32 is at byte `CRC_IN_DIRECTORY`."""
    name, wide = entry.filename.encode(), _wide(entry, in_header=False)
    size, place = min(entry.file_size, LARGE), min(entry.header_offset, LARGE)
    head = struct.pack("<4s6H3I", b"PK\1\2", 0, 0, _flags(entry), 0, 0, 0, entry.CRC if size else 0, size, size)
    return head + struct.pack("<5H2I", len(name), len(wide), 0, 0, 0, 0, place) + name + wide


def end_of(count: int, directory: int, numbytes: int) -> bytes:
    """Return the two records at the end, for 64 and for 32 bits, with a locator between them."""
    counts = count, count, numbytes, directory
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _MADE_BY, _NEEDED, 0, 0, *counts)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, directory + numbytes, 1)
    narrow = min(count, 0xFFFF), min(count, 0xFFFF), min(numbytes, LARGE), min(directory, LARGE)
    return wide + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *narrow, 0)
