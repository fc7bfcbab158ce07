"""The share of each replica's reads, and copies cut into parts: each against a count of single elements."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ucp_deepspeed.layout import Replicate, Shard
from ucp_deepspeed.plan import BlockCopy, Division, Fragment, Shareable, StridedView, divide, read_together, without

SIZES = st.lists(st.tuples(st.integers(0, 500), st.sampled_from([1, 2, 4, 8])), max_size=8)


@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.data())
def test_ranks_read_each_element_once_and_as_much_as_the_others(
    sizes: list[tuple[int, int]], dp: int, tp: int, data: st.DataObject
) -> None:
    """One of all ranks reads what tensor-parallel ranks hold alike; one of each tensor-parallel rank's reads the rest."""
    buffers = [Shareable(numel, itemsize, "replicas", data.draw(_runs(numel))) for numel, itemsize in sizes]
    readers = [np.zeros((tp, buffer.numel), int) for buffer in buffers]
    loads = np.zeros((tp, dp), int)
    for t, d in np.ndindex(tp, dp):
        for buffer, division, seen in zip(
            buffers, divide(buffers, {"replicas": (dp, d)}, (tp, t), 0), readers, strict=True
        ):
            for start, stop in division.read(buffer.numel):
                seen[t, start:stop] += 1
                loads[t, d] += (stop - start) * buffer.itemsize
    cuts = 0
    for buffer, seen in zip(buffers, readers, strict=True):
        alike = np.zeros(buffer.numel, bool)
        for start, stop in buffer.alike:
            alike[start:stop] = True
            cuts += 1
        assert (seen.sum(axis=0) == np.where(alike, 1, tp)).all() and (seen[:, ~alike] == 1).all()
    assert loads.max(axis=0).sum() <= loads.min(axis=0).sum() + dp * 2 * 64  # cuts fall on multiples of 64 bytes


@given(SIZES, st.integers(1, 7))
def test_each_reader_is_known_to_all(sizes: list[tuple[int, int]], ranks: int) -> None:
    buffers = [Shareable(numel, itemsize, "replicas") for numel, itemsize in sizes]
    found = [divide(buffers, {"replicas": (ranks, rank)}, (1, 0), 0) for rank in range(ranks)]
    for place, buffer in enumerate(buffers):
        sharings = [divisions[place].replicas for divisions in found]
        if sharings[0] is None:
            assert ranks == 1 or buffer.numel == 0
            continue
        assert len({sharing.shares for sharing in sharings if sharing}) == 1
        for rank, divisions in enumerate(found):
            mine = [(share.start, share.stop) for share in sharings[0].shares if share.reader == rank]
            assert divisions[place].read(buffer.numel) == mine


def test_too_little_is_read_by_each() -> None:
    buffers = [Shareable(100, 4, "replicas", ((0, 50),))]
    assert divide(buffers, {"replicas": (2, 0)}, (2, 0), 401) == [Division()]
    (division,) = divide(buffers, {"replicas": (1, 0)}, (2, 1), 200)
    assert division.replicas is None and division.read(100) == [(16, 100)]


def test_what_tensor_parallel_ranks_read_together() -> None:
    norm, matrix = Replicate(), Shard(0)
    layouts = {"norm": norm.layout((6,), ((6,),) * 4), "matrix": matrix.layout((8, 2), ((2, 2),) * 4)}
    shapes = {"norm": ((6,),) * 4, "matrix": ((2, 2),) * 4}
    one = {"norm": norm.layout((6,), ((6,),)), "matrix": matrix.layout((8, 2), ((8, 2),))}
    three = one | {"norm": norm.layout((6,), ((6,),) * 3)}
    for sources in (one, three):
        assert read_together(layouts, sources, shapes.values(), 2, 4) == {"norm"}
    assert not read_together(layouts, layouts, shapes.values(), 2, 4)  # a copy for each
    uneven = [*shapes.values(), ((3,), (3,), (3,), (2,))]
    assert not read_together(layouts, one, uneven, 2, 4)
    on_first_stage = [*shapes.values(), ((3,), (2,), None, None)]
    assert not read_together(layouts, one, on_first_stage, 1, 2)
    assert read_together(layouts, one, on_first_stage, 3, 2) == {"norm"}


def test_cost_grows_with_buffers_and_ranks_and_not_with_both() -> None:
    divisions = divide([Shareable(1000, 4, "replicas")] * 3000, {"replicas": (1000, 7)}, (1, 0))
    assert divisions == [Division()] * 3000
    divisions = divide([Shareable(1000, 4, "replicas")] * 3000, {"replicas": (1000, 7)}, (1, 0), 0)
    assert sum(len(division.replicas.shares) for division in divisions if division.replicas) <= 4000


@st.composite
def _runs(draw: st.DrawFn, numel: int) -> tuple[tuple[int, int], ...]:
    """Some parts of a buffer, in order; they may touch."""
    places = sorted(draw(st.sets(st.integers(0, numel), max_size=8)))
    return tuple((low, high) for low, high in pairwise(places) if draw(st.booleans()))


INTERVALS = st.sets(st.integers(0, 60), max_size=10).map(lambda places: _every_other(sorted(places)))


def _every_other(places: list[int]) -> list[tuple[int, int]]:
    """Intervals between every other two of some places."""
    return list(zip(places[::2], places[1::2], strict=False))


@given(INTERVALS, INTERVALS)
def test_intervals_without_others(intervals: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    expected = _elements(intervals) - _elements(taken)
    found = without(intervals, taken)
    assert _elements(found) == expected and sum(stop - start for start, stop in found) == len(expected)


def _elements(intervals: list[tuple[int, int]]) -> set[int]:
    return {place for start, stop in intervals for place in range(start, stop)}


@given(st.integers(0, 20), st.integers(1, 30), st.integers(0, 20), INTERVALS)
def test_a_fragment_within_intervals(
    local_start: int, numel: int, buffer_start: int, intervals: list[tuple[int, int]]
) -> None:
    whole = {buffer_start + step: local_start + step for step in range(numel)}
    parts = list(Fragment(local_start, numel, "buffer", buffer_start).within(intervals))
    found = [(part.buffer_start + step, part.local_start + step) for part in parts for step in range(part.numel)]
    assert found == [(place, whole[place]) for place in sorted(_elements(intervals)) if place in whole]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 40), st.permutations(range(4)))
def test_the_parts_of_a_copy_do_the_same_within_the_bound(shape: list[int], most: int, order: list[int]) -> None:
    dims = [dim for dim in order if dim < len(shape)]
    strides, step = [0] * len(shape), 1
    for dim in reversed(dims):  # the source's dimensions in any order, with a gap between rows
        strides[dim], step = step, step * shape[dim] + 3
    target = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    whole = BlockCopy(tuple(shape), StridedView("t", 7, target), (StridedView("s", 5, tuple(strides)),), Fraction(1, 2))
    parts = list(whole.parts(most))
    assert sorted(pair for part in parts for pair in _moved(part)) == sorted(_moved(whole))
    for part in parts:
        assert part.factor == whole.factor
        assert part.sources[0].span(part.shape) <= most or set(part.shape) == {1}


def _moved(copy: BlockCopy[str, str]) -> list[tuple[int, int]]:
    """Pairs of places: where an element goes, and where it comes from."""
    (source,) = copy.sources
    indices = list(np.ndindex(*copy.shape))
    target, held = ([view.start + int(np.dot(i, view.strides)) for i in indices] for view in (copy.target, source))
    return list(zip(target, held, strict=True))
