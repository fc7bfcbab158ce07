"""Blocks that a reader takes out of a file."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.plan import BlockCopy, StridedView
from ucp_deepspeed.transfer import CopyPool, FileReader, run_copies


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize(
    ("shape", "start", "strides", "span"),
    [((2,), 7, (1,), 2), ((3, 2), 10, (10, 1), 22), ((3, 2), 0, (10, 5), 26), ((1,), 99, (1,), 1)],
)
def test_a_block_at_any_place(
    shift: int, shape: tuple[int, ...], start: int, strides: tuple[int, ...], span: int, tmp_path: Path
) -> None:
    """A block whose elements aren't aligned is copied, and no more than it spans."""
    whole = torch.arange(100.0)
    (tmp_path / "f").write_bytes(b"x" * shift + whole.numpy().tobytes())
    view = StridedView(FileExtent(str(tmp_path / "f"), shift, "F32", 100), start, strides)
    block = FileReader().block(view, shape)
    assert torch.equal(block, whole.as_strided(shape, strides, start))
    assert block.untyped_storage().nbytes() == (4 * span if shift % 4 else shift + 400)


def test_a_file_that_ends_before_the_extent_does(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 399)
    view = StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 100), 0, (1,))
    with pytest.raises(DamagedCheckpointError, match="is truncated: expected 400 bytes, found 399"):
        FileReader().block(view, (1,))


def _reader_with_room_for(files: int, mapped: bool) -> FileReader:
    """A reader made where a process may open that many more files."""
    used, limits = len(list(Path("/proc/self/fd").iterdir())) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + files, limits[1]))
    try:
        return FileReader(mapped=mapped)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "by position"])
def test_more_files_than_a_process_may_open(mapped: bool, tmp_path: Path) -> None:
    """Blocks of files that are closed by now stay readable, and so do the files themselves."""
    descriptors = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    views = []
    for number in range(60):
        (tmp_path / str(number)).write_bytes(np.float32(number).tobytes())
        views.append(StridedView(FileExtent(str(tmp_path / str(number)), 0, "F32", 1), 0, (1,)))
    before = descriptors()
    with closing(_reader_with_room_for(60, mapped)) as reader:
        first = reader.block(views[0], (1,))
        for number, view in enumerate([*views, *views]):
            target = torch.empty(1)
            reader.read_into(view, target)
            assert float(reader.block(view, (1,))) == float(target) == number % len(views)
            assert descriptors() <= before + 20 + 1
        assert float(first) == 0
        del first
    assert descriptors() == before


def test_a_process_that_can_open_no_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that were used before are closed then."""
    plain, left = os.open, iter([True, True, False, True])

    def scarce(path: Any, *arguments: Any) -> int:
        if not next(left):
            raise OSError(errno.EMFILE, "Too many open files", path)
        return plain(path, *arguments)

    with closing(FileReader()) as reader:
        monkeypatch.setattr(os, "open", scarce)
        for name in ("a", "b", "c"):
            (tmp_path / name).write_bytes(bytes(4))
            reader.read_into(StridedView(FileExtent(str(tmp_path / name), 0, "F32", 1), 0, (1,)), torch.empty(1))
        assert not list(left) and len(reader._files) == 1
        monkeypatch.undo()


def test_a_plain_copy_takes_no_memory_and_few_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little memory there is for blocks that are converted."""
    (tmp_path / "f").write_bytes(np.arange(1000, dtype=np.float32).tobytes())
    view = StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 1000), 0, (1,))
    calls: list[int] = []
    plain = FileReader.read_into
    monkeypatch.setattr(
        FileReader, "read_into", lambda self, view, target: (calls.append(1), plain(self, view, target))[1]
    )
    target = torch.zeros(1000)
    run_copies([BlockCopy((1000,), StridedView("a", 0, (1,)), (view,))], FileReader(), lambda _: target, CopyPool(1, 1))
    assert len(calls) == 1 and torch.equal(target, torch.arange(1000.0))


def test_little_work_waits_for_threads() -> None:
    gate, begun = threading.Event(), threading.Event()
    submitted: list[int] = []

    def submit(pool: CopyPool) -> None:
        for number in range(100):
            pool.run(lambda: (begun.set(), gate.wait(10))[0])
            submitted.append(number)

    with closing(CopyPool(2)) as pool:
        feeder = threading.Thread(target=submit, args=(pool,))
        feeder.start()
        begun.wait(10)
        feeder.join(0.2)
        assert len(submitted) <= 4 * 2
        gate.set()
        feeder.join(10)
        pool.wait()
    assert len(submitted) == 100


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "by position"])
def test_copies_by_either_way_and_on_threads_are_the_same(mapped: bool, threads: int, tmp_path: Path) -> None:
    """A strided block, the mean of two, and one whose elements aren't aligned, in parts of a few elements."""
    whole = torch.arange(200.0).view(10, 20)
    (tmp_path / "f").write_bytes(b"x" + whole.numpy().tobytes())
    extent = FileExtent(str(tmp_path / "f"), 1, "F32", 200)
    columns = StridedView(extent, 3, (20, 1)), StridedView(extent, 11, (20, 1))
    copies = [
        BlockCopy((10, 6), StridedView("a", 0, (6, 1)), columns[:1]),
        BlockCopy((10, 6), StridedView("b", 1, (7, 1)), columns, Fraction(3)),
    ]
    buffers = {"a": torch.zeros(60), "b": torch.zeros(71)}
    reader, pool = FileReader(mapped=mapped), CopyPool(threads, memory_numbytes=600)
    with closing(reader), closing(pool):
        count = run_copies(copies, reader, buffers.__getitem__, pool)
    assert torch.equal(buffers["a"].view(10, 6), whole[:, 3:9])
    assert torch.equal(buffers["b"][1:].view(10, 7)[:, :6], (whole[:, 3:9] + whole[:, 11:17]) / 2 * 3)
    assert (count.copies, count.files) == (2, {str(tmp_path / "f")})
    if mapped:
        assert count.bytes_read == 3 * 240
    else:  # also the bytes between such short runs, but not between parts: one row in each
        assert 3 * 240 <= count.bytes_read <= 3 * 4 * (9 * 20 + 6)


@pytest.mark.parametrize(("columns", "read"), [(1024, 1024), (1023, 2048)], ids=["long runs", "short runs"])
def test_without_maps_long_runs_alone_are_read(
    columns: int, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows of a tensor that is cut along its columns; and what is counted is what the system was asked for."""
    whole = torch.arange(16 * 2048.0).view(16, 2048)
    (tmp_path / "f").write_bytes(whole.numpy().tobytes())
    view = StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 16 * 2048), 512, (2048, 1))
    asked: list[int] = []
    plain = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], place: int) -> int:
        asked.append(plain(descriptor, buffers, place))
        return asked[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    target = torch.zeros(16 * columns)
    copy = BlockCopy((16, columns), StridedView("a", 0, (columns, 1)), (view,))
    count = run_copies([copy], FileReader(mapped=False), lambda _: target)
    assert torch.equal(target.view(16, columns), whole[:, 512 : 512 + columns])
    assert count.bytes_read == sum(asked) == 4 * (15 * read + columns)
    asked.clear()
    assert FileReader(mapped=True).numbytes(view, (16, columns)) == 4 * 16 * columns and not asked


@pytest.mark.parametrize("sources", [1, 2])
def test_memory_beyond_the_buffers_is_bounded(sources: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without a mapping takes a block's span as read, and in double precision."""
    rows, columns = 64, 256
    (tmp_path / "f").write_bytes(bytes(4 * rows * columns))
    extent = FileExtent(str(tmp_path / "f"), 0, "F32", rows * columns)
    views = tuple(StridedView(extent, start, (columns, 1)) for start in (0, 64)[:sources])
    taken: list[int] = []
    plain = FileReader.block

    def block(self: FileReader, view: StridedView[FileExtent], shape: tuple[int, ...]) -> torch.Tensor:
        found = plain(self, view, shape)
        taken.append(found.untyped_storage().nbytes() + 8 * view.span(shape))
        return found

    monkeypatch.setattr(FileReader, "block", block)
    copy = BlockCopy((rows, 128), StridedView("a", 0, (128, 1)), views)
    run_copies([copy], FileReader(mapped=False), lambda _: torch.zeros(rows * 128), CopyPool(1, 16_000))
    assert len(taken) > 2 * sources
    assert max(sum(taken[first : first + sources]) for first in range(0, len(taken), sources)) <= 16_000


def test_an_error_on_a_thread_is_raised(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 399)
    view = StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 100), 0, (1,))
    copy = BlockCopy((100,), StridedView("a", 0, (1,)), (view,))
    with closing(CopyPool(2)) as pool, pytest.raises(DamagedCheckpointError, match="is truncated"):
        run_copies([copy], FileReader(), lambda _: torch.zeros(100), pool)


def test_a_file_system_without_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise RuntimeError("unable to mmap 400 bytes from file: No such device (19)")

    monkeypatch.setattr(torch, "from_file", refuse)
    whole = torch.arange(100.0)
    (tmp_path / "f").write_bytes(whole.numpy().tobytes())
    copy = BlockCopy(
        (10, 3), StridedView("a", 0, (3, 1)), (StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 100), 2, (10, 1)),)
    )
    target = torch.zeros(30)
    run_copies([copy], FileReader(), lambda _: target)
    assert torch.equal(target.view(10, 3), whole.view(10, 10)[:, 2:5])
