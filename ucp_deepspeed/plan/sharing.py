"""Which rank reads what, where several ranks need the same bytes (the paper's redundancy-bypassing load).

Two kinds of ranks hold the same: data-parallel replicas a buffer as a whole, and tensor-parallel ranks some parts of it, the
parameters that aren't cut. Where both do, a part that a replica reads for the others is divided once more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucp_deepspeed.layout import Box, Layout, LocalTensor, Shape

SHARED_READ_NUMBYTES = 64 << 20
"""Where ranks hold fewer bytes alike, each reads them all: that costs less than to exchange them."""

ALIGNMENT_NUMBYTES = 64
"""What is shared is cut at multiples of this, which are element boundaries of every dtype."""

Interval = tuple[int, int]
"""Of a buffer: the first element, and that behind the last."""


def without(intervals: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """What is left of some intervals after others are taken out; both are given in order, and don't overlap."""
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
    """What ranks read of a buffer for one another.

    Attributes:
        shares: ordered by place; they needn't meet.
        rank: this rank's number among them.
    """

    shares: tuple[Share, ...]
    rank: int

    def left_of(self, intervals: Sequence[Interval]) -> list[Interval]:
        """What of some intervals others don't read for this rank."""
        return without(intervals, [(share.start, share.stop) for share in self.shares if share.reader != self.rank])


@dataclass(frozen=True)
class Shareable:
    """A buffer of one rank, and what others hold of the same.

    Attributes:
        numel: its elements.
        itemsize: bytes of each.
        replicas: names the ranks that hold all of it; None if there are none.
        alike: the parts that this rank's tensor-parallel ranks hold too, each in the same order and of the same length.
    """

    numel: int
    itemsize: int
    replicas: Hashable | None = None
    alike: tuple[Interval, ...] = ()


@dataclass(frozen=True)
class Division:
    """How a buffer is read.

    Attributes:
        replicas: what data-parallel replicas read for one another, which is all of it; None where each reads all.
        tensor_parallel: what tensor-parallel ranks read for one another of what their replica reads; None as before.
    """

    replicas: Sharing | None = None
    tensor_parallel: Sharing | None = None

    def own(self, numel: int) -> list[Interval]:
        """What this rank's replica reads of a buffer of ``numel`` elements."""
        return self.replicas.left_of([(0, numel)]) if self.replicas else [(0, numel)]

    def read(self, numel: int) -> list[Interval]:
        """What this rank itself reads of it."""
        return self.tensor_parallel.left_of(self.own(numel)) if self.tensor_parallel else self.own(numel)


UNDIVIDED = Division()
"""Each rank reads what it holds."""


def divide(
    buffers: Sequence[Shareable],
    replicas: Mapping[Any, tuple[int, int]],
    tensor_parallel: tuple[int, int],
    least_numbytes: int = SHARED_READ_NUMBYTES,
) -> list[Division]:
    """Divide among ranks what they all hold, where it is enough to be worth the exchange.

    Args:
        buffers: of one rank, in an order that is the same on all that hold them.
        replicas: how many ranks hold a buffer's like, and this one's number among them, by the buffer's ``replicas``.
        tensor_parallel: the same of the tensor-parallel ranks.
        least_numbytes: what ranks hold alike is divided among them if it has at least so many bytes.
    """
    divisions = [UNDIVIDED] * len(buffers)
    for name, ranks in replicas.items():
        places = [place for place, buffer in enumerate(buffers) if buffer.replicas == name]
        runs = [_Run(place, 0, buffers[place].numel, buffers[place].itemsize) for place in places]
        for place, sharing in _share(runs, *ranks, least_numbytes).items():
            divisions[place] = Division(replicas=sharing)
    runs = [
        _Run(place, low, high, buffer.itemsize)
        for place, buffer in enumerate(buffers)
        for low, high in _common(divisions[place].own(buffer.numel), buffer.alike)
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
    """Parameters that each tensor-parallel rank of a stage holds whole, and that the checkpoint holds less often.

    None where the ranks hold some other parameter in different shapes: then they lay out their buffers in different ways, and
    data-parallel partitions of theirs hold different parts.

    Args:
        layouts: of what may be read together.
        sources: layouts in the checkpoint.
        local_shapes: of everything in the model, over its model-parallel ranks.
        rank: model-parallel rank.
        degree: tensor-parallel size.
    """
    first = rank - rank % degree
    stage = slice(first, first + degree)
    if any(len(set(shapes[stage])) > 1 for shapes in local_shapes):
        return frozenset()
    return frozenset(
        name
        for name, layout in layouts.items()
        if _are_whole(layout.locals[stage]) and len(next(iter(sources[name].holders().values()), ())) < degree
    )


def _are_whole(locals_: Sequence[LocalTensor]) -> bool:
    """Whether some ranks hold the same, without padding."""
    first = locals_[0]
    unpadded = len(first.pieces) == 1 and first.pieces[0].local_box == Box.whole(first.shape)
    return unpadded and all(other == first for other in locals_)


@dataclass(frozen=True, slots=True)
class _Run:
    """A part of the buffer number ``place``."""

    place: int
    start: int
    stop: int
    itemsize: int


def _share(runs: Sequence[_Run], ranks: int, rank: int, least_numbytes: int) -> dict[int, Sharing]:
    """Cut runs, laid end to end, into parts of equal numbers of bytes, one for each rank; by the buffers that they are of."""
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
                run.start + max(cut, 0) // ALIGNMENT_NUMBYTES * ALIGNMENT_NUMBYTES // run.itemsize
                if inside
                else run.stop
            )
            if end > place:
                shares.setdefault(run.place, []).append(Share(reader, place, end))
            place, reader = end, reader + inside
        begin += numbytes
    return {place: Sharing(tuple(found), rank) for place, found in shares.items()}


def _common(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What lies both in some intervals, of which there are few, and in others."""
    return [
        (max(start, low), min(stop, high))
        for start, stop in intervals
        for low, high in others
        if max(start, low) < min(stop, high)
    ]
