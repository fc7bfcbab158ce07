"""Verify a checkpoint: every byte against every checksum, completeness, and whether its files are of one save."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

from xxhash import xxh3_64

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.bounds import check_regular
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checksums import FileSums, sum_of
from ucp_deepspeed.checkpoint.dcp.metadata import FILES_ENDING, METADATA_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.evidence import Evidence, Problem, evidence_of
from ucp_deepspeed.checkpoint.opening import LATEST_NAME, open_checkpoint, read_latest, resolve_tag
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.parts import archives_in
from ucp_deepspeed.checkpoint.torch_files.records import Record, records_of
from ucp_deepspeed.checkpoint.torch_files.structure import structure_of
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, home_of, is_unfinished
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.remote import located

Verdict = Literal["whole", "damaged", "unproven"]

Tell = Callable[[int], None]
"""Called with the number of bytes that were read."""


class _StoppedError(Exception):
    """Ends a thread whose result nobody waits for."""


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file of a checkpoint.

    Attributes:
        name: its name in the tag folder.
        numbytes: its size.
        unchecked: bytes that no checksum covers.
        problems: see `Verification`.
    """

    name: str
    numbytes: int
    unchecked: int
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        path: the tag folder.
        form: its form; None if it can't be opened.
        global_steps: steps of the run; None if it can't be opened.
        files: all files of the checkpoint that are there.
        problems: everything that is wrong.
        doubts: what may be wrong, and nothing tells whether it is.
        others: files in the folder that are no part of the checkpoint; they aren't verified.
        random_states: number of ranks whose random state is there.
    """

    path: Path
    form: str | None
    global_steps: int | None
    files: tuple[VerifiedFile, ...]
    problems: tuple[Problem, ...]
    doubts: tuple[str, ...]
    others: tuple[str, ...]
    random_states: int

    @property
    def numbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.numbytes for file in self.files)

    @property
    def unchecked(self) -> int:
        """Bytes that no checksum covers."""
        return sum(file.unchecked for file in self.files)

    @property
    def verdict(self) -> Verdict:
        """``damaged``: something is wrong. ``unproven``: nothing was found, but not all could be checked. Else ``whole``."""
        if self.problems:
            return "damaged"
        return "unproven" if self.unchecked or self.doubts else "whole"


def verify(
    path: str | Path,
    tag: str | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Compare every byte of a checkpoint with every checksum that there is, and the files with one another. Changes nothing.

    Args:
        path, tag: see `resolve_tag`.
        threads: files that are read at a time; by default as many as there are processors, up to eight.
        progress: called with (bytes read, bytes to read), from one thread at a time.

    Raises:
        CheckpointNotFoundError: nothing is there.
        DamagedCheckpointError: the folder is what an interrupted save left; or a file was changed meanwhile.
    """
    folder = resolve_tag(path, tag)
    evidence = evidence_of(folder)
    versions, sizes = FileVersions(), {}
    for name in evidence.names:
        check_regular(folder / name)
        versions.note(folder / name)
        sizes[name] = (folder / name).stat().st_size
    done, total, lock, stopped = 0, sum(sizes.values()), threading.Lock(), threading.Event()

    def tell(numbytes: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise _StoppedError
        with lock:
            done += numbytes
            progress(done, total)

    count = threads or min(os.cpu_count() or 1, tunables.MOST_THREADS)
    largest_first = sorted(evidence.names, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(count) as pool:
        try:
            read = list(pool.map(partial(_verified, evidence, tell), largest_first))
        finally:
            stopped.set()  # after an error, as of Ctrl-C, the other threads don't read their files to the end
    files = dict(zip(largest_first, read, strict=True))
    found = [*evidence.problems, *(problem for name in evidence.names for problem in files[name].problems)]
    evidence.problems[:] = found
    checkpoint, wrong, doubts = _opened(folder, found)
    more, more_doubts = evidence.of_one_save(checkpoint) if checkpoint is not None else ([], [])
    versions.check()
    return Verification(
        folder,
        None if checkpoint is None else checkpoint.form,
        None if checkpoint is None else checkpoint.run.global_steps,
        tuple(files[name] for name in evidence.names),
        tuple(dict.fromkeys((*found, *wrong, *more))),
        (*evidence.doubts, *doubts, *more_doubts),
        evidence.others,
        evidence.random_states,
    )


def _opened(folder: Path, found: Sequence[Problem]) -> tuple[Checkpoint | None, list[Problem], list[str]]:
    """Open the catalog; return it, problems that aren't of files which are known to be damaged, and doubts."""
    try:
        return open_checkpoint(folder), [], []
    except DamagedCheckpointError as error:
        known = any(problem.file is not None and problem.file in str(error) for problem in found)
        return None, [] if known else [Problem(None, "checkpoint", str(error))], []
    except UniversalCheckpointError as error:
        return None, [], [str(error)]


class _Segment(NamedTuple):
    """Bytes of a file, the record that they are all of, and whether the save summed them in pieces."""

    start: int
    stop: int
    record: Record | None
    pieces: bool


def _verified(evidence: Evidence, tell: Tell, name: str) -> VerifiedFile:
    """Read a file once, and compare all sums of it."""
    path, sums, found, unchecked = evidence.path / name, evidence.sums_of(name), [], 0
    records: tuple[Record, ...] = ()
    numbytes = path.stat().st_size
    if name.endswith((".pt", FILES_ENDING)):
        try:
            records = records_of(path)
            for bounds in archives_in(path) if records else ():
                structure = structure_of(path, bounds)
                unchecked += 0 if structure.is_torchs else structure.numbytes
                altered = structure.altered if structure.is_torchs else ()
                found += [Problem(name, "archive", f"{path}: {part} are altered; {REMEDY}") for part in altered]
        except DamagedCheckpointError as error:
            found.append(Problem(name, "archive", str(error)))
    if records:
        unchecked += sum(record.numbytes for record in records if record.crc is None)
    else:
        unchecked = numbytes
    if sums is not None and sums.size != numbytes:
        found.append(Problem(name, "size", f"{path} has {numbytes} bytes, and {sums.size} were saved; {REMEDY}"))
        sums = None
    try:
        segments = list(_segments(numbytes, records, sums))
        with path.open("rb", buffering=0) as file:
            found += [Problem(name, "bytes", text) for text in _differences(file, path, segments, sums, tell)]
    except OSError as error:
        found.append(Problem(name, "unreadable", f"{path} can't be read: {error.strerror or error}; {REMEDY}"))
    return VerifiedFile(name, numbytes, 0 if sums is not None or name in evidence.summed else unchecked, tuple(found))


def _segments(numbytes: int, records: Sequence[Record], sums: FileSums | None) -> Iterator[_Segment]:
    """Cut a file at the bounds of records and of ranges in pieces. Where these cross, a record isn't compared by its own sum."""
    ranges = {(start, start + length) for start, length in (sums.ranges if sums is not None else ())}
    own = {(record.start, record.stop): record for record in records}
    bounds, place = sorted(ranges | {each for each in own if not _crosses(each, ranges)}), 0
    for start, stop in bounds:
        if place < start:
            yield _Segment(place, start, None, False)
        yield _Segment(start, stop, own.get((start, stop)), (start, stop) in ranges)
        place = stop
    if place < numbytes:
        yield _Segment(place, numbytes, None, False)


def _crosses(bounds: tuple[int, int], ranges: set[tuple[int, int]]) -> bool:
    return bounds not in ranges and any(start < bounds[1] and bounds[0] < stop for start, stop in ranges)


def _differences(
    file: IO[bytes], path: Path, segments: Sequence[_Segment], sums: FileSums | None, tell: Tell
) -> Iterator[str]:
    """Yield what differs in a file from what was saved."""
    rest, number = xxh3_64(), 0
    buffer = memoryview(bytearray(sums.piece if sums is not None else tunables.SUMMED_NUMBYTES))
    for segment in segments:
        crc, told = 0, False
        for start, part in _parts(file, segment, buffer):
            tell(len(part))
            if segment.record is not None and segment.record.crc is not None:
                crc = zlib.crc32(part, crc)
            if sums is None:
                continue
            if not segment.pieces:
                rest.update(part)
                continue
            if sum_of(part) != sums.of_pieces[number]:
                told = True
                yield f"{path}: bytes {start} to {start + len(part)} differ from what was saved; {REMEDY}"
            number += 1
        record = segment.record
        if record is not None and record.crc is not None and crc != record.crc and not told:
            place = f"bytes {record.start} to {record.stop}, record {record.name},"
            yield f"{path}: {place} have the CRC-32 {crc:08x}, and {record.crc:08x} was saved; {REMEDY}"
    if sums is not None and rest.intdigest() != sums.rest:
        yield f"{path}: bytes outside of its tensors differ from what was saved; {REMEDY}"


def _parts(file: IO[bytes], segment: _Segment, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the place and the bytes of each part of a segment, all but the last as long as the buffer."""
    for start in range(segment.start, segment.stop, len(buffer)):
        part = buffer[: segment.stop - start]
        held = file.seek(start) - start
        while held < len(part):
            count = file.readinto(part[held:])  # type: ignore[attr-defined]
            if not count:
                raise OSError("it became shorter meanwhile")
            held += count
        yield start, part


@dataclass(frozen=True)
class VerifiedTags:
    """The result of `verify_tags`.

    Attributes:
        latest: the tag that the file ``latest`` names; None if there is none.
        tags: results by name, newest first; or why there is none, as for a file that was changed meanwhile.
    """

    latest: str | None
    tags: Mapping[str, Verification | str]


def _tags_of(root: Path) -> list[str]:
    """Return the names of all tags in a folder, also of unfinished ones, by their newest files' times. A tag may
    be a path of two names."""
    written: dict[str, float] = {}
    for folder in _folders_in(root):
        inner = () if _time_of(folder) else _folders_in(folder)
        written |= {str(home_of(tag).relative_to(root)): time for tag in (folder, *inner) if (time := _time_of(tag))}
    return sorted(written, key=lambda name: -written[name])


def _folders_in(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir() and not is_unfinished(entry)]


def _time_of(folder: Path) -> float:
    """Return when the newest file of a tag was written; 0 if the folder is none."""
    return max((file.stat().st_mtime for file in folder.iterdir() if file.name.endswith(_ENDINGS)), default=0.0)


_ENDINGS = "_states.pt", METADATA_NAME, INDEX_NAME, MANIFEST_NAME, MARK_NAME
"""Ends of the names of files by which a tag folder is known."""


def verify_tags(
    root: str | Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifiedTags:
    """Verify all tags of a folder; see `verify`. ``progress`` begins anew for each.

    Raises:
        CheckpointNotFoundError: there is no such folder, or no tag in it.
    """
    root = located(root)
    if not root.is_dir() or not (names := _tags_of(root)):
        raise CheckpointNotFoundError(f"no tag folders in {root}" if root.is_dir() else f"no folder at {root}")
    latest, named = root / LATEST_NAME, None
    found: dict[str, Verification | str] = {}
    try:
        named = read_latest(latest) if latest.is_file() else None
    except DamagedCheckpointError as error:
        found[LATEST_NAME] = str(error)
    for name in names:
        try:
            found[name] = verify(root, name, threads=threads, progress=progress)
        except UniversalCheckpointError as error:
            found[name] = str(error)
    return VerifiedTags(named, found)
