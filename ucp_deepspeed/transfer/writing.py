"""Filling the files of a universal checkpoint: workers gather chunks from the source and write each once, at its final place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from ucp_deepspeed.checkpoint.torch_files import NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.transfer.atom_files import AtomFile, Chunk, DataRange, chunks_of, unit_of
from ucp_deepspeed.transfer.copying import FileReader, TransferCount, gather

CHUNK_NUMBYTES = 16 << 20
"""Bytes that one worker gathers before it writes them: large enough for sequential speed, small enough for any machine."""

LOOK_UP_SECONDS = 0.2
"""A signal that comes just before Python begins to wait for a lock is handled at the end of the wait only."""


def create_files(folder: Path, files: Sequence[AtomFile]) -> None:
    """Make the files, each of its final size and with its header."""
    for file in files:
        descriptor = os.open(folder / file.file_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.truncate(descriptor, len(file.header) + file.data_numbytes)
            _write_all(descriptor, memoryview(file.header), 0)
        finally:
            os.close(descriptor)


def write_share(
    view: UniversalView,
    folder: Path,
    share: Sequence[DataRange],
    *,
    workers: int,
    chunk_numbytes: int = CHUNK_NUMBYTES,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> TransferCount:
    """Fill ranges of files that exist; when this returns they are on disk.

    Args:
        share: at most one range of a file.
        workers: threads; each needs one buffer of ``chunk_numbytes``.
        progress: called with (bytes written, bytes to write) after each chunk, from one thread at a time.
        check: called now and then; what it raises ends the work.

    Raises:
        DamagedCheckpointError: a source file is missing or truncated.
        MismatchError: the source doesn't hold each element exactly once.
        OSError: the disk is full, or can't be written.
    """
    if not share:
        return TransferCount()
    reader = FileReader()
    with _opened(folder, share) as descriptors:
        task = _Task(view, share, descriptors, reader, chunk_numbytes, progress)
        try:
            with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
                try:
                    _wait([pool.submit(task.work) for _ in range(max(workers, 1))], check)
                except BaseException:
                    task.stop.set()
                    raise
        finally:
            reader.close()
    return task.count


class _Task:
    """What the workers share."""

    def __init__(
        self,
        view: UniversalView,
        share: Sequence[DataRange],
        descriptors: dict[str, int],
        reader: FileReader,
        chunk_numbytes: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.count, self.stop = TransferCount(), threading.Event()
        self._view, self._descriptors, self._reader, self._progress = view, descriptors, reader, progress
        self._lock = threading.Lock()
        self._chunks = (chunk for held in share for chunk in chunks_of(held, chunk_numbytes))
        self._unwritten = {held.file.file_name: held.numbytes for held in share}
        self._total = sum(self._unwritten.values())
        self._buffer_numbytes = min(unit_of(chunk_numbytes), max(self._unwritten.values()))

    def work(self) -> None:
        """Take one chunk after another, until there is none."""
        # One buffer, used again and again: allocated anew for each chunk they would leave holes in the heap.
        buffer = torch.empty(self._buffer_numbytes, dtype=torch.uint8)
        while not self.stop.is_set() and (chunk := self._next()) is not None:
            descriptor = self._descriptors[chunk.file.file_name]
            done = _fill_chunk(self._view, chunk, buffer, descriptor, self._reader)
            if self._written(chunk, done):
                os.fsync(descriptor)

    def _next(self) -> Chunk | None:
        with self._lock:
            return next(self._chunks, None)

    def _written(self, chunk: Chunk, done: TransferCount) -> bool:
        """Count a chunk; whether it was the last of its file."""
        with self._lock:
            self.count.add(done)
            self._unwritten[chunk.file.file_name] -= chunk.numbytes
            if self._progress is not None:
                self._progress(self._total - sum(self._unwritten.values()), self._total)
            return not self._unwritten[chunk.file.file_name]


def _wait(futures: Collection[Future[None]], check: Callable[[], None]) -> None:
    """Until all are done, or one has failed, whose error is raised. Looks up in between, so that signals are handled in time."""
    pending: set[Future[None]] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=LOOK_UP_SECONDS, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        check()


@contextmanager
def _opened(folder: Path, share: Sequence[DataRange]) -> Iterator[dict[str, int]]:
    """Descriptors by file name."""
    descriptors: dict[str, int] = {}
    try:
        for held in share:
            descriptors[held.file.file_name] = os.open(folder / held.file.file_name, os.O_RDWR)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _fill_chunk(
    view: UniversalView, chunk: Chunk, buffer: torch.Tensor, descriptor: int, reader: FileReader
) -> TransferCount:
    count = TransferCount()
    for atom in chunk.atoms:
        itemsize = ITEMSIZE[atom.dtype]
        start = max(chunk.data_start, atom.data_offset)
        stop = min(chunk.data_stop, atom.data_offset + atom.numbytes)
        target = buffer[start - chunk.data_start : stop - chunk.data_start].view(NAMED_DTYPES[atom.dtype])
        count.add(gather(view, atom.name, atom.state, (start - atom.data_offset) // itemsize, target, reader))
    file_offset = len(chunk.file.header) + chunk.data_start
    _write_all(descriptor, memoryview(buffer[: chunk.numbytes].numpy()), file_offset)
    if hasattr(os, "posix_fadvise"):
        # Linux begins to write the pages to disk: meanwhile the next chunk is gathered, and little is left for the flush.
        os.posix_fadvise(descriptor, file_offset, chunk.numbytes, os.POSIX_FADV_DONTNEED)
    return count


def _write_all(descriptor: int, data: memoryview, file_offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, file_offset)
        data, file_offset = data[written:], file_offset + written
