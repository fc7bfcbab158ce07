"""Layouts against maps that name, for each local element of each rank, the logical element it is."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, combinations
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import NOTHING, Layout, LocalTensor, Piece, across_stages, overlapping

PADDING = -1


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))


def element_map(layout: Layout) -> list[NDArray[np.int64]]:
    """For each rank the flat logical position of each local element, in flat local order."""
    logical = np.arange(prod(layout.logical_shape)).reshape(layout.logical_shape)
    found = []
    for local in layout.locals:
        array = np.full(local.shape, PADDING)
        for piece in local.pieces:
            array[region(piece.local_box)] = logical[region(piece.logical_box)]
        found.append(array.ravel())
    return found


@st.composite
def tilings(draw: st.DrawFn, min_extent: int = 0) -> tuple[Shape, list[Box]]:
    """A shape and boxes that tile it, made by cutting a box in two again and again."""
    shape = tuple(draw(st.lists(st.integers(min_extent, 5), max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box.start[dim], box.stop[dim]))
        boxes.append(Box(box.start, (*box.stop[:dim], at, *box.stop[dim + 1 :])))
        boxes.append(Box((*box.start[:dim], at, *box.start[dim + 1 :]), box.stop))
    return shape, [box for box in boxes if box.numel]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Tiles dealt out to ranks, each at some place of a local tensor that may have padding, some tiles on two ranks."""
    shape, boxes = draw(tilings())
    degree = draw(st.integers(1, 3))
    held: list[list[Box]] = [[] for _ in range(degree)]
    for box in boxes:
        for rank in draw(st.sets(st.integers(0, degree - 1), min_size=1, max_size=2)):
            held[rank].append(box)
    locals_ = []
    for mine in held:
        margin = tuple(draw(st.integers(0, 1)) for _ in shape)
        pieces = []
        end = tuple(0 for _ in shape)
        for box in mine if shape else mine[:1]:
            start = (end[0] + margin[0], *margin[1:]) if shape else ()
            pieces.append(Piece(box, box.moved(box.start, start)))
            end = tuple(map(max, end, pieces[-1].local_box.stop))
        locals_.append(LocalTensor(tuple(map(sum, zip(end, margin, strict=True))), tuple(pieces)))
    return Layout(shape, tuple(locals_))


def one_rank_each(shape: Shape, boxes: list[Box]) -> Layout:
    zero = (0,) * len(shape)
    return Layout(shape, tuple(LocalTensor(box.shape, (Piece(box, box.moved(box.start, zero)),)) for box in boxes))


@settings(deadline=None, max_examples=200)
@given(layouts())
def test_merged_dimensions_keep_the_element_map(layout: Layout) -> None:
    before = element_map(layout)
    mergeable = sorted(layout.mergeable_dims())
    for dims in chain.from_iterable(combinations(mergeable, count) for count in range(len(mergeable) + 1)):
        merged = layout.merged(frozenset(dims))
        assert len(merged.logical_shape) == len(layout.logical_shape) - len(dims)
        for old, new in zip(before, element_map(merged), strict=True):
            assert old.tolist() == new.tolist()
    assert (layout.merged(frozenset(mergeable)).union, layout.scale) == (layout.union, layout.scale)


@settings(deadline=None, max_examples=200)
@given(layouts())
def test_a_dimension_is_mergeable_where_nobody_cuts_the_next(layout: Layout) -> None:
    for dim in range(len(layout.logical_shape) - 1):
        extent = layout.logical_shape[dim + 1]
        held = [shape for local in layout.locals for shape in (local.shape, *(p.local_box.shape for p in local.pieces))]
        uncut = all(shape[dim + 1] == extent for shape in held)
        assert (dim in layout.mergeable_dims()) == uncut
        if not uncut:
            with pytest.raises(ValueError, match=rf"dimensions \[{dim}\] of .* are cut"):
                layout.merged(frozenset({dim}))


def test_merging_keeps_union_and_scale() -> None:
    local = LocalTensor((2, 3), (Piece(Box.whole((2, 3)), Box.whole((2, 3))),))
    layout = Layout((2, 3), (local, local), "mean", Fraction(1, 2), {"fp32": 1})
    merged = layout.merged(frozenset({0}))
    assert (merged.logical_shape, merged.union, merged.scale) == ((6,), "mean", Fraction(1, 2))
    assert merged.scale_powers == {"fp32": 1}
    assert layout.merged(frozenset()) is layout


@settings(deadline=None, max_examples=200)
@given(tilings(), st.data())
def test_a_tiling_is_accepted_and_a_broken_one_refused(tiling: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = tiling
    layout = one_rank_each(shape, boxes)
    assert sorted(np.concatenate([[], *element_map(layout)]).tolist()) == list(range(prod(shape)))
    if not boxes:
        return
    victim = data.draw(st.integers(0, len(boxes) - 1))
    without = boxes[:victim] + boxes[victim + 1 :]
    with pytest.raises(ValueError, match=rf"cover {prod(shape) - boxes[victim].numel} of the {prod(shape)} elements"):
        one_rank_each(shape, without)
    grown = _grown(boxes[victim], data)
    if grown != boxes[victim]:
        with pytest.raises(ValueError, match=r"overlap without being equal|outside"):
            one_rank_each(shape, [*boxes, grown])


def _grown(box: Box, data: st.DataObject) -> Box:
    """The box with one bound moved by one: it overlaps a neighbour, its old self, or leaves the tensor."""
    if not box.start:
        return box
    dim = data.draw(st.integers(0, len(box.start) - 1))
    return Box(box.start, (*box.stop[:dim], box.stop[dim] + 1, *box.stop[dim + 1 :]))


def test_a_box_outside_that_makes_up_the_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outside: Box\(start=\(4,\), stop=\(6,\)\)"):
        one_rank_each((4,), [Box((0,), (2,)), Box((4,), (6,))])


def test_equal_boxes_are_one_and_the_ranks_that_hold_them_are_known() -> None:
    left, right = Box((0, 0), (2, 1)), Box((0, 1), (2, 3))
    layout = one_rank_each((2, 3), [left, right, left])
    holders = layout.holders()
    assert list(holders) == [left, right]
    assert {box: [rank for rank, _ in held] for box, held in holders.items()} == {left: [0, 2], right: [1]}
    assert layout.degree == 3


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 3), st.data())
def test_overlapping_finds_two_boxes_with_a_common_element(ndim: int, data: st.DataObject) -> None:
    bounds = st.tuples(st.integers(0, 6), st.integers(0, 3)).map(lambda pair: (pair[0], sum(pair)))
    box = st.lists(bounds, min_size=ndim, max_size=ndim).map(
        lambda rows: Box(tuple(low for low, _ in rows), tuple(high for _, high in rows))
    )
    boxes = data.draw(st.lists(box, max_size=5))
    expected = any(one.intersect(other) for one, other in combinations(boxes, 2))
    found = overlapping(boxes)
    assert (found is not None) == expected
    if found is not None:
        assert found[0].intersect(found[1]) is not None
        assert boxes.count(found[0]) > 1 or found[0] != found[1]


def test_overlapping_remembers_a_long_box_behind_a_short_one() -> None:
    long, short, late = Box((0, 0), (9, 2)), Box((1, 2), (3, 4)), Box((5, 1), (6, 3))
    assert overlapping([long, short]) is None
    assert overlapping([late, short, long]) == (long, late)


def test_a_local_tensor_refuses_pieces_that_leave_it_or_overlap() -> None:
    first = Piece(Box((0,), (3,)), Box((0,), (3,)))
    with pytest.raises(ValueError, match=r"leaves the local tensor of shape \(2,\)"):
        LocalTensor((2,), (first,))
    with pytest.raises(ValueError, match="overlap in the local tensor"):
        LocalTensor((5,), (first, Piece(Box((3,), (5,)), Box((2,), (4,)))))
    assert LocalTensor((5,), (first, Piece(Box((3,), (5,)), Box((3,), (5,))))).shape == (5,)


def test_a_piece_refuses_boxes_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        Piece(Box((0,), (3,)), Box((0,), (2,)))
    with pytest.raises(ValueError, match="differ in shape"):
        Piece(Box((0, 0), (2, 3)), Box((0, 0), (3, 2)))


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3), (2, 0, 3)])
def test_whole_is_the_identity(shape: Shape) -> None:
    layout = Layout.whole(shape)
    assert layout.degree == 1
    assert element_map(layout)[0].tolist() == list(range(prod(shape)))


def test_factor_is_the_scale_to_the_power_of_the_state() -> None:
    locals_ = Layout.whole((2,)).locals
    scaled = Layout((2,), locals_, scale=Fraction(1, 4), scale_powers={"fp32": 1, "exp_avg": -1, "exp_avg_sq": -2})
    factors = {state: scaled.factor(state) for state in ("fp32", "exp_avg", "exp_avg_sq", "momentum")}
    assert factors == {"fp32": Fraction(1, 4), "exp_avg": 4, "exp_avg_sq": 16, "momentum": None}
    assert Layout.whole((2,)).factor("momentum") == 1


HELD_NOWHERE = [PADDING]
"""The answer of `element_map` for a rank without the parameter: its tensor has no dimension, and no piece."""


@settings(deadline=None, max_examples=200)
@given(layouts(), st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
def test_across_stages_each_stage_that_holds_it_has_its_own_map(layout: Layout, held: list[bool]) -> None:
    """Rank by rank, also after merging dimensions; and dimensions are mergeable where they were on a stage."""
    built = across_stages([layout if here else None for here in held])
    assert (built.logical_shape, built.degree) == (layout.logical_shape, len(held) * layout.degree)
    own = [found.tolist() for found in element_map(layout)]
    expected = [found for here in held for found in (own if here else [HELD_NOWHERE] * layout.degree)]
    assert [found.tolist() for found in element_map(built)] == expected
    assert built.mergeable_dims() == layout.mergeable_dims()
    merged = built.merged(built.mergeable_dims())
    assert [found.tolist() for found in element_map(merged)] == expected
    holders = {box: len(found) for box, found in layout.holders().items()}
    assert {box: len(found) for box, found in built.holders().items()} == {
        box: count * sum(held) for box, count in holders.items()
    }
    nowhere = [rank for rank in range(built.degree) if not held[rank // layout.degree]]
    assert all(built.locals[rank] == merged.locals[rank] == NOTHING for rank in nowhere)


def test_across_stages_of_one_stage_is_its_layout() -> None:
    layout = one_rank_each((4,), [Box((0,), (2,)), Box((2,), (4,))])
    assert across_stages([layout]) is layout


@pytest.mark.parametrize("stages", [[], [None], [None, None]])
def test_across_stages_without_a_holder_is_refused(stages: list[None]) -> None:
    with pytest.raises(ValueError, match="no pipeline stage holds it"):
        across_stages(stages)


def test_across_stages_keeps_union_and_scale() -> None:
    local = Layout.whole((2, 3)).locals[0]
    layout = Layout((2, 3), (local, local), "mean", Fraction(1, 2), {"fp32": 1})
    built = across_stages([None, layout])
    assert (built.union, built.scale, built.scale_powers) == ("mean", Fraction(1, 2), {"fp32": 1})
    assert built.locals == (NOTHING, NOTHING, local, local)


def test_across_stages_refuses_stages_of_other_shapes() -> None:
    first, second = Layout.whole((4, 2)), Layout.whole((2, 4))
    with pytest.raises(ValueError, match=r"hold it in shapes \(4, 2\) and \(2, 4\)"):
        across_stages([first, None, second])
    with pytest.raises(ValueError, match="pipeline stages hold it in shapes"):
        across_stages([first, across_stages([first, first])])


def test_across_stages_refuses_another_cut() -> None:
    """Both halves by row here, by column there; the same halves, but the other way round, are one layout."""
    rows = [Box((0, 0), (1, 2)), Box((1, 0), (2, 2))]
    columns = [Box((0, 0), (2, 1)), Box((0, 1), (2, 2))]
    with pytest.raises(ValueError, match="overlap without being equal"):
        across_stages([one_rank_each((2, 2), rows), one_rank_each((2, 2), columns)])
    built = across_stages([one_rank_each((2, 2), rows), None, one_rank_each((2, 2), rows[::-1])])
    assert [found.tolist() for found in element_map(built)] == [[0, 1], [2, 3], [-1], [-1], [2, 3], [0, 1]]


def test_a_stage_without_the_parameter_forbids_no_merging() -> None:
    """A rank that holds an empty share of it does: its tensor has dimensions."""
    whole = Layout.whole((2, 3, 4))
    assert across_stages([None, whole, None]).mergeable_dims() == {0, 1}
    assert across_stages([None, whole, None]).merged(frozenset({1})).locals[1].shape == (2, 12)
    empty_share = LocalTensor((2, 3, 0), ())
    beside = Layout((2, 3, 4), (*whole.locals, empty_share))
    assert across_stages([None, beside]).mergeable_dims() == {0}


@pytest.mark.parametrize(
    ("shape", "box"),
    [((), Box((), ())), ((5,), Box((1,), (4,))), ((4, 5), Box((0, 2), (4, 3))), ((3, 4, 5), Box((1, 0, 2), (2, 4, 5)))],
)
def test_a_box_with_what_lies_around_it(shape: tuple[int, ...], box: Box) -> None:
    layout = Layout.around(shape, box)  # which checks that the boxes are disjoint and cover all
    assert [piece.logical_box for piece in layout.locals[0].pieces] == [box]
    assert layout.locals[0].shape == box.shape
    assert all(piece.logical_box.intersect(box) is None for local in layout.locals[1:] for piece in local.pieces)
