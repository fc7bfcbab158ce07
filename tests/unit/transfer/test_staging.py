"""Tensors of an accelerator are filled by streams of the threads that read; on a stand-in, whose copies are as late as may be."""

from __future__ import annotations

from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.plan import BlockCopy, StridedView
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.transfer import CopyPool, FileReader, run_copies

ROWS, COLUMNS = 96, 4096

Copies = list[BlockCopy[FileExtent, str]]


def written(folder: Path, shift: int = 0) -> FileExtent:
    """Write a matrix to a file, ``shift`` bytes from its beginning."""
    whole = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    (folder / "f").write_bytes(b"x" * shift + whole.numpy().tobytes())
    return FileExtent(str(folder / "f"), shift, "F32", ROWS * COLUMNS)


def copies_of(extent: FileExtent) -> tuple[Copies, dict[str, torch.Tensor]]:
    """Copies of all kinds, and the buffers that they fill in part."""
    source = lambda start, *strides: (StridedView(extent, start, strides),)  # noqa: E731
    target = lambda name, start, *strides: StridedView(name, start, strides)  # noqa: E731
    found = [
        BlockCopy((ROWS * COLUMNS,), target("plain", 5, 1), source(0, 1)),
        BlockCopy((ROWS, 2048), target("long runs", 0, 2048, 1), source(1024, COLUMNS, 1)),
        BlockCopy((ROWS, 6), target("short runs", 0, 6, 1), source(3, COLUMNS, 1)),
        BlockCopy((ROWS, 2048), target("strided", 2, 2060, 1), source(0, COLUMNS, 1)),
        BlockCopy((2048, ROWS), target("turned", 0, ROWS, 1), source(0, 1, COLUMNS)),
        BlockCopy((ROWS, 2048), target("bfloat16", 0, 2048, 1), source(7, COLUMNS, 1)),
        BlockCopy((COLUMNS,), target("float64", 1, 3), source(7, 1)),
        BlockCopy((ROWS, 9), target("mean", 0, 9, 1), source(0, COLUMNS, 1) + source(90, COLUMNS, 1), Fraction(3)),
    ]
    numel = ROWS * 2060 + 2
    buffers = {copy.target.buffer: torch.full((numel,), -1.0) for copy in found}
    buffers["plain"] = torch.full((ROWS * COLUMNS + 6,), -1.0)
    buffers["bfloat16"], buffers["float64"] = buffers["bfloat16"].bfloat16(), buffers["float64"].double()
    return found, buffers


def fill_on_device(extent: FileExtent, threads: int, memory: int, mapped: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return buffers that were filled on the device, and the bytes that it had pinned."""
    from ucp_deepspeed.testing.device.stand_in import extension

    copies, buffers = copies_of(extent)
    on_device = {name: buffer.to("standin") for name, buffer in buffers.items()}
    pool, before = CopyPool(threads, memory), extension().pinned_bytes()
    with closing(FileReader(mapped=mapped)) as reader, closing(pool):
        run_copies(copies, reader, on_device.__getitem__, pool)
        pinned = extension().pinned_bytes() - before
        found = {name: (buffer + 0).cpu() for name, buffer in on_device.items()}  # in the order of the current stream
    return found, pinned


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shift", "mapped"), [(0, True), (1, True), (64, False)])
def test_an_accelerator_is_filled_as_the_host_is(threads: int, shift: int, mapped: bool, tmp_path: Path) -> None:
    """Strided, turned and converted, in parts that go through few pinned bytes again and again."""
    extent, memory = written(tmp_path, shift), 600_000
    copies, expected = copies_of(extent)
    run_copies(copies, FileReader(), expected.__getitem__)
    ((found, pinned),) = get_pool(1, "standin").run(fill_on_device, extent, threads, memory, mapped)
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
    assert memory // 4 < pinned < memory


def fill_in_order(extent: FileExtent) -> tuple[bool, bool]:
    """Fill a tensor on a stream that still copies into it, and use it there at once; also after an error on a thread."""
    device, numel = torch.device("standin:0"), ROWS * COLUMNS
    copy = BlockCopy((numel,), StridedView("a", 0, (1,)), (StridedView(extent, 0, (1,)),))
    target, stale = torch.empty(numel, device=device), torch.full((numel,), 7.0).pin_memory()
    torch.accelerator.synchronize()
    with torch.Stream(device), closing(CopyPool(2, 1 << 20)) as pool:
        target.copy_(stale, non_blocking=True)
        run_copies([copy], FileReader(), lambda _: target, pool)
        used = target + 0
    torch.accelerator.synchronize()
    same = [torch.equal(each.cpu().view(-1), FileReader().block(copy.sources[0], (numel,))) for each in (used, target)]
    return same[0], same[1]


def test_values_are_there_in_the_order_of_the_callers_stream(tmp_path: Path) -> None:
    assert get_pool(1, "standin").run(fill_in_order, written(tmp_path)) == [(True, True)]
