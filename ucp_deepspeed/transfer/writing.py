"""Fill the files of an output: workers gather chunks from the source and write each once, at its final place."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checksums import sum_of
from ucp_deepspeed.checkpoint.output import Literal, OutputFile, Region
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums, Run
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import naming
from ucp_deepspeed.layout.box import flat_interval_boxes
from ucp_deepspeed.transfer.copying import FileReader, TransferCount, gather


@dataclass(frozen=True, slots=True)
class FileRange:
    """A part of one file, in bytes."""

    file: OutputFile
    start: int
    stop: int

    @property
    def numbytes(self) -> int:
        """Size of the range in bytes."""
        return self.stop - self.start

    @property
    def parts(self) -> Sequence[Region | Literal]:
        """The parts of the file that overlap the range."""
        first = bisect_right(self.file.parts, self.start, key=lambda part: part.file_offset + part.numbytes)
        return self.file.parts[first : bisect_left(self.file.parts, self.stop, key=attrgetter("file_offset"))]


def share_of(files: Sequence[OutputFile], rank: int, ranks: int) -> tuple[FileRange, ...]:
    """Return the ranges that one of so many ranks writes. They end with pages, so that shares differ by up to a page."""
    total = sum(file.numbytes for file in files)
    start, stop = total * rank // ranks, total * (rank + 1) // ranks
    found: list[FileRange] = []
    for file in files:
        held = FileRange(file, _page_start(file, start), _page_start(file, stop))
        if held.numbytes:
            found.append(held)
        start, stop = start - file.numbytes, stop - file.numbytes
    return tuple(found)


def _page_start(file: OutputFile, offset: int) -> int:
    """Return where the page that holds this byte begins; for a byte outside, the nearer end of the file."""
    page = tunables.PAGE_NUMBYTES
    return file.numbytes if offset >= file.numbytes else max(offset, 0) // page * page


def chunks_of(held: FileRange, chunk_numbytes: int) -> Iterator[FileRange]:
    """Cut a range into chunks of about ``chunk_numbytes``, on element boundaries, and if these are large on those of pieces that
    have sums. One worker fills a chunk at once."""
    unit, start = _unit_of(chunk_numbytes), held.start
    first = held.file.summed[0][0] if held.file.summed else 0
    while start < held.stop:
        stop = min(start + unit - (start - first) % unit, held.stop)
        yield FileRange(held.file, start, stop)
        start = stop


def _unit_of(chunk_numbytes: int) -> int:
    """Return the size of a chunk, rounded down to whole pieces, or to an element boundary of every dtype."""
    step = tunables.PIECE_NUMBYTES if chunk_numbytes >= tunables.PIECE_NUMBYTES else 8
    return max(chunk_numbytes // step, 1) * step


Sums = dict[str, dict[int, int]]
"""For each file, by its name: number of a piece → its sum."""


def _sums_in(chunk: FileRange, data: memoryview) -> dict[int, int]:
    """Return the sums of the pieces that lie whole in a chunk."""
    found: dict[int, int] = {}
    for first, numbytes in chunk.file.summed:
        step, stop = tunables.PIECE_NUMBYTES, min(chunk.stop, first + numbytes)
        for number in range(max(-(-(chunk.start - first) // step), 0), -(-numbytes // step)):
            low, high = first + number * step, min(first + (number + 1) * step, first + numbytes)
            if high > stop:
                break
            found[number] = sum_of(data[low - chunk.start : high - chunk.start])
    return found


Runs = dict[str, list[Run]]
"""For each file, by its name: runs of bytes in records, with the CRC-32 of each."""


def _runs_in(chunk: FileRange, data: memoryview) -> list[Run]:
    """Return the parts of records that lie in a chunk."""
    found, records = [], chunk.file.records
    first = bisect_right(records, chunk.start, key=lambda record: record[1])
    for start, stop in records[first : bisect_left(records, chunk.stop, key=lambda record: record[0])]:
        low, high = max(start, chunk.start), min(stop, chunk.stop)
        found.append(Run(low, high, zlib.crc32(data[low - chunk.start : high - chunk.start])))
    return found


def create_files(folder: Path, files: Sequence[OutputFile]) -> None:
    """Make the files, each with its final size."""
    for file in files:
        path = folder / file.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("xb") as made:
            made.truncate(file.numbytes)


def write_share(
    view: UniversalView,
    folder: Path,
    share: Sequence[FileRange],
    workers: int,
    chunk_numbytes: int = tunables.WRITTEN_NUMBYTES,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] = lambda: None,
    sums: RecordSums | None = None,
    pieces: Sums | None = None,
    runs: Runs | None = None,
) -> TransferCount:
    """Fill ranges of files that exist; return when they are on disk.

    Args:
        share: at most one range of a file.
        workers, chunk_numbytes, progress: see `ucp_deepspeed.transfer.conversion.convert`.
        check: called now and then; an error that it raises ends the work.
        sums: to sum what is read; see `FileReader`.
        pieces: receives the sums of what is written, for pieces that lie in one chunk.
        runs: receives the CRC-32 of what is written of records.

    Raises:
        DamagedCheckpointError: a source file is missing, truncated or isn't what was saved, or was changed meanwhile.
        MismatchError: the source doesn't hold each element exactly once.
        OSError: the disk is full, or can't be written.
    """
    if not share:
        return TransferCount()
    task, workers = _Task(view, folder, share, chunk_numbytes, progress, sums, pieces, runs), max(workers, 1)
    with closing(task), ThreadPoolExecutor(workers) as pool:
        try:
            _wait([pool.submit(task.work) for _ in range(workers)], check)
            task.finish()
            view.checkpoint.versions.check()
        finally:
            task.stop.set()
    return task.count


class _Task:
    """The state that the workers share."""

    def __init__(
        self,
        view: UniversalView,
        folder: Path,
        share: Sequence[FileRange],
        chunk_numbytes: int,
        progress: Callable[[int, int], None] | None,
        sums: RecordSums | None,
        pieces: Sums | None,
        runs: Runs | None,
    ) -> None:
        self.count, self.stop = TransferCount(), threading.Event()
        self._view, self._folder, self._progress = view, folder, progress
        self._pieces = {} if pieces is None else pieces
        self._runs = {} if runs is None else runs
        self._reader = FileReader(view.checkpoint.versions, sums=sums)
        self._lock = threading.Lock()
        self._outputs: dict[str, _Output] = {}
        self._chunks = (chunk for held in share for chunk in chunks_of(held, chunk_numbytes))
        self._unwritten = {held.file.file_name: held.numbytes for held in share}
        self._total = sum(self._unwritten.values())
        self._buffer_numbytes = min(_unit_of(chunk_numbytes), max(self._unwritten.values()))

    def work(self) -> None:
        """Take one chunk after another, until there is none."""
        # One buffer, used again and again: new buffers for each chunk would leave holes in the heap.
        buffer = torch.frombuffer(mmap.mmap(-1, self._buffer_numbytes), dtype=torch.uint8)
        while not self.stop.is_set() and (taken := self._next()) is not None:
            chunk, output = taken
            done = _gather_chunk(self._view, chunk, buffer, self._reader)
            data = memoryview(buffer[: chunk.numbytes].numpy())
            sums, runs = _sums_in(chunk, data), _runs_in(chunk, data)
            output.write(data, chunk.start)
            if self._written(chunk, done, sums, runs):
                output.flush()
                output.close()

    def finish(self) -> None:
        """Check what was read in part; called when all is read."""
        self._reader.finish()
        self.count.bytes_checked = self._reader.bytes_checked

    def close(self) -> None:
        """Close the files; called when no worker works any more."""
        self._reader.close()
        for output in self._outputs.values():
            output.close()

    def _next(self) -> tuple[FileRange, _Output] | None:
        """Return a chunk, and the file that it goes to. A file is open from its first chunk to its last."""
        with self._lock:
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            name = chunk.file.file_name
            if name not in self._outputs:
                self._outputs[name] = _Output(self._folder / name)
            return chunk, self._outputs[name]

    def _written(self, chunk: FileRange, done: TransferCount, sums: Mapping[int, int], runs: Sequence[Run]) -> bool:
        """Count a chunk; return whether it was the last of its file."""
        with self._lock:
            self.count.add(done)
            self._pieces.setdefault(chunk.file.file_name, {}).update(sums)
            self._runs.setdefault(chunk.file.file_name, []).extend(runs)
            self._unwritten[chunk.file.file_name] -= chunk.numbytes
            if self._progress is not None:
                self._progress(self._total - sum(self._unwritten.values()), self._total)
            return not self._unwritten[chunk.file.file_name]


class _Output:
    """A file that exists, to fill in any order: straight to the disk where its file system can do that.

    Otherwise a chunk is copied into the kernel's pages first, and the disk is idle until the kernel writes them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, os.open(path, os.O_RDWR)
        self._open = [self._descriptor]
        self._direct: int | None = None
        with suppress(OSError, AttributeError):  # a file system, or an operating system, without direct writes
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
            self._open.append(self._direct)

    def write(self, data: memoryview, file_offset: int) -> None:
        """Write all of it."""
        with naming(self._path):
            straight = self._write_direct(data, file_offset)
            data, file_offset = data[straight:], file_offset + straight
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], file_offset + done)
        if done and hasattr(os, "posix_fadvise"):
            # Linux begins to write the pages to disk: the next chunk is gathered meanwhile, and little is left for the flush.
            os.posix_fadvise(self._descriptor, file_offset, done, os.POSIX_FADV_DONTNEED)

    def _write_direct(self, data: memoryview, file_offset: int) -> int:
        """Write the data's whole blocks; return how many bytes were written."""
        done, stop = 0, len(data) // tunables.BLOCK_NUMBYTES * tunables.BLOCK_NUMBYTES
        descriptor = self._direct
        if descriptor is None or file_offset % tunables.BLOCK_NUMBYTES:
            return 0
        try:
            while done < stop:
                done += os.pwrite(descriptor, data[done:stop], file_offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = None  # its blocks are larger
        return done

    def flush(self) -> None:
        """Return when all is on disk."""
        with naming(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; it can be called again."""
        with naming(self._path):
            while self._open:
                os.close(self._open.pop())


def _wait(futures: Collection[Future[None]], check: Callable[[], None]) -> None:
    """Wait until all are done, or raise the error of one that failed. Wake up in between, so that signals are handled in time."""
    pending: set[Future[None]] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=tunables.LOOK_UP_SECONDS, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        check()


def _gather_chunk(view: UniversalView, chunk: FileRange, buffer: torch.Tensor, reader: FileReader) -> TransferCount:
    count = TransferCount()
    if chunk.file.has_gaps:
        buffer[: chunk.numbytes].zero_()
    for part in chunk.parts:
        start, stop = max(chunk.start, part.file_offset), min(chunk.stop, part.file_offset + part.numbytes)
        target, first = buffer[start - chunk.start : stop - chunk.start], start - part.file_offset
        if isinstance(part, Literal):
            target.copy_(torch.frombuffer(bytearray(part.data[first : first + target.numel()]), dtype=torch.uint8))
            continue
        elements = target.view(NAMED_DTYPES[part.dtype])
        local_start = part.local_start + first // ITEMSIZE[part.dtype]
        if part.transposed:
            count.add(_gather_columns(view, part, local_start, elements, reader))
        else:
            count.add(gather(view, part.name, part.state, local_start, elements, reader, part.layout, part.rank))
    return count


def _gather_columns(
    view: UniversalView, part: Region, start: int, target: torch.Tensor, reader: FileReader
) -> TransferCount:
    """Fill ``target`` with a run of a local matrix's elements, column by column. Blocks of whole rows are read for it: another
    chunk of the same matrix reads them again, from the page cache."""
    rows, columns = part.layout.locals[part.rank].shape
    count, place = TransferCount(), 0
    for box in flat_interval_boxes((columns, rows), start, start + target.numel()):
        found = target[place : place + box.numel].view(box.shape)
        place += box.numel
        step = max(tunables.PART_NUMBYTES // (columns * target.element_size()), 1)
        for first in range(box.start[1], box.stop[1], step):
            stop = min(first + step, box.stop[1])
            block = torch.zeros((stop - first) * columns, dtype=target.dtype)
            count.add(gather(view, part.name, part.state, first * columns, block, reader, part.layout, part.rank))
            cut = block.view(-1, columns)[:, box.start[0] : box.stop[0]]
            found[:, first - box.start[1] : stop - box.start[1]] = cut.t()
    return count
