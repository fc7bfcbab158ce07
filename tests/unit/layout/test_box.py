"""Boxes against sets of indices and numpy's own indexing."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucp_deepspeed.layout.box import Box, Shape, flat_interval_boxes, row_major_strides

Index = tuple[int, ...]

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, ndim: int) -> Box:
    """Any box of small indices, empty ones too."""
    bounds = [sorted(draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))) for _ in range(ndim)]
    return Box(tuple(low for low, _ in bounds), tuple(high for _, high in bounds))


@st.composite
def box_pairs(draw: st.DrawFn) -> tuple[Box, Box]:
    """Two boxes of the same number of dimensions."""
    ndim = draw(st.integers(0, 4))
    return draw(boxes(ndim)), draw(boxes(ndim))


@st.composite
def boxes_in_shapes(draw: st.DrawFn) -> tuple[Shape, Box]:
    """A shape and a non-empty box inside it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    stop = tuple(draw(st.integers(low + 1, extent)) for low, extent in zip(start, shape, strict=True))
    return shape, Box(start, stop)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[Shape, int, int]:
    """A shape and a flat interval of it."""
    shape = draw(shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


def indices(box: Box) -> set[Index]:
    return set(product(*(range(low, high) for low, high in zip(box.start, box.stop, strict=True))))


def flat_ids(shape: Shape, box: Box) -> NDArray[np.int64]:
    """Flat positions of the box's elements, in row-major order, as numpy sees them."""
    region = tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))
    return np.arange(prod(shape)).reshape(shape)[region].ravel()


@settings(deadline=None)
@given(box_pairs())
def test_shape_and_numel_count_indices(pair: tuple[Box, Box]) -> None:
    box = pair[0]
    assert box.numel == len(indices(box))
    assert box.shape == np.empty(box.stop)[tuple(slice(low, None) for low in box.start)].shape


@settings(deadline=None, max_examples=300)
@given(box_pairs())
def test_intersect_is_set_intersection(pair: tuple[Box, Box]) -> None:
    one, other = pair
    expected = indices(one) & indices(other)
    common = one.intersect(other)
    assert (set() if common is None else indices(common)) == expected
    assert common is None or common.numel > 0
    assert common == other.intersect(one)


@settings(deadline=None, max_examples=300)
@given(box_pairs())
def test_contains_is_subset(pair: tuple[Box, Box]) -> None:
    outer, inner = pair
    if inner.numel:
        assert outer.contains(inner) == (indices(inner) <= indices(outer))
    assert outer.contains(outer)
    assert not outer.contains(inner) or indices(inner) <= indices(outer)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (Box((1,), (1,)), True),
        (Box((4,), (4,)), True),
        (Box((5,), (5,)), False),
        (Box((0,), (5,)), False),
    ],
)
def test_contains_at_the_bounds(inner: Box, expected: bool) -> None:
    assert Box((1,), (4,)).contains(inner) is expected


@settings(deadline=None)
@given(box_pairs(), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_moved_shifts_each_index(pair: tuple[Box, Box], origin: list[int]) -> None:
    box, other = pair
    new_origin, old_origin = other.start, tuple(origin[: len(box.start)])
    shift = [new - old for old, new in zip(old_origin, new_origin, strict=True)]
    assume(all(low + by >= 0 for low, by in zip(box.start, shift, strict=True)))
    moved = box.moved(old_origin, new_origin)
    assert indices(moved) == {tuple(x + by for x, by in zip(index, shift, strict=True)) for index in indices(box)}
    assert moved.shape == box.shape
    assert moved.moved(new_origin, old_origin) == box


@settings(deadline=None)
@given(boxes_in_shapes())
def test_flat_range_spans_the_flat_positions(case: tuple[Shape, Box]) -> None:
    shape, box = case
    ids = flat_ids(shape, box)
    assert box.flat_range(shape) == (ids.min(), ids.max() + 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_row_major_strides_are_numpys(shape: Shape) -> None:
    array = np.empty(shape, dtype=np.int64)
    assert row_major_strides(shape) == tuple(stride // array.itemsize for stride in array.strides)


@settings(deadline=None, max_examples=500)
@given(intervals())
def test_interval_boxes_tile_the_interval_in_flat_order(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    found = flat_interval_boxes(shape, start, stop)
    parts = [flat_ids(shape, box) for box in found]
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == list(range(start, stop))
    assert all(len(part) for part in parts)
    assert len(found) <= max(2 * len(shape) - 1, 1)
    assert all(Box.whole(shape).contains(box) for box in found)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (3, 1, 4), (2, 3, 2), (2, 2, 2, 3)])
def test_interval_boxes_of_every_interval(shape: Shape) -> None:
    numel = prod(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            found = flat_interval_boxes(shape, start, stop)
            ids = [position for box in found for position in flat_ids(shape, box).tolist()]
            assert ids == list(range(start, stop))
            assert len(found) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)])
def test_an_empty_tensor_has_no_interval_boxes(shape: Shape) -> None:
    assert flat_interval_boxes(shape, 0, 0) == ()
    assert Box.whole(shape).numel == 0


def test_whole_rows_make_one_box() -> None:
    assert flat_interval_boxes((5, 3, 2), 6, 24) == (Box((1, 0, 0), (4, 3, 2)),)
    assert flat_interval_boxes((5, 3, 2), 0, 30) == (Box.whole((5, 3, 2)),)
    assert flat_interval_boxes((), 0, 1) == (Box((), ()),)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7), (7, 7)])
def test_an_interval_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"interval {start}\.\.{stop} leaves .*\(2, 3\) \(6 elements\)"):
        flat_interval_boxes((2, 3), start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        ((0,), (1, 1), "different numbers of dimensions"),
        ((2,), (1,), "backwards"),
        ((0, -1), (1, 1), "below zero"),
    ],
)
def test_an_impossible_box_is_refused(start: Shape, stop: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(start, stop)
