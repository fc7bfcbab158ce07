"""Plans carried out on numpy buffers of element numbers, against buffers that numpy builds for the target directly.

Padding and neighbouring tensors are NaN in every source buffer, so that a plan that reads one of their elements shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ucp_deepspeed.layout import (
    FlatGroup,
    Layout,
    Partial,
    Pattern,
    Replicate,
    Scale,
    Shape,
    Shard,
    SlicedGroup,
)
from ucp_deepspeed.layout.box import row_major_strides
from ucp_deepspeed.plan import BlockCopy, Fragment, Source, StridedView, Target, joined, plan_tensor

Array = NDArray[np.int64]
Values = NDArray[np.floating[Any]]
Place = tuple[int, int]  # model-parallel rank, partition
Copies = Sequence[BlockCopy[Place, Place]]

PADDING = -1
UNTOUCHED = -7.0
INDEX = 1  # the tensor lies between two neighbours in every group
POWERS = {"fp32": 1, "exp_avg": -1, "exp_avg_sq": -2}


@dataclass(frozen=True)
class Side:
    """One topology: a pattern over some ranks and, for each rank, the ZeRO group that its local tensor is in."""

    shape: Shape
    pattern: Pattern
    groups: tuple[FlatGroup | SlicedGroup, ...]

    @property
    def layout(self) -> Layout:
        return self.pattern.layout(self.shape, self.pattern.local_shapes(self.shape, len(self.groups)))

    def places(self) -> list[Place]:
        return [(rank, partition) for rank, group in enumerate(self.groups) for partition in range(group.partitions)]

    def fragments(self, place: Place) -> list[Fragment[Place]]:
        """Return the fragments of the tensor that one partition holds."""
        rank, partition = place
        held = self.groups[rank].held_by(partition)
        return [Fragment(s.local_start, s.numel, place, s.buffer_start) for s in held if s.index == INDEX]

    def ids(self) -> dict[Place, Array]:
        """Each partition's buffer of logical element numbers, made by numpy; neighbours and padding are negative."""
        locals_ = split_by_numpy(np.arange(prod(self.shape)).reshape(self.shape), self.pattern, len(self.groups))
        found: dict[Place, Array] = {}
        for rank, (local, group) in enumerate(zip(locals_, self.groups, strict=True)):
            for partition, buffer in enumerate(flatten(local.ravel(), group)):
                found[rank, partition] = buffer
        return found

    def values(self, value: Callable[[int, Array], Values]) -> dict[Place, Values]:
        """Source buffers: ``value(rank, ids)``, NaN at neighbours and padding."""
        return {
            (rank, partition): np.where(ids >= 0, value(rank, ids), np.nan)
            for (rank, partition), ids in self.ids().items()
        }


def split_by_numpy(whole: Array, pattern: Pattern, degree: int) -> list[Array]:
    if not isinstance(pattern, Shard):
        return [whole] * degree
    dim = pattern.dim
    if pattern.widths is not None:
        return np.split(whole, np.cumsum(pattern.widths)[:-1], axis=dim)
    if pattern.vocabulary:
        missing = -whole.shape[dim] % (degree * pattern.pad_to_multiple)
        pads = [(0, missing if axis == dim else 0) for axis in range(whole.ndim)]
        return np.split(np.pad(whole, pads, constant_values=PADDING), degree, axis=dim)
    unit = whole.shape[dim] // sum(pattern.parts)
    fused = np.split(whole, np.cumsum([unit * part for part in pattern.parts])[:-1], axis=dim)
    shares = [np.array_split(part, degree, axis=dim) for part in fused]
    return [np.concatenate([share[rank] for share in shares], axis=dim) for rank in range(degree)]


def flatten(flat_local: Array, group: FlatGroup | SlicedGroup) -> list[Array]:
    tensors = [np.full(numel, PADDING) for numel in group.numels]
    tensors[INDEX] = flat_local
    if isinstance(group, SlicedGroup):
        cut = [np.split(pad_end(tensor, group.partitions), group.partitions) for tensor in tensors]
        return [np.concatenate(slices) for slices in zip(*cut, strict=True)]
    joined = np.concatenate(
        [np.pad(t, (0, g), constant_values=PADDING) for t, g in zip(tensors, group.gaps or (0, 0, 0), strict=True)]
    )
    return list(np.split(pad_end(joined, group.alignment * group.partitions), group.partitions))


def pad_end(array: Array, unit: int) -> Array:
    return np.pad(array, (0, -len(array) % unit), constant_values=PADDING)


shapes = st.lists(st.integers(0, 8), max_size=3).map(tuple) | st.sampled_from([(8, 4), (3, 6, 4), (2, 3, 2, 4), (16,)])


@st.composite
def patterns(draw: st.DrawFn, shape: Shape, degree: int, copies: bool) -> Pattern:
    """A pattern that fits; with ``copies`` it may hold elements on several ranks."""
    kinds = ["replicate"] * (copies or degree == 1) + ["shard", "widths", "vocabulary", "parts"] * bool(shape)
    kind = draw(st.sampled_from(kinds))
    if kind == "replicate":
        return Replicate()
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "widths":
        cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=degree - 1, max_size=degree - 1)))
        return Shard(dim, widths=tuple(np.diff([0, *cuts, shape[dim]]).tolist()))
    if kind == "vocabulary":
        return Shard(dim, vocabulary=True, pad_to_multiple=draw(st.integers(1, 3)))
    fused = [parts for parts in ((1, 1), (2, 1, 1), (1, 1, 1)) if shape[dim] % sum(parts) == 0]
    return Shard(dim, parts=draw(st.sampled_from([(1,)] if kind == "shard" or not fused else fused)))


@st.composite
def groups(draw: st.DrawFn, numel: int) -> FlatGroup | SlicedGroup:
    """ZeRO stage 0, 1 or 2, or 3, with a neighbour on either side of the tensor."""
    numels = (draw(st.integers(0, 9)), numel, draw(st.integers(0, 9)))
    stage = draw(st.integers(0, 3))
    if stage == 3:
        return SlicedGroup(numels, draw(st.integers(1, 5)))
    gaps = (draw(st.integers(0, 3)), draw(st.integers(0, 3)), 0)
    if stage == 0:
        return FlatGroup(numels, 1, (0, 0, 0), alignment=1)
    return FlatGroup(numels, draw(st.integers(1, 5)), gaps)


@st.composite
def sides(draw: st.DrawFn, shape: Shape, pattern: Pattern | None = None, copies: bool = True) -> Side:
    degree = draw(st.integers(1, 4)) if shape or copies else 1
    chosen = pattern or draw(patterns(shape, degree, copies))
    numels = [prod(local) for local in chosen.local_shapes(shape, degree)]
    return Side(shape, chosen, tuple(draw(groups(numel)) for numel in numels))


@st.composite
def pairs(
    draw: st.DrawFn, source: Pattern | None = None, target: Pattern | None = None, copies: bool = True
) -> tuple[Side, Side]:
    shape = draw(shapes)
    return draw(sides(shape, source, copies)), draw(sides(shape, target))


def stored(side: Side, held: Sequence[Fragment[Place]] | None = None, generous: bool = False) -> Source[Place]:
    """The side as a source; ``generous`` fragments reach beyond the interval that the plan asks for."""
    if held is None and not generous:

        def cut(rank: int, start: int, stop: int) -> Iterator[Fragment[Place]]:
            for s in side.groups[rank].slices(INDEX, start, stop):
                yield Fragment(s.local_start, s.numel, (rank, s.partition), s.buffer_start)

        return Source(side.layout, cut)
    known = [f for place in side.places() for f in side.fragments(place)] if held is None else held

    def meeting(rank: int, start: int, stop: int) -> list[Fragment[Place]]:
        mine = [f for f in known if f.buffer[0] == rank]
        return [f for f in mine if f.local_start < stop and start < f.local_start + f.numel]

    return Source(side.layout, meeting)


def block(buffer: Values, view: StridedView[Place], shape: Shape) -> Values:
    last = view.start + sum((extent - 1) * stride for extent, stride in zip(shape, view.strides, strict=True))
    assert 0 <= view.start <= last < len(buffer)
    return as_strided(buffer[view.start :], shape, [stride * buffer.itemsize for stride in view.strides])


def carry_out(copies: Copies, sources: dict[Place, Values], place: Place, length: int) -> Values:
    """The target buffer after the copies; writing an element twice fails."""
    buffer = np.full(length, UNTOUCHED)
    for copy in copies:
        assert copy.target.buffer == place
        written = block(buffer, copy.target, copy.shape)
        assert (written == UNTOUCHED).all()
        read = [block(sources[view.buffer], view, copy.shape) for view in copy.sources]
        written[...] = np.mean(read, axis=0) * float(copy.factor)
    return buffer


def check_every_target(
    source: Source[Place],
    sources: dict[Place, Values],
    target: Side,
    value: Callable[[Array], Values],
    state: str = "fp32",
    rounding: float = 0.0,
) -> list[BlockCopy[Place, Place]]:
    """Plan and fill every partition of the target and compare it with what numpy puts there; ``rounding``: of the test's sums."""
    done: list[BlockCopy[Place, Place]] = []
    for place, ids in target.ids().items():
        copies = plan_tensor(source, Target(target.layout, place[0], target.fragments(place)), state)
        filled = carry_out(copies, sources, place, len(ids))
        np.testing.assert_allclose(filled, np.where(ids >= 0, value(ids), UNTOUCHED), rtol=rounding)
        done += copies
    return done


def number(rank: int, ids: Array) -> Values:
    return ids.astype(np.float64)


@settings(deadline=None, max_examples=400)
@given(pairs(), st.booleans())
def test_every_wanted_element_arrives(pair: tuple[Side, Side], generous: bool) -> None:
    source, target = pair
    sources = source.values(number)
    copies = check_every_target(stored(source, generous=generous), sources, target, lambda ids: number(0, ids))
    assert all(len(copy.sources) == 1 and copy.factor == 1 for copy in copies)


@settings(deadline=None, max_examples=150)
@given(pairs(source=Partial()))
def test_partial_is_the_mean_of_all_ranks(pair: tuple[Side, Side]) -> None:
    source, target = pair
    degree = len(source.groups)
    sources = source.values(lambda rank, ids: ids + 1000.0 * rank)
    copies = check_every_target(stored(source), sources, target, lambda ids: ids + 500.0 * (degree - 1))
    for copy in copies:
        assert sorted(view.buffer[0] for view in copy.sources) == list(range(degree))


def test_a_mean_of_ranks_that_are_cut_at_different_places() -> None:
    groups = (FlatGroup((0, 8, 0), 1, (0, 0, 0)), FlatGroup((4, 8, 0), 2, (0, 0, 0)), SlicedGroup((0, 8, 3), 4))
    source = Side((8,), Partial(), groups)
    target = Side((8,), Replicate(), (FlatGroup((0, 8, 0), 1, (0, 0, 0)),))
    sources = source.values(lambda rank, ids: ids * 10.0**rank)
    check_every_target(stored(source), sources, target, lambda ids: ids * 37.0)


@settings(deadline=None, max_examples=150)
@given(pairs(source=Replicate(scale=Scale(powers=POWERS)), target=Replicate(scale=Scale(powers=POWERS))), st.data())
def test_scaled_states_change_with_the_degree(pair: tuple[Side, Side], data: st.DataObject) -> None:
    source, target = pair
    state = data.draw(st.sampled_from(sorted(POWERS)))
    old, new = len(source.groups), len(target.groups)
    sources = source.values(lambda rank, ids: ids * (1 / old) ** POWERS[state])
    wanted = lambda ids: ids * (1 / new) ** POWERS[state]  # noqa: E731
    copies = check_every_target(stored(source), sources, target, wanted, state, rounding=1e-12)
    assert {copy.factor for copy in copies} <= {Fraction(old, new) ** POWERS[state]}


@settings(deadline=None, max_examples=50)
@given(pairs(source=Replicate(scale=Scale()), target=Replicate(scale=Scale())))
def test_a_state_without_a_power_moves_between_equal_degrees_only(pair: tuple[Side, Side]) -> None:
    source, target = pair
    old, new = len(source.groups), len(target.groups)
    if old == new:
        sources = source.values(number)
        check_every_target(stored(source), sources, target, lambda ids: number(0, ids), "momentum")
        return
    message = f"state 'momentum' is scaled by {source.layout.scale} in the checkpoint and {target.layout.scale} in the"
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_tensor(stored(source), Target(target.layout, 0, target.fragments((0, 0))), "momentum")


@pytest.mark.parametrize("change", ["gap", "overlap"])
@settings(deadline=None, max_examples=150)
@given(pair=pairs(copies=False), data=st.data())
def test_a_gap_or_an_overlap_is_refused_by_those_who_read_it(
    change: str, pair: tuple[Side, Side], data: st.DataObject
) -> None:
    source, target = pair
    sources = source.ids()
    held = [f for place in source.places() for f in source.fragments(place)]
    assume(held)
    victim = data.draw(st.sampled_from(held))
    spoilt = set(sources[victim.buffer][victim.buffer_start : victim.buffer_start + victim.numel].tolist()) - {PADDING}
    held = [*held, victim] if change == "overlap" else [f for f in held if f is not victim]
    for place, ids in target.ids().items():
        wanted = Target(target.layout, place[0], target.fragments(place))
        missing = len(spoilt & set(ids.tolist()))
        if not missing:
            plan_tensor(stored(source, held), wanted, "fp32")
            continue
        with pytest.raises(ValueError) as error:
            plan_tensor(stored(source, held), wanted, "fp32")
        if change == "overlap":
            assert "the checkpoint holds elements twice" in str(error.value)
        else:
            found = re.match(r"(\d+) of \d+ elements of .* are not in the checkpoint", str(error.value))
            assert found and 0 < int(found[1]) <= missing


@settings(deadline=None, max_examples=50)
@given(pairs(source=Partial(), target=Replicate()), st.data())
def test_a_mean_needs_every_rank(pair: tuple[Side, Side], data: st.DataObject) -> None:
    source, target = pair
    held = [f for place in source.places() for f in source.fragments(place)]
    assume(held)
    victim = data.draw(st.sampled_from(held))
    whole = Fragment(0, prod(target.shape), (0, 0), 0)
    with pytest.raises(ValueError, match=rf"^{victim.numel} of {prod(target.shape)} elements .* not in the checkpoint"):
        plan_tensor(stored(source, [f for f in held if f is not victim]), Target(target.layout, 0, [whole]), "fp32")


@settings(deadline=None, max_examples=50)
@given(shapes, shapes, st.data())
def test_different_logical_shapes_are_refused(shape: Shape, other: Shape, data: st.DataObject) -> None:
    assume(shape != other)
    source, target = data.draw(sides(shape)), data.draw(sides(other))
    message = re.escape(f"expected logical shape {other}, found {shape} in the checkpoint")
    with pytest.raises(ValueError, match=message):
        plan_tensor(stored(source), Target(target.layout, 0, target.fragments((0, 0))), "fp32")


def elements(copy: BlockCopy[str, str]) -> list[tuple[object, ...]]:
    """The places that each element of a copy goes to and comes from, in order."""
    places = [
        (view.buffer, [view.start + int(np.dot(place, view.strides)) for place in np.ndindex(copy.shape)])
        for view in (copy.target, *copy.sources)
    ]
    names, numbers = zip(*places, strict=True)
    return [(copy.factor, *zip(names, each, strict=True)) for each in zip(*numbers, strict=True)]


@st.composite
def copies_of_runs(draw: st.DrawFn) -> list[BlockCopy[str, str]]:
    """Copies of which some go on where the one before ended, in one or both buffers."""
    copies: list[BlockCopy[str, str]] = []
    ends = {"target": 0, "source": 0}
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(st.sampled_from([(3,), (2, 2), (1, 4), (2, 1, 2)]))
        views = {}
        for side, end in ends.items():
            strides = draw(st.sampled_from([row_major_strides(shape)] * 3 + [(4,) * len(shape)]))
            start = end + draw(st.sampled_from([0, 0, 0, 5]))
            views[side] = StridedView(draw(st.sampled_from(["a"] * 4 + ["b"])), start, strides)
            ends[side] = start + prod(shape)
        sources = (views["source"],) * draw(st.sampled_from([1, 1, 1, 2]))
        copies.append(
            BlockCopy(shape, views["target"], sources, draw(st.sampled_from([Fraction(1)] * 3 + [Fraction(2)])))
        )
    return copies


@settings(deadline=None)
@given(copies_of_runs())
def test_joined_copies_are_the_same_elements_in_the_same_order(copies: list[BlockCopy[str, str]]) -> None:
    found = list(joined(copies))
    assert [each for copy in found for each in elements(copy)] == [each for copy in copies for each in elements(copy)]


def test_runs_behind_one_another_are_one_copy() -> None:
    def run(start: int, shape: Shape, source: str = "file") -> BlockCopy[str, str]:
        dense = row_major_strides(shape)
        return BlockCopy(shape, StridedView("group", start, dense), (StridedView(source, start + 10, dense),))

    in_a_row = [run(0, (2, 3)), run(6, (4,)), run(10, (1, 2))]
    assert list(joined(in_a_row)) == [run(0, (12,))]
    assert list(joined([*in_a_row, run(12, (3,), "other")])) == [run(0, (12,)), run(12, (3,), "other")]
