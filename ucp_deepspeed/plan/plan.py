"""Strided block copies from two layouts and the fragments on either side, and the proof that each wanted element is written once.

The cost grows with the number of fragments and pieces that meet, never with elements.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from math import prod
from operator import itemgetter
from typing import Generic, TypeVar

from ucp_deepspeed.layout.box import Box, Shape, flat_interval_boxes, row_major_strides
from ucp_deepspeed.layout.layout import Layout, Piece, overlapping
from ucp_deepspeed.plan.sharing import Interval

B = TypeVar("B", bound=Hashable)
S = TypeVar("S", bound=Hashable)
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Fragment(Generic[B]):
    """A run of consecutive (row-major) elements of one rank's local tensor, consecutive in a buffer too. In elements.

    Attributes:
        local_start: flat position of its first element in the local tensor.
        numel: length.
        buffer: name of the buffer: a range of a file, or a tensor of an engine.
        buffer_start: position of its first element in the buffer.
    """

    local_start: int
    numel: int
    buffer: B
    buffer_start: int

    def within(self, intervals: Sequence[Interval]) -> Iterator[Fragment[B]]:
        """Yield the parts of it that lie in some intervals of the buffer. The intervals are ordered and don't overlap."""
        end = self.buffer_start + self.numel
        for start, stop in intervals[bisect_right(intervals, self.buffer_start, key=itemgetter(1)) :]:
            if start >= end:
                break
            low, high = max(self.buffer_start, start), min(end, stop)
            yield Fragment(self.local_start + low - self.buffer_start, high - low, self.buffer, low)


@dataclass(frozen=True, slots=True)
class StridedView(Generic[B]):
    """A block inside a buffer: the position of its first element and the distance between neighbours, in elements."""

    buffer: B
    start: int
    strides: Shape

    def span(self, shape: Shape) -> int:
        """Elements from a block's first to its last, including those between them."""
        return 1 + sum((count - 1) * stride for count, stride in zip(shape, self.strides, strict=True))

    def moved(self, dim: int, steps: int) -> StridedView[B]:
        """Return the view that begins ``steps`` further along a dimension."""
        return StridedView(self.buffer, self.start + steps * self.strides[dim], self.strides)


@dataclass(frozen=True, slots=True)
class BlockCopy(Generic[S, T]):
    """``target = mean(sources) * factor``, element by element over a block of ``shape``.

    A copy with one source and factor 1 is a plain copy; only *partial* and *scaled* parameters need others.
    """

    shape: Shape
    target: StridedView[T]
    sources: tuple[StridedView[S], ...]
    factor: Fraction = Fraction(1)

    def parts(self, most: int) -> Iterator[BlockCopy[S, T]]:
        """Split into copies that together do the same. Each spans at most ``most`` elements of a source, or a single element.

        The cut is along the dimension in which neighbours lie farthest apart in the source.
        """
        span = max(view.span(self.shape) for view in self.sources)
        if span <= most or max(self.shape, default=1) <= 1:
            yield self
            return
        strides = self.sources[0].strides
        dim = max((dim for dim, count in enumerate(self.shape) if count > 1), key=strides.__getitem__)
        step = max(self.shape[dim] * most // span, 1)
        for start in range(0, self.shape[dim], step):
            count = min(step, self.shape[dim] - start)
            shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
            sources = tuple(view.moved(dim, start) for view in self.sources)
            yield from BlockCopy(shape, self.target.moved(dim, start), sources, self.factor).parts(most)


def joined(copies: Iterable[BlockCopy[S, T]]) -> Iterator[BlockCopy[S, T]]:
    """Join plain copies of runs, where one goes on behind the other in both buffers: parameters of a flat partition."""
    last: BlockCopy[S, T] | None = None
    for copy in copies:
        run = _as_run(copy)
        if last is not None and run is not None and _goes_on(last, run):
            last = BlockCopy((last.shape[0] + run.shape[0],), last.target, last.sources)
            continue
        if last is not None:
            yield last
        last = run
        if run is None:
            yield copy
    if last is not None:
        yield last


def _as_run(copy: BlockCopy[S, T]) -> BlockCopy[S, T] | None:
    """Return a plain copy between runs of consecutive elements in one dimension; None for any other copy."""
    target, source = copy.target, copy.sources[0]
    if len(copy.sources) > 1 or copy.factor != 1:
        return None
    for count, dense, *strides in zip(
        copy.shape, row_major_strides(copy.shape), target.strides, source.strides, strict=True
    ):
        if count > 1 and strides != [dense, dense]:
            return None
    into, out = StridedView(target.buffer, target.start, (1,)), StridedView(source.buffer, source.start, (1,))
    return BlockCopy((prod(copy.shape),), into, (out,))


def _goes_on(last: BlockCopy[S, T], run: BlockCopy[S, T]) -> bool:
    """Return whether a run begins where another ends, in both buffers."""
    source, target, numel = last.sources[0], last.target, last.shape[0]
    ends = target.buffer, target.start + numel, source.buffer, source.start + numel
    return ends == (run.target.buffer, run.target.start, run.sources[0].buffer, run.sources[0].start)


@dataclass(frozen=True)
class Source(Generic[S]):
    """A state of one parameter, as the source checkpoint holds it.

    Attributes:
        layout: layout of the parameter over the source's model-parallel ranks.
        fragments: ``(rank, local_start, local_stop)`` → the fragments of that rank's local tensor that meet the flat interval.
    """

    layout: Layout
    fragments: Callable[[int, int, int], Iterable[Fragment[S]]]


@dataclass(frozen=True)
class Target(Generic[T]):
    """A state of one parameter, as one target rank wants it.

    Attributes:
        layout: layout of the parameter over the target's model-parallel ranks.
        rank: this rank's model-parallel rank.
        fragments: the parts of its local tensor that this rank holds.
    """

    layout: Layout
    rank: int
    fragments: Sequence[Fragment[T]]


@dataclass(frozen=True, slots=True)
class _Region(Generic[B]):
    """A logical box and its position in a buffer."""

    logical_box: Box
    view: StridedView[B]

    def cut(self, box: Box) -> StridedView[B]:
        """Return the view of ``box``, a box inside this region."""
        steps = zip(box.start, self.logical_box.start, self.view.strides, strict=True)
        start = self.view.start + sum((low - mine) * stride for low, mine, stride in steps)
        return StridedView(self.view.buffer, start, self.view.strides)


def plan_tensor(source: Source[S], target: Target[T], state: str) -> tuple[BlockCopy[S, T], ...]:
    """Plan the copies that fill everything the target rank wants of one state of one parameter.

    Raises:
        ValueError: the logical shapes differ, the source doesn't hold each wanted element exactly once, or source and target
            scale the state differently and the layout doesn't say how. The caller adds the parameter's name.
    """
    factor = factor_between(source.layout, target.layout, state)
    merge = source.layout.mergeable_dims() & target.layout.mergeable_dims()
    source_layout, target_layout = source.layout.merged(merge), target.layout.merged(merge)
    holders = source_layout.holders()
    if source_layout.union != "mean":  # one rank serves, chosen so that readers spread
        holders = {box: [held[target.rank % len(held)]] for box, held in holders.items()}
    local = target_layout.locals[target.rank]
    copies: list[BlockCopy[S, T]] = []
    for fragment, piece in product(target.fragments, local.pieces):
        for wanted in _regions(fragment, local.shape, piece, piece.local_box):
            found: list[Box] = []
            for box, regions in _matches(source_layout, source, holders, wanted.logical_box):
                found.append(box)
                views = tuple(region.cut(box) for region in regions)
                copies.append(BlockCopy(box.shape, wanted.cut(box), views, factor))
            prove_cover(wanted.logical_box, found)
    return tuple(copies)


def factor_between(source: Layout, target: Layout, state: str) -> Fraction:
    """Return the factor by which elements of a state are multiplied on their way.

    Raises:
        ValueError: the logical shapes differ, or the layouts scale the state differently and don't say how.
    """
    if source.logical_shape != target.logical_shape:
        raise ValueError(
            f"expected logical shape {target.logical_shape}, found {source.logical_shape} in the checkpoint"
        )
    source_factor, target_factor = source.factor(state), target.factor(state)
    if source_factor is not None and target_factor is not None:
        return target_factor / source_factor
    if source.scale == target.scale:
        return Fraction(1)
    raise ValueError(
        f"state {state!r} is scaled by {source.scale} in the checkpoint and {target.scale} in the target, "
        f"and the spec gives no power for it"
    )


def _matches(
    layout: Layout, source: Source[S], holders: Mapping[Box, list[tuple[int, Piece]]], wanted: Box
) -> Iterator[tuple[Box, tuple[_Region[S], ...]]]:
    """Yield boxes that tile ``wanted`` as far as the source reaches, each with the region that holds it on each rank to read."""
    for logical_box, held in holders.items():
        box = wanted.intersect(logical_box)
        if box is None:
            continue
        matches: list[tuple[Box, tuple[_Region[S], ...]]] = [(box, ())]
        for rank, piece in held:
            shape = layout.locals[rank].shape
            local_box = box.moved(piece.logical_box.start, piece.local_box.start)
            fragments = source.fragments(rank, *_whole_rows(local_box, shape).flat_range(shape))
            regions = [region for part in fragments for region in _regions(part, shape, piece, local_box)]
            matches = [
                (common, (*found, region))
                for narrowed, found in matches
                for region in regions
                if (common := narrowed.intersect(region.logical_box)) is not None
            ]
        yield from matches


def _whole_rows(box: Box, shape: Shape) -> Box:
    """Grow the box to all of each dimension after the first in which it is wider than 1.

    The flat interval of the grown box starts and ends with a row, so that a source held in one piece stays one block.
    """
    run = next((dim for dim, extent in enumerate(box.shape) if extent > 1), len(shape) - 1)
    rest = shape[run + 1 :]
    return Box((*box.start[: run + 1], *(0,) * len(rest)), (*box.stop[: run + 1], *rest))


def _regions(fragment: Fragment[B], local_shape: Shape, piece: Piece, local_box: Box) -> Iterator[_Region[B]]:
    """Yield the parts of ``local_box``, itself a part of ``piece``, that lie in one fragment."""
    strides = row_major_strides(local_shape)
    for held in flat_interval_boxes(local_shape, fragment.local_start, fragment.local_start + fragment.numel):
        common = held.intersect(local_box)
        if common is None:
            continue
        local_flat = sum(low * stride for low, stride in zip(common.start, strides, strict=True))
        start = fragment.buffer_start + local_flat - fragment.local_start
        logical_box = common.moved(piece.local_box.start, piece.logical_box.start)
        yield _Region(logical_box, StridedView(fragment.buffer, start, strides))


def prove_cover(wanted: Box, found: Sequence[Box]) -> None:
    """Check that ``found`` tiles ``wanted``: all boxes inside, no two with a common element, and as many elements in all.

    Raises:
        ValueError: names the number of missing elements, or the first two boxes that overlap.
    """
    if len(found) == 1 and found[0] == wanted:
        return
    if any(not wanted.contains(box) for box in found):
        raise ValueError(f"a source box leaves the wanted box {wanted}")
    if overlap := overlapping(found):
        raise ValueError(f"the checkpoint holds elements twice: {overlap[0]} and {overlap[1]}")
    missing = wanted.numel - sum(box.numel for box in found)
    if missing:
        raise ValueError(
            f"{missing} of {wanted.numel} elements of {wanted.start}..{wanted.stop} are not in the checkpoint"
        )


def overlapping_fragments(fragments: Iterable[Fragment[B]]) -> tuple[Fragment[B], Fragment[B]] | None:
    """Return two fragments that claim the same element of the same buffer, or None.

    A target whose fragments pass this check can't be written twice by copies that `prove_cover` accepted one by one.
    """
    by_buffer: dict[B, list[Fragment[B]]] = {}
    for fragment in fragments:
        by_buffer.setdefault(fragment.buffer, []).append(fragment)
    for held in by_buffer.values():
        held.sort(key=lambda fragment: fragment.buffer_start)
        for before, after in pairwise(held):
            if before.buffer_start + before.numel > after.buffer_start:
                return before, after
    return None
