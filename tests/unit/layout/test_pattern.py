"""Patterns against numpy: what each rank holds when an array of element numbers is split with numpy's own functions."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import Layout
from ucp_deepspeed.layout.pattern import (
    AnyPattern,
    Partial,
    Pattern,
    PerRank,
    Replicate,
    Scale,
    Shard,
    ShardGrid,
    Unique,
    split_evenly,
)

PADDING = -1
Array = NDArray[np.int64]
Case = tuple[Shape, AnyPattern, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A logical shape, a pattern that fits it, and a degree."""
    degree = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    kinds = ["unique", "per-rank", "replicate", "partial"] + ["shard", "widths", "vocabulary", "parts", "heads"] * bool(
        shape
    )
    kinds += ["grid"] * (len(shape) > 1)
    kind = draw(st.sampled_from(kinds))
    if kind == "unique":
        return shape, Unique(), 1
    if kind == "per-rank":
        return (degree, *shape), PerRank(), degree
    if kind in ("replicate", "partial"):
        return shape, Replicate() if kind == "replicate" else Partial(), degree
    if kind == "grid":
        dims = tuple(draw(st.permutations(range(len(shape))))[: draw(st.integers(2, len(shape)))])
        grid = tuple(draw(st.integers(1, 3)) for _ in dims)
        others = tuple((prod(grid) + more, *(1,) * (len(dims) - 1)) for more in range(1, draw(st.integers(1, 3))))
        return shape, ShardGrid(dims, (*others, grid)), draw(st.sampled_from([1, prod(grid)]))
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "heads":
        parts, heads = draw(head_counts(degree))
        unit = draw(st.integers(0, 2)) * prod(heads)
        return _with(shape, dim, sum(parts) * unit), Shard(dim, parts=parts, heads=heads), degree
    if kind == "shard":
        return shape, Shard(dim), degree
    if kind == "vocabulary":
        return shape, Shard(dim, vocabulary=True, pad_to_multiple=draw(st.integers(1, 4))), degree
    if kind == "widths":
        widths = tuple(draw(st.lists(st.integers(0, 5), min_size=degree, max_size=degree)))
        return _with(shape, dim, sum(widths)), Shard(dim, widths=widths), degree
    parts = draw(st.sampled_from([(1, 1), (2, 1, 1), (4, 1, 1), (1, 1, 1), (3,)]))
    return _with(shape, dim, sum(parts) * draw(st.integers(0, 4))), Shard(dim, parts=parts), degree


@st.composite
def head_counts(draw: st.DrawFn, degree: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parts, and for each the number of its heads: at least as many as there are ranks, or a divisor of that."""
    count = st.one_of(
        st.integers(degree, degree + 3), st.sampled_from([one for one in range(1, degree + 1) if degree % one == 0])
    )
    parts = draw(st.sampled_from([(1,), (1, 1), (2, 1, 1), (3, 1)]))
    return parts, tuple(draw(count) for _ in parts)


def _with(shape: Shape, dim: int, extent: int) -> Shape:
    return (*shape[:dim], extent, *shape[dim + 1 :])


def numbered(shape: Shape) -> Array:
    return np.arange(prod(shape)).reshape(shape)


def split_by_numpy(whole: Array, pattern: AnyPattern, degree: int) -> list[Array]:
    """Each rank's local array."""
    if isinstance(pattern, ShardGrid):
        return split_grid_by_numpy(whole, pattern, degree)
    if isinstance(pattern, PerRank):
        return [np.asarray(share) for share in whole]
    if not isinstance(pattern, Shard):
        return [whole] * degree
    dim = pattern.dim
    if pattern.widths is not None:
        return np.split(whole, np.cumsum(pattern.widths)[:-1], axis=dim)
    if pattern.vocabulary:
        while whole.shape[dim] % (pattern.pad_to_multiple * degree):
            row = np.full(_with(whole.shape, dim, 1), PADDING)
            whole = np.concatenate([whole, row], axis=dim)
        return np.split(whole, degree, axis=dim)
    unit = whole.shape[dim] // sum(pattern.parts)
    fused = np.split(whole, np.cumsum([unit * part for part in pattern.parts])[:-1], axis=dim)
    if pattern.heads is None:
        shares = [np.array_split(part, degree, axis=dim) for part in fused]
    else:
        shares = [split_heads_by_numpy(*part, degree, dim) for part in zip(fused, pattern.heads, strict=True)]
    return [np.concatenate([share[rank] for share in shares], axis=dim) for rank in range(degree)]


def split_heads_by_numpy(part: Array, heads: int, degree: int, dim: int) -> list[Array]:
    """Whole heads for each rank, or each head for several ranks."""
    units = np.split(part, heads, axis=dim)
    if heads < degree:
        return [unit for unit in units for _ in range(degree // heads)]
    held = np.array_split(np.arange(heads), degree)
    return [np.concatenate([units[head] for head in mine], axis=dim) for mine in held]


def split_grid_by_numpy(whole: Array, pattern: ShardGrid, degree: int) -> list[Array]:
    """Cut along each axis, one after the other."""
    grids = [(1,) * len(pattern.dims), *pattern.grids]
    found = [whole]
    for dim, count in zip(pattern.dims, next(grid for grid in grids if prod(grid) == degree), strict=True):
        found = [share for array in found for share in np.array_split(array, count, axis=dim)]
    return found


def placed(layout: Layout) -> list[Array]:
    """Each rank's local array, filled with element numbers by the layout's pieces."""
    whole = numbered(layout.logical_shape)
    found = []
    for local in layout.locals:
        array = np.full(local.shape, PADDING)
        for piece in local.pieces:
            array[_region(piece.local_box)] = whole[_region(piece.logical_box)]
        found.append(array)
    return found


def _region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))


def assert_same(found: list[Array], expected: list[Array]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)


@settings(deadline=None, max_examples=500)
@given(cases())
def test_a_pattern_puts_each_element_where_numpy_does(case: Case) -> None:
    shape, pattern, degree = case
    expected = split_by_numpy(numbered(shape), pattern, degree)
    local_shapes = pattern.local_shapes(shape, degree)
    assert local_shapes == tuple(array.shape for array in expected)
    layout = pattern.layout(shape, local_shapes)
    assert (layout.logical_shape, layout.degree) == (shape, degree)
    assert layout.union == ("mean" if isinstance(pattern, Partial) else "take")
    # A per-rank layout gives the local tensors a first dimension of one more.
    assert_same([array.reshape(shape) for array, shape in zip(placed(layout), local_shapes, strict=True)], expected)


@settings(deadline=None, max_examples=300)
@given(cases())
def test_logical_shape_inverts_local_shapes(case: Case) -> None:
    shape, pattern, degree = case
    local_shapes = pattern.local_shapes(shape, degree)
    vocabulary = shape[pattern.dim] if isinstance(pattern, Shard) and pattern.vocabulary else None
    assert pattern.logical_shape(local_shapes, vocabulary) == shape


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2))
def test_a_plain_shard_follows_the_widths_that_the_ranks_hold(widths: list[int], dim: int) -> None:
    local_shapes = [_with((2, 3, 2), dim, width) for width in widths]
    pattern = Shard(dim)
    shape = pattern.logical_shape(local_shapes)
    assert shape == _with((2, 3, 2), dim, sum(widths))
    assert_same(
        placed(pattern.layout(shape, local_shapes)), np.split(numbered(shape), np.cumsum(widths)[:-1], axis=dim)
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_vocabulary_padding_may_fill_several_ranks(widths: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(0, sum(widths)))
    local_shapes = [(width, 2) for width in widths]
    pattern = Shard(vocabulary=True)
    assert pattern.logical_shape(local_shapes) == (sum(widths), 2)
    assert pattern.logical_shape(local_shapes, size) == (size, 2)
    padded = np.full((sum(widths), 2), PADDING)
    padded[:size] = numbered((size, 2))
    assert_same(placed(pattern.layout((size, 2), local_shapes)), np.split(padded, np.cumsum(widths)[:-1]))


def test_only_a_vocabulary_is_cut_to_its_size() -> None:
    assert Shard().logical_shape([(3, 2), (3, 2)], vocabulary_size=5) == (6, 2)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 8))
def test_split_evenly_is_array_split(extent: int, degree: int) -> None:
    assert split_evenly(extent, degree) == tuple(len(part) for part in np.array_split(np.arange(extent), degree))


def test_a_degree_above_the_extent_leaves_empty_shards() -> None:
    layout = Shard(1).layout((2, 2), Shard(1).local_shapes((2, 2), 4))
    assert [local.shape for local in layout.locals] == [(2, 1), (2, 1), (2, 0), (2, 0)]
    assert [len(local.pieces) for local in layout.locals] == [1, 1, 0, 0]


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_scale_is_one_over_the_degree_to_the_power_of_the_state(degree: int) -> None:
    powers = {"fp32": 1, "exp_avg": -1, "exp_avg_sq": -2}
    layout = Replicate(scale=Scale(powers=powers)).layout((3,), [(3,)] * degree)
    assert layout.factor("fp32") == Fraction(1, degree)
    assert layout.factor("exp_avg") == degree
    assert layout.factor("exp_avg_sq") == degree**2
    assert_same(placed(layout), [np.arange(3)] * degree)
    assert Replicate(scale=Scale()).layout((3,), [(3,)] * degree).factor("weight") == Fraction(1, degree)
    assert Replicate().layout((3,), [(3,)] * degree).factor("fp32") == 1


@pytest.mark.parametrize(
    ("pattern", "local_shapes", "vocabulary_size", "message"),
    [
        (Unique(), [(2,), (2,)], None, "unique parameter is held by 2 ranks"),
        (Replicate(), [(2,), (3,)], None, "replicated parameter has different shapes"),
        (Partial(), [(2,), (3,)], None, "partial parameter has different shapes"),
        (PerRank(), [(2,), (3,)], None, "per-rank parameter has different shapes"),
        (Shard(0), [(2, 3), (2, 4)], None, "differ outside dimension 0"),
        (Shard(1), [(2, 3), (3, 3)], None, "differ outside dimension 1"),
        (Shard(0), [(2, 3), (2,)], None, "differ outside dimension 0"),
        (Shard(2), [(2, 3), (2, 3)], None, r"dimension 2 doesn't exist in shape \(2, 3\)"),
        (Shard(vocabulary=True), [(3, 2), (3, 2)], 7, "vocabulary size 7 is above the 6 rows"),
        (
            Shard(heads=(1,), parts=(1,)),
            [(3, 2), (2, 2)],
            None,
            r"5 along dimension 0 over 2 ranks fit no parts \(1,\)",
        ),
        (ShardGrid((0, 1), ((1, 2),)), [(2, 2)] * 4, None, r"no grid for 4 ranks; there are \[\[1, 2\]\]"),
        (ShardGrid((0, 1), ((2, 2),)), [(2, 2), (2, 2), (2, 2), (2, 3)], None, r"form no grid of \(2, 2\)"),
        (ShardGrid((0, 2), ((2, 2),)), [(2, 2)] * 4, None, "dimension 2 doesn't exist"),
    ],
)
def test_contradicting_local_shapes_have_no_logical_shape(
    pattern: Pattern, local_shapes: list[Shape], vocabulary_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.logical_shape(local_shapes, vocabulary_size)


@pytest.mark.parametrize(
    ("pattern", "shape", "degree", "message"),
    [
        (Unique(), (4,), 2, "can't be spread over 2 ranks"),
        (PerRank(), (2, 4), 4, "no layout is known, and 2 shares can't become 4"),
        (Shard(widths=(3, 2)), (6,), 2, r"widths \(3, 2\) don't split 6 over 2 ranks"),
        (Shard(widths=(3, 3)), (6,), 3, r"widths \(3, 3\) don't split 6 over 3 ranks"),
        (Shard(parts=(2, 1)), (7,), 2, r"parts \(2, 1\) don't divide an extent of 7"),
        (Shard(heads=(3,)), (7,), 2, r"3 heads don't divide an extent of 7"),
        (Shard(heads=(2,)), (8,), 3, r"2 heads can't be shared by 3 ranks: their numbers don't divide"),
        (ShardGrid((0, 1), ((2, 2),)), (4, 4), 3, "no grid for 3 ranks"),
        (ShardGrid((0, 1), ((2, 2),)), (4,), 4, r"dimension 1 doesn't exist in shape \(4,\)"),
        (Shard(1), (7,), 2, r"dimension 1 doesn't exist in shape \(7,\)"),
        (Shard(), (), 2, r"dimension 0 doesn't exist in shape \(\)"),
    ],
)
def test_a_logical_shape_that_cannot_be_split_is_refused(
    pattern: Pattern, shape: Shape, degree: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.local_shapes(shape, degree)


@pytest.mark.parametrize(
    ("pattern", "shape", "local_shapes", "message"),
    [
        (Unique(), (4,), [(3,)], "differ from the logical shape"),
        (Replicate(), (4,), [(4,), (3,)], "differ from the logical shape"),
        (Partial(), (4,), [(4,), (3,)], "differ from the logical shape"),
        (PerRank(), (2, 4), [(3,), (3,)], r"don't fit the logical shape \(2, 4\)"),
        (Shard(), (6,), [(3,), (2,)], r"local extents \[3, 2\] don't join to 6 along dimension 0"),
        (Shard(), (6,), [(3,), (4,)], r"local extents \[3, 4\] don't join to 6 along dimension 0"),
        (Shard(vocabulary=True), (6,), [(3,), (2,)], r"local extents \[3, 2\] don't join to 6"),
        (Shard(parts=(1, 1)), (6,), [(4,), (2,), (0,)], r"don't match parts \(1, 1\) of 6: expected \[2, 2, 2\]"),
        (Shard(parts=(1, 1)), (7,), [(4,), (3,)], r"parts \(1, 1\) don't divide an extent of 7"),
        (Shard(1), (6,), [(3,), (3,)], r"dimension 1 doesn't exist in shape \(3,\)"),
        (Shard(0), (4, 3), [(2, 2), (2, 2)], r"don't fit the logical shape \(4, 3\)"),
        (Shard(0), (6, 5), [(3, 6), (3, 6)], r"don't fit the logical shape \(6, 5\)"),
        (Shard(0), (6, 5), [(3,), (3,)], r"don't fit the logical shape \(6, 5\)"),
        (Shard(widths=(4, 2)), (6,), [(3,), (3,)], r"don't have the widths \(4, 2\)"),
        (Unique(), (4,), [(4,), (4,)], "unique parameter is held by 2 ranks"),
        (Shard(heads=(4,)), (8,), [(2,), (4,), (2,)], r"parts \(1,\) with heads \(4,\) of 8: expected \[4, 2, 2\]"),
        (ShardGrid((0, 1), ((1, 2),)), (4, 4), [(4, 2), (4, 3)], r"don't join to the logical shape \(4, 4\)"),
    ],
)
def test_a_layout_refuses_contradicting_shapes(
    pattern: Pattern, shape: Shape, local_shapes: list[Shape], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pattern.layout(shape, local_shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": -1}, "dim must not be negative: -1"),
        ({"parts": ()}, "parts must be positive"),
        ({"parts": (2, 0)}, "parts must be positive"),
        ({"pad_to_multiple": 0}, "pad_to_multiple must be positive"),
        ({"parts": (1, 1), "widths": (2, 2)}, "don't apply to a shard with parts"),
        ({"parts": (1, 1), "vocabulary": True}, "don't apply to a shard with parts"),
        ({"parts": (1, 1), "heads": (2,)}, r"a positive number for each of 2 parts: \(2,\)"),
        ({"heads": (0,)}, "a positive number for each of 1 parts"),
        ({"heads": (2,), "widths": (2, 2)}, "don't apply to a shard with heads"),
        ({"heads": (2,), "vocabulary": True}, "don't apply to a shard with heads"),
    ],
)
def test_an_impossible_shard_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), ()), "two or more different dimensions"),
        (((1, 1), ()), "two or more different dimensions"),
        (((0, -1), ()), "two or more different dimensions"),
        (((0, 1), ((2,),)), "must have 2 positive numbers"),
        (((0, 1), ((2, 0),)), "must have 2 positive numbers"),
        (((0, 1), ((2, 3), (3, 2))), "are for the same number of ranks"),
    ],
)
def test_an_impossible_grid_is_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardGrid(*arguments)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_a_grid_follows_the_extents_that_the_ranks_hold(rows: list[int], columns: list[int]) -> None:
    pattern = ShardGrid((0, 1), ((len(rows), len(columns)),)) if len(rows) * len(columns) > 1 else ShardGrid((0, 1), ())
    local_shapes = [(row, column) for row in rows for column in columns]
    shape = pattern.logical_shape(local_shapes)
    assert shape == (sum(rows), sum(columns))
    bands = np.split(numbered(shape), np.cumsum(rows)[:-1])
    expected = [block for band in bands for block in np.split(band, np.cumsum(columns)[:-1], axis=1)]
    assert_same(placed(pattern.layout(shape, local_shapes)), expected)


def test_fewer_kv_heads_than_ranks_are_held_by_runs_of_ranks() -> None:
    """8 q heads and 2 kv heads of 3 rows on 4 ranks: two neighbours hold the same k and v, and different q."""
    pattern = Shard(parts=(4, 1, 1), heads=(8, 2, 2))
    local_shapes = pattern.local_shapes((36,), 4)
    assert local_shapes == ((12,),) * 4
    layout = pattern.layout((36,), local_shapes)
    held = [array.tolist() for array in placed(layout)]
    assert held[0] == [*range(6), 24, 25, 26, 30, 31, 32]
    assert held[1] == [*range(6, 12), 24, 25, 26, 30, 31, 32]
    assert held[3] == [*range(18, 24), 27, 28, 29, 33, 34, 35]
    assert sorted(len(ranks) for ranks in layout.holders().values()) == [1] * 4 + [2] * 4


def test_per_head_interleaved_qkv_is_plain_and_fused_qkv_is_parts() -> None:
    """GPT-NeoX and BLOOM: q, k and v of one head after the other. Phi-3: all q, all k, all v. The same shapes, other rows."""
    head, heads = 2, 4
    interleaved = np.arange(3 * head * heads).reshape(heads, 3, head)
    fused = np.ascontiguousarray(interleaved.transpose(1, 0, 2))
    of_heads = [interleaved[:2].ravel(), interleaved[2:].ravel()]
    assert_same(placed(Shard(heads=(heads,)).layout((24,), [(12,), (12,)])), of_heads)
    side_by_side = [numbered((3, heads, head))[:, mine].ravel() for mine in (slice(0, 2), slice(2, 4))]
    assert_same(placed(Shard(parts=(1, 1, 1), heads=(heads,) * 3).layout((24,), [(12,), (12,)])), side_by_side)
    values = [fused.ravel()[rows] for rows in side_by_side]
    assert all(set(mine) == set(theirs) for mine, theirs in zip(values, of_heads, strict=True))


@settings(deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 8), st.integers(1, 6), st.integers(1, 8), st.integers(1, 6), st.integers(1, 3)
)
def test_a_vocabulary_may_be_padded_otherwise_on_the_target(
    size: int, source_multiple: int, source_degree: int, target_multiple: int, target_degree: int, width: int
) -> None:
    """Every row of the vocabulary arrives, and no row of padding does."""
    source, target = (Shard(vocabulary=True, pad_to_multiple=one) for one in (source_multiple, target_multiple))
    whole = numbered((size, width))
    held = split_by_numpy(whole, source, source_degree)
    logical_shape = source.logical_shape([array.shape for array in held], size)
    joined = np.full(logical_shape, PADDING)
    for local, array in zip(source.layout(logical_shape, [array.shape for array in held]).locals, held, strict=True):
        for piece in local.pieces:
            joined[_region(piece.logical_box)] = array[_region(piece.local_box)]
    np.testing.assert_array_equal(joined, whole)
    expected = split_by_numpy(whole, target, target_degree)
    assert_same(placed(target.layout(logical_shape, target.local_shapes(logical_shape, target_degree))), expected)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([2, 4, 6, 8]), st.integers(1, 2), st.booleans())
def test_heads_are_held_whole_wherever_numpy_puts_them(data: st.DataObject, degree: int, unit: int, wide: bool) -> None:
    parts, heads = data.draw(head_counts(degree))
    shape = (sum(parts) * unit * prod(heads), 2)[: 1 + wide]
    pattern = Shard(parts=parts, heads=heads)
    expected = split_by_numpy(numbered(shape), pattern, degree)
    local_shapes = pattern.local_shapes(shape, degree)
    assert pattern.logical_shape(local_shapes) == shape
    assert_same(placed(pattern.layout(shape, local_shapes)), expected)
