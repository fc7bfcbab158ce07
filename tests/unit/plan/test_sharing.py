"""Which replica reads what, and copies cut into parts: each against a count of single elements."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ucp_deepspeed.plan import BlockCopy, Fragment, StridedView, share

SIZES = st.lists(st.tuples(st.integers(0, 500), st.sampled_from([1, 2, 4, 8])), max_size=8)


@given(SIZES, st.integers(1, 7))
def test_replicas_read_each_element_once_and_as_much_as_the_others(buffers: list[tuple[int, int]], ranks: int) -> None:
    readers = [np.zeros(numel, int) for numel, _ in buffers]
    loads = []
    for rank in range(ranks):
        loads.append(0)
        for (_, itemsize), sharing, seen in zip(buffers, share(buffers, ranks, rank), readers, strict=True):
            start, stop = sharing.mine
            seen[start:stop] += 1
            loads[-1] += (stop - start) * itemsize
    assert all((seen == 1).all() for seen in readers)
    assert max(loads) - min(loads) <= 2 * 64  # cuts fall on multiples of 64 bytes


@given(st.integers(0, 20), st.integers(1, 30), st.integers(0, 20), st.integers(0, 60), st.integers(0, 60))
def test_a_fragment_clipped(local_start: int, numel: int, buffer_start: int, start: int, stop: int) -> None:
    whole = {buffer_start + step: local_start + step for step in range(numel)}
    part = Fragment(local_start, numel, "buffer", buffer_start).clipped(start, stop)
    expected = {place: element for place, element in whole.items() if start <= place < stop}
    found = {} if part is None else {part.buffer_start + step: part.local_start + step for step in range(part.numel)}
    assert found == expected


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
