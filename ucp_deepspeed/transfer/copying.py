"""Read files straight into place, or through memory maps or pinned memory, and copy strided blocks."""

from __future__ import annotations

import errno
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from typing import TypeVar

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums, Run
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.layout import Layout
from ucp_deepspeed.layout.box import row_major_strides
from ucp_deepspeed.plan import BlockCopy, Fragment, StridedView, Target, joined, plan_tensor
from ucp_deepspeed.remote import RemotePath, is_url, located
from ucp_deepspeed.transfer.open_files import OpenFile, RemoteFile, most_open, unreadable
from ucp_deepspeed.transfer.pieces import PieceChecks
from ucp_deepspeed.transfer.staging import Lanes

T = TypeVar("T")

_PLANNING = threading.Lock()
"""Held while a plan asks the catalog: that may open files, and torch's allow-list of classes belongs to the whole process."""


@dataclass
class TransferCount:
    """The figures of a transfer: bytes, block copies, the files that were read, and the bytes whose checksums were compared."""

    bytes_read: int = 0
    copies: int = 0
    files: set[str] = field(default_factory=set)
    bytes_checked: int = 0

    def add(self, other: TransferCount) -> None:
        """Add another transfer's figures."""
        self.bytes_read += other.bytes_read
        self.bytes_checked += other.bytes_checked
        self.copies += other.copies
        self.files |= other.files


class FileReader:
    """Reads blocks of files: straight to their place, or through memory maps where they are strided or converted.

    It is thread-safe. The files that were used last stay open until `close`.

    Args:
        versions: versions of the checkpoint's files; they show files that were replaced since it was opened, and have their
            checksums, if there are any. A piece that was read whole and isn't what was saved is a DamagedCheckpointError.
        mapped: False to do without maps, as where the file system has none.
        request_numbytes: most bytes of one request to a store. Each thread has them in memory beside what it fills.
        sums: to sum what is read of archives without checksums, apart from blocks with gaps. A record that was read whole and
            isn't what was saved is a DamagedCheckpointError.
    """

    def __init__(
        self,
        versions: FileVersions | None = None,
        *,
        mapped: bool = True,
        sums: RecordSums | None = None,
        request_numbytes: int = tunables.REQUEST_NUMBYTES,
    ) -> None:
        self._mapped, self._sums, self._request_numbytes = mapped, sums, request_numbytes
        self._versions = versions or FileVersions()
        self._files: dict[str, OpenFile | RemoteFile] = {}
        self._checks: dict[str, PieceChecks | None] = {}
        self._most_open = most_open()
        self._lock = threading.Lock()

    def read_into(self, view: StridedView[FileExtent], target: torch.Tensor) -> None:
        """Read a run of elements into contiguous memory of the CPU, of the same dtype, with the errors of `block`."""
        file, start = self._open(view, target.numel())
        self._read(file, start, memoryview(target.detach().view(-1).view(torch.uint8).numpy()))

    def block(self, view: StridedView[FileExtent], shape: tuple[int, ...]) -> torch.Tensor:
        """Return a block inside an extent. If the file is mapped and its elements are aligned, it stays on disk until it is used.

        Otherwise it takes memory: for the block or, where its runs are short, for all that it spans.

        Raises:
            DamagedCheckpointError: the file is missing or ends before the extent does.
        """
        itemsize, span, dtype = ITEMSIZE[view.buffer.dtype], view.span(shape), NAMED_DTYPES[view.buffer.dtype]
        file, start = self._open(view, span)
        if not file.is_mapped and _runs(view, shape) is not None:
            block = torch.empty(shape, dtype=dtype, device="cpu")
            self.block_into(view, block)
            return block
        raw = file.range(start, start + span * itemsize)
        if file.is_mapped and span != prod(shape):
            self._touch(file, start, span * itemsize, prod(shape) * itemsize)
        else:
            self._add(file, start, memoryview(raw.numpy()))
        # torch reads aligned memory only; safetensors files from elsewhere may hold elements anywhere.
        aligned = raw if raw.data_ptr() % itemsize == 0 else raw.clone()
        return aligned.view(dtype).as_strided(shape, view.strides)

    def block_into(self, view: StridedView[FileExtent], target: torch.Tensor) -> None:
        """Read a block into contiguous memory of the CPU, of its shape and dtype: runs one by one, or by `block` if they are
        short. The errors are those of `block`."""
        runs, itemsize = _runs(view, tuple(target.shape)), ITEMSIZE[view.buffer.dtype]
        if runs is None:
            target.copy_(self.block(view, tuple(target.shape)))
            return
        file, start = self._open(view, view.span(tuple(target.shape)))
        memory, numbytes = memoryview(target.view(-1).view(torch.uint8).numpy()), runs[1] * itemsize
        if len(runs[0]) > 1 and not file.is_remote and self._checks_of(file.path) is not None:
            for number, run in enumerate(runs[0]):
                file.read_into(start + run * itemsize, memory[number * numbytes : (number + 1) * numbytes])
            self._touch(file, start, view.span(tuple(target.shape)) * itemsize, len(memory))
            return
        for number, run in enumerate(runs[0]):
            self._read(file, start + run * itemsize, memory[number * numbytes : (number + 1) * numbytes])

    def copy_in_steps(self, view: StridedView[FileExtent], target: torch.Tensor) -> bool:
        """Copy a run of a mapped file that has checksums, each part as soon as it is summed. Return False if it isn't such a run.

        Otherwise `block` would sum all of it before it is copied, and it would come from memory twice.
        """
        itemsize, span, run = ITEMSIZE[view.buffer.dtype], target.numel(), _run_of(view, tuple(target.shape))
        if not target.dim() or not span or run is None or run[1]:
            return False
        file, start = self._open(view, span)
        checks = self._checks_of(file.path) if file.is_mapped else None
        if checks is None:
            return False
        raw = file.range(start, start + span * itemsize)
        if raw.data_ptr() % itemsize:
            return False
        bits, block = memoryview(raw.numpy()), raw.view(NAMED_DTYPES[view.buffer.dtype]).view(target.shape)
        rows = target.shape[0]
        row = span // rows * itemsize
        step = max(tunables.STEP_NUMBYTES // row, 1)
        with self._telling_versions(file.path):
            for low in range(0, rows, step):
                high = min(low + step, rows)
                checks.read(start + low * row, bits[low * row : high * row])
                target[low:high].copy_(block[low:high])
        return True

    @property
    def bytes_checked(self) -> int:
        """Bytes that were read and lie in pieces that agree with their checksums."""
        return sum(checks.bytes_checked for checks in self._checks.values() if checks is not None)

    def finish(self) -> None:
        """Check pieces that were read in part, those first of which the most was read. Their rest is read too, unless that would
        be much beside what was read, or be fetched from a store.

        Raises:
            DamagedCheckpointError: see `block`; or a piece isn't what was saved.
        """
        checked = {path: checks for path, checks in self._checks.items() if checks is not None and not is_url(path)}
        left = max(sum(checks.bytes_read for checks in checked.values()) // 16, tunables.COMPLETED_NUMBYTES)
        found = ((*part, path) for path, checks in checked.items() for part in checks.partly_read())
        for _, number, numbytes, path in sorted(found, reverse=True):
            left -= numbytes
            if left < 0:
                return
            with self._telling_versions(path):
                checked[path].check(number)

    def _checks_of(self, path: str) -> PieceChecks | None:
        with self._lock:
            if path not in self._checks:
                sums = self._versions.sums(path)
                self._checks[path] = None if sums is None else PieceChecks(path, sums, partial(self._again, path))
            return self._checks[path]

    def _again(self, path: str, start: int, stop: int) -> memoryview:
        return memoryview(self._file(path).range(start, stop).numpy())

    def _touch(self, file: OpenFile | RemoteFile, start: int, span: int, numbytes: int) -> None:
        """Note bytes that were read evenly within a span."""
        if (checks := self._checks_of(file.path)) is not None:
            with self._telling_versions(file.path):
                checks.touched(start, start + span, numbytes)

    @contextmanager
    def _telling_versions(self, path: str) -> Iterator[None]:
        """Tell of a file that was saved again meanwhile, and not of damage."""
        try:
            yield
        except DamagedCheckpointError:
            self._versions.check([path])
            raise

    def _read(self, file: OpenFile | RemoteFile, start: int, target: memoryview) -> None:
        """Read a run of bytes and sum it, a piece at a time while it is in the processor's cache; of a store, all at once."""
        if file.is_remote:
            file.read_into(start, target)
            self._add(file, start, target)
            return
        if (checks := self._checks_of(file.path)) is not None:
            with self._telling_versions(file.path):
                checks.read(start, target, file.read_into)
            return
        number = self._sums.place(file.path, start, start + len(target)) if self._sums and len(target) else None
        if number is None:
            file.read_into(start, target)
            return
        crc, step = 0, tunables.SUMMED_NUMBYTES
        for place in range(0, len(target), step):
            file.read_into(start + place, target[place : place + step])
            crc = zlib.crc32(target[place : place + step], crc)
        self._compare(file.path, number, Run(start, start + len(target), crc))

    def _add(self, file: OpenFile | RemoteFile, start: int, data: memoryview) -> None:
        """Sum bytes that were read."""
        if (checks := self._checks_of(file.path)) is not None:
            with self._telling_versions(file.path):
                checks.read(start, data)
            return
        number = self._sums.place(file.path, start, start + len(data)) if self._sums and len(data) else None
        if number is not None:
            self._compare(file.path, number, Run(start, start + len(data), zlib.crc32(data)))

    def _compare(self, path: str, number: int, run: Run) -> None:
        assert self._sums is not None
        with self._telling_versions(path):
            self._sums.add(path, number, run)

    def numbytes(self, view: StridedView[FileExtent], shape: tuple[int, ...]) -> int:
        """Return the bytes to read for a block: more than it has if its runs are short and the file isn't mapped."""
        file, _ = self._open(view, view.span(shape))
        numel = prod(shape) if file.is_mapped or _runs(view, shape) is not None else view.span(shape)
        return numel * ITEMSIZE[view.buffer.dtype]

    def _open(self, view: StridedView[FileExtent], span: int) -> tuple[OpenFile | RemoteFile, int]:
        """Return the file of a view, and the place of the view's first byte in it."""
        extent, itemsize = view.buffer, ITEMSIZE[view.buffer.dtype]
        file = self._file(extent.path)
        stop = extent.file_offset + extent.numel * itemsize
        if stop > file.numbytes:
            raise DamagedCheckpointError(f"{extent.path} is truncated: expected {stop} bytes, found {file.numbytes}")
        assert view.start + span <= extent.numel, (view, span)
        return file, extent.file_offset + view.start * itemsize

    def _file(self, path: str) -> OpenFile | RemoteFile:
        with self._lock:
            file = self._files.pop(path, None) or self._opened(path)
            self._files[path] = file  # in the order of their last use
            while len(self._files) > self._most_open:
                del self._files[next(iter(self._files))]
        return file

    def _opened(self, path: str) -> OpenFile | RemoteFile:
        location = located(path)
        if isinstance(location, RemotePath):
            return self._opened_remotely(location)
        if not location.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        try:
            file = OpenFile(path, self._mapped)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                raise unreadable(path, error) from error
            self._files.clear()  # this process has opened many others since; a file that a thread uses stays open
            file = OpenFile(path, self._mapped)
        self._versions.note(path, file.status)
        return file

    def _opened_remotely(self, location: RemotePath) -> RemoteFile:
        try:
            file = RemoteFile(location, self._request_numbytes)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{location} is missing") from error
        except OSError as error:
            raise unreadable(str(location), error) from error
        self._versions.note(file.path, file.status)
        return file

    def close(self) -> None:
        """Close the files; a map goes with the last tensor that uses it."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _run_of(view: StridedView[FileExtent], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the length of each run of consecutive elements in a block, and the number of dimensions around it; None if runs are
    too short to read."""
    numel, outer = 1, len(shape)
    while outer and (shape[outer - 1] == 1 or view.strides[outer - 1] == numel):
        outer -= 1
        numel *= shape[outer]
    least = tunables.LEAST_REQUEST_NUMBYTES if is_url(view.buffer.path) else tunables.LEAST_RUN_NUMBYTES
    return None if numel * ITEMSIZE[view.buffer.dtype] < least and outer else (numel, outer)


def _runs(view: StridedView[FileExtent], shape: tuple[int, ...]) -> tuple[Sequence[int], int] | None:
    """Return where each run of a block begins, and their length; None if runs are too short to read."""
    if (run := _run_of(view, shape)) is None:
        return None
    numel, outer = run
    steps = (range(0, extent * stride, stride) for extent, stride in zip(shape[:outer], view.strides, strict=False))
    return [sum(place) for place in product(*steps)], numel


def run_copies(
    copies: Iterable[BlockCopy[FileExtent, T]],
    reader: FileReader,
    buffer: Callable[[T], torch.Tensor],
    pool: CopyPool | None = None,
) -> TransferCount:
    """Carry out block copies; values are converted to the target buffer's dtype.

    Args:
        buffer: the target buffer of a key, contiguous and on any device; it is indexed as one-dimensional.
        pool: the threads and memory to use; by default the calling thread, and `tunables.MEMORY_NUMBYTES`.

    What is queued on an accelerator's current stream before is done before, and what is queued there later sees the values.
    """
    count = TransferCount()
    with closing(CopyPool()) if pool is None else nullcontext(pool) as threads:
        for copy in joined(_counted(copies, count)):
            flat = buffer(copy.target.buffer)
            plain = _is_plain(copy, _block(flat, copy.target, copy.shape))
            for part in threads.parts(copy, flat, plain):
                count.bytes_read += _numbytes(part, reader, plain)
                threads.run(partial(_run, part, reader, flat, threads.lanes))
        threads.wait()
    return count


def _counted(copies: Iterable[BlockCopy[FileExtent, T]], count: TransferCount) -> Iterator[BlockCopy[FileExtent, T]]:
    """Yield copies, and count them and their files."""
    for copy in copies:
        count.copies += 1
        count.files |= {view.buffer.path for view in copy.sources}
        yield copy


def _run(copy: BlockCopy[FileExtent, T], reader: FileReader, flat: torch.Tensor, lanes: Lanes) -> None:
    target, source = _block(flat, copy.target, copy.shape), copy.sources[0]
    on_host, dtype = flat.device.type == "cpu", NAMED_DTYPES[source.buffer.dtype]
    if _is_plain(copy, target):
        reader.read_into(source, target)
    elif not on_host and _is_as_read(copy):
        lanes.fill(target, dtype, partial(reader.block_into, source))
    else:
        if on_host and _is_as_read(copy) and reader.copy_in_steps(source, target):
            return
        blocks = [reader.block(view, copy.shape) for view in copy.sources]
        if not _is_as_read(copy):  # in double precision the mean of equal values is that value, exactly
            total = sum(blocks[1:], blocks[0].to(torch.float64))
            blocks = [total * copy.factor.numerator / (len(blocks) * copy.factor.denominator)]
        if on_host:
            target.copy_(blocks[0])
        else:
            lanes.fill(target, target.dtype, lambda staged: staged.copy_(blocks[0]))


def _is_as_read(copy: BlockCopy[FileExtent, T]) -> bool:
    """Return whether the values of a file are taken over as they are."""
    return len(copy.sources) == 1 and copy.factor == 1


def _numbytes(copy: BlockCopy[FileExtent, T], reader: FileReader, plain: bool) -> int:
    """Return how many bytes of files are read for a copy."""
    if plain:
        return prod(copy.shape) * ITEMSIZE[copy.sources[0].buffer.dtype]
    return sum(reader.numbytes(view, copy.shape) for view in copy.sources)


def _is_plain(copy: BlockCopy[FileExtent, T], target: torch.Tensor) -> bool:
    """Return whether consecutive bytes of a file become consecutive bytes of the CPU's memory."""
    source = copy.sources[0]
    dense = row_major_strides(copy.shape)
    places = zip(copy.shape, source.strides, dense, strict=True)
    in_a_row = all(count == 1 or stride == step for count, stride, step in places)
    kept = _is_as_read(copy) and target.dtype == NAMED_DTYPES[source.buffer.dtype]
    return kept and in_a_row and target.is_contiguous() and target.device.type == "cpu"


class CopyPool:
    """Threads that copy, and the memory that they may use in all. It may only be used from one thread.

    Args:
        threads: 1 for the calling thread alone.
        memory_numbytes: bytes for blocks that are read, converted or combined before they are copied; see `span`.
    """

    def __init__(self, threads: int = 1, memory_numbytes: int = tunables.MEMORY_NUMBYTES) -> None:
        self._threads, self._share = threads, memory_numbytes // threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._pending: deque[Future[None]] = deque()
        both = max(1 << max(3 * self._share // 4, 64).bit_length() - 1, 64)  # a quarter is left for other blocks
        self.lanes = Lanes(min(both // 2, tunables.PART_NUMBYTES))

    def parts(
        self, copy: BlockCopy[FileExtent, T], flat: torch.Tensor, plain: bool
    ) -> Iterable[BlockCopy[FileExtent, T]]:
        """Split a copy so that its parts keep to the memory.

        Args:
            plain: whether it needs none.
        """
        if flat.device.type != "cpu":
            self.lanes.follow(flat.device)
            return self._staged_parts(copy, flat)
        return copy.parts(
            tunables.PART_NUMBYTES // ITEMSIZE[copy.sources[0].buffer.dtype] if plain else self.span(copy)
        )

    def _staged_parts(self, copy: BlockCopy[FileExtent, T], flat: torch.Tensor) -> Iterable[BlockCopy[FileExtent, T]]:
        """Split a copy into parts that fit in a lane's buffer; what lies between runs that are read one by one needs no room."""
        view = copy.sources[0]
        most = self.lanes.numbytes // max(ITEMSIZE[view.buffer.dtype], flat.element_size())
        if not _is_as_read(copy) or _run_of(view, copy.shape) is None:
            yield from copy.parts(min(most, self.span(copy) // 4) or 1)
            return
        for part in copy.parts(most * view.span(copy.shape) // max(prod(copy.shape), 1)):
            yield from [part] if prod(part.shape) <= most else part.parts(most)

    def span(self, copy: BlockCopy[FileExtent, T]) -> int:
        """Return how many elements a part of a copy may span: each source holds them as read and in double precision."""
        widths = [ITEMSIZE[view.buffer.dtype] + ITEMSIZE["F64"] for view in copy.sources]
        return max(min(self._share, tunables.PART_NUMBYTES) // sum(widths), 1)

    def run(self, work: Callable[[], None]) -> None:
        """Do the work now, or soon on another thread; wait while there is enough to do."""
        if self._pool is None:
            work()
            return
        self._pending.append(self._pool.submit(work))
        while self._pending and (self._pending[0].done() or len(self._pending) > self._threads * tunables.PENDING):
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait until all is done, or will be before what is queued later on an accelerator; raise the first error."""
        while self._pending:
            self._pending.popleft().result()
        self.lanes.join()

    def close(self) -> None:
        """End the threads; work that hasn't begun is left undone."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.lanes.close()


def _block(flat: torch.Tensor, view: StridedView[T], shape: tuple[int, ...]) -> torch.Tensor:
    return flat.as_strided(shape, view.strides, flat.storage_offset() + view.start)


def gather(
    view: UniversalView,
    name: str,
    state: str,
    local_start: int,
    target: torch.Tensor,
    reader: FileReader,
    layout: Layout | None = None,
    rank: int = 0,
) -> TransferCount:
    """Fill ``target`` with a run of consecutive (row-major) elements of one parameter's state.

    Args:
        local_start: position of the first element in the local tensor.
        target: one-dimensional; its length says how many elements. Padding of the local tensor is left as it is.
        layout: where the elements lie in local tensors; by default one local tensor is the whole.
        rank: number of the local tensor.

    Raises:
        MismatchError: the checkpoint doesn't hold each element exactly once, or scales them in an unknown way.
        DamagedCheckpointError: a source file is missing or truncated.
    """
    wanted = Fragment(local_start, target.numel(), None, 0)
    layout = layout or Layout.whole(view.logical_shape(name))
    try:
        with _PLANNING:
            copies = plan_tensor(view.source(name, state), Target(layout, rank, (wanted,)), state)
    except ValueError as error:
        told = f"{view.checkpoint.path} doesn't give whole parameters"
        raise MismatchError(told, [f"{name}/{state}: {error}"]) from error
    return run_copies(copies, reader, lambda _: target)
