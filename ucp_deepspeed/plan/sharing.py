"""Shared reads: division of the reading if several ranks need the same bytes (the paper's redundancy-bypassing load).

Two kinds of ranks hold the same bytes. Data-parallel replicas share a whole buffer. Tensor-parallel ranks share parts of it: the
parameters that aren't cut. If both apply, a part that a replica reads for the others is divided once more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucp_deepspeed import tunables
from ucp_deepspeed.layout import Box, Layout, Shape

Interval = tuple[int, int]
"""Part of a buffer: the first element, and the one behind the last."""


def without(intervals: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Return the rest of some intervals after others are taken out. Both are ordered, and don't overlap."""
    left: list[Interval] = []
    place = 0
    for start, stop in intervals:
        while place < len(taken) and taken[place][1] <= start:
            place += 1
        for low, high in taken[place:]:
            if low >= stop:
                break
            if start < low:
                left.append((start, low))
            start = high
        if start < stop:
            left.append((start, stop))
    return left


@dataclass(frozen=True, slots=True)
class Share:
    """Elements of a buffer from ``start`` up to ``stop``, which rank ``reader`` reads for all that hold them."""

    reader: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """The parts of a buffer that ranks read for one another.

    Attributes:
        shares: ordered by position; there may be gaps between them.
        rank: this rank's number among them.
    """

    shares: tuple[Share, ...]
    rank: int

    def left_of(self, intervals: Sequence[Interval]) -> list[Interval]:
        """Return the parts of some intervals that no other rank reads for this rank."""
        return without(intervals, [(share.start, share.stop) for share in self.shares if share.reader != self.rank])


@dataclass(frozen=True)
class Shareable:
    """A buffer of one rank, and the parts of it that other ranks hold too.

    Attributes:
        numel: number of its elements.
        itemsize: bytes of each element.
        replicas: names the ranks that hold all of the buffer; None if there are none.
        alike: the parts that this rank's tensor-parallel ranks hold too, on each in the same order and of the same length.
    """

    numel: int
    itemsize: int
    replicas: Hashable | None = None
    alike: tuple[Interval, ...] = ()


@dataclass(frozen=True)
class Division:
    """The division of a buffer among the ranks that read it.

    Attributes:
        replicas: parts that data-parallel replicas read for one another, together the whole buffer; None if each reads all.
        tensor_parallel: parts of a replica's share that tensor-parallel ranks read for one another; None if each reads all.
    """

    replicas: Sharing | None = None
    tensor_parallel: Sharing | None = None

    def own(self, numel: int) -> list[Interval]:
        """Return the parts of a buffer of ``numel`` elements that this rank's replica reads."""
        return self.replicas.left_of([(0, numel)]) if self.replicas else [(0, numel)]

    def read(self, numel: int) -> list[Interval]:
        """Return the parts of it that this rank itself reads."""
        return self.tensor_parallel.left_of(self.own(numel)) if self.tensor_parallel else self.own(numel)


UNDIVIDED = Division()
"""Each rank reads all that it holds."""


def divide(
    buffers: Sequence[Shareable],
    replicas: Mapping[Any, tuple[int, int]],
    tensor_parallel: tuple[int, int],
    least_numbytes: int = tunables.SHARED_READ_NUMBYTES,
) -> list[Division]:
    """Divide shared bytes among ranks, if there are enough to be worth the exchange.

    Args:
        buffers: buffers of one rank, in an order that is the same on all ranks that hold them.
        replicas: by the buffer's ``replicas``: how many ranks hold the same buffer, and this rank's number among them.
        tensor_parallel: the same two numbers for the tensor-parallel ranks.
        least_numbytes: shared bytes are divided if there are at least this many.
    """
    divisions = [UNDIVIDED] * len(buffers)
    for name, ranks in replicas.items():
        places = [place for place, buffer in enumerate(buffers) if buffer.replicas == name]
        runs = [_Run(place, 0, buffers[place].numel, buffers[place].itemsize) for place in places]
        for place, sharing in _share(runs, *ranks, least_numbytes).items():
            divisions[place] = Division(replicas=sharing)
    runs = [
        _Run(place, max(start, low), min(stop, high), buffer.itemsize)
        for place, buffer in enumerate(buffers)
        for start, stop in divisions[place].own(buffer.numel)
        for low, high in buffer.alike
        if max(start, low) < min(stop, high)
    ]
    for place, sharing in _share(runs, *tensor_parallel, least_numbytes).items():
        divisions[place] = replace(divisions[place], tensor_parallel=sharing)
    return divisions


def read_together(
    layouts: Mapping[str, Layout],
    sources: Mapping[str, Layout],
    local_shapes: Iterable[Sequence[Shape | None]],
    rank: int,
    degree: int,
) -> frozenset[str]:
    """Return parameters that each tensor-parallel rank of a stage holds whole, if the checkpoint has fewer copies of them.

    Returns none if the ranks hold some other parameter in different shapes. Then they lay out their buffers in different ways,
    and their data-parallel partitions hold different parts.

    Args:
        layouts: layouts of the parameters that may be read together; ``sources``: those in the checkpoint.
        local_shapes: shapes of everything in the model, over its model-parallel ranks, of which ``rank`` is one.
        degree: tensor-parallel size.
    """
    first = rank - rank % degree
    stage = slice(first, first + degree)
    if any(len(set(shapes[stage])) > 1 for shapes in local_shapes):
        return frozenset()
    found = set()
    for name, layout in layouts.items():
        local = layout.locals[first]
        whole = len(local.pieces) == 1 and local.pieces[0].local_box == Box.whole(local.shape)
        copies = next(iter(sources[name].holders().values()), ())
        if whole and set(layout.locals[stage]) == {local} and len(copies) < degree:
            found.add(name)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class _Run:
    """A part of the buffer number ``place``."""

    place: int
    start: int
    stop: int
    itemsize: int


def _share(runs: Sequence[_Run], ranks: int, rank: int, least_numbytes: int) -> dict[int, Sharing]:
    """Cut runs, laid end to end, into parts of equal numbers of bytes, one for each rank. Returns them by buffer."""
    total = sum((run.stop - run.start) * run.itemsize for run in runs)
    if ranks < 2 or total < least_numbytes:
        return {}
    shares: dict[int, list[Share]] = {}
    reader = begin = 0
    for run in runs:
        place, numbytes = run.start, (run.stop - run.start) * run.itemsize
        while place < run.stop:
            cut = numbytes if reader == ranks - 1 else total * (reader + 1) // ranks - begin
            inside = cut < numbytes
            end = (
                run.start + max(cut, 0) // tunables.ALIGNMENT_NUMBYTES * tunables.ALIGNMENT_NUMBYTES // run.itemsize
                if inside
                else run.stop
            )
            if end > place:
                shares.setdefault(run.place, []).append(Share(reader, place, end))
            place, reader = end, reader + inside
        begin += numbytes
    return {place: Sharing(tuple(found), rank) for place, found in shares.items()}
