"""ZeRO's flat buffers against numpy: tensors of element numbers joined, padded and cut, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucp_deepspeed.layout.zero import (
    FlatGroup,
    Flattening,
    Slice,
    SlicedGroup,
)

PADDING = -1
Array = NDArray[np.int64]

sizes = st.lists(st.integers(0, 9), max_size=5).map(tuple)
degrees = st.integers(1, 6)


@st.composite
def flat_groups(draw: st.DrawFn) -> FlatGroup:
    numels = draw(sizes)
    gaps = tuple(draw(st.integers(0, 4)) for _ in numels) if draw(st.booleans()) else ()
    if draw(st.integers(0, 3)) == 0:
        return FlatGroup(numels, partitions=1, gaps=gaps, alignment=1)
    return FlatGroup(numels, draw(degrees), gaps, draw(st.sampled_from([1, 2, 2, 4])))


sliced_groups = st.builds(SlicedGroup, sizes, degrees)
groups: st.SearchStrategy[FlatGroup | SlicedGroup] = flat_groups() | sliced_groups


def numbered(numels: tuple[int, ...]) -> list[Array]:
    """Tensors whose elements all have different numbers."""
    return [1000 * (index + 1) + np.arange(numel) for index, numel in enumerate(numels)]


def padded(array: Array, unit: int) -> Array:
    """The array with padding up to the next multiple of ``unit``."""
    while len(array) % unit:
        array = np.append(array, PADDING)
    return array


def buffers(group: FlatGroup | SlicedGroup) -> list[Array]:
    """Each partition's buffer, made with numpy alone."""
    tensors = numbered(group.numels)
    if isinstance(group, SlicedGroup):
        cut = [np.split(padded(tensor, group.partitions), group.partitions) for tensor in tensors]
        return [np.concatenate([np.empty(0, int), *(c[rank] for c in cut)]) for rank in range(group.partitions)]
    gaps = group.gaps or (0,) * len(tensors)
    joined = [np.append(tensor, np.full(gap, PADDING)) for tensor, gap in zip(tensors, gaps, strict=True)]
    flat = padded(np.concatenate([np.empty(0, int), *joined]), group.alignment * group.partitions)
    return list(np.split(flat, group.partitions))


def fill(group: Flattening, slices: list[Slice]) -> list[Array]:
    """Buffers filled through slices alone; a position that is filled twice fails."""
    tensors = numbered(group.numels)
    found = [np.full(group.buffer_numel(partition), PADDING) for partition in range(group.partitions)]
    for part in slices:
        place = found[part.partition][part.buffer_start : part.buffer_start + part.numel]
        assert part.numel > 0
        assert len(place) == part.numel
        assert (place == PADDING).all()
        place[:] = tensors[part.index][part.local_start : part.local_start + part.numel]
    return found


@settings(deadline=None, max_examples=300)
@given(groups)
def test_held_by_is_what_numpy_puts_in_each_buffer(group: FlatGroup | SlicedGroup) -> None:
    held = [list(group.held_by(partition)) for partition in range(group.partitions)]
    for partition, slices in enumerate(held):
        assert all(part.partition == partition for part in slices)
        starts = [part.buffer_start for part in slices]
        assert starts == sorted(starts)
    found = fill(group, [part for slices in held for part in slices])
    assert [buffer.tolist() for buffer in found] == [buffer.tolist() for buffer in buffers(group)]


@settings(deadline=None, max_examples=300)
@given(groups)
def test_slices_of_all_tensors_are_held_by_of_all_partitions(group: FlatGroup | SlicedGroup) -> None:
    slices = [part for index, numel in enumerate(group.numels) for part in group.slices(index, 0, numel)]
    held = [part for partition in range(group.partitions) for part in group.held_by(partition)]
    assert len(slices) == len(held)
    assert set(slices) == set(held)


@settings(deadline=None, max_examples=300)
@given(groups.filter(lambda group: bool(group.numels)), st.data())
def test_slices_of_an_interval_find_its_elements_in_order(group: FlatGroup | SlicedGroup, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(group.numels) - 1))
    start = data.draw(st.integers(0, group.numels[index]))
    stop = data.draw(st.integers(start, group.numels[index]))
    expected = buffers(group)
    found: list[int] = []
    for part in group.slices(index, start, stop):
        assert (part.index, part.local_start) == (index, start + len(found))
        found += expected[part.partition][part.buffer_start : part.buffer_start + part.numel].tolist()
    assert found == numbered(group.numels)[index][start:stop].tolist()
    assert len(list(group.slices(index, start, stop))) <= group.partitions


@settings(deadline=None)
@given(flat_groups())
def test_unpadded_numel_cuts_off_the_end_padding_only(group: FlatGroup) -> None:
    total = sum(group.numels) + sum(group.gaps)
    flat = np.arange(len(np.concatenate(buffers(group))))
    kept = [int((part < total).sum()) for part in np.split(flat, group.partitions)]
    assert [group.unpadded_numel(partition) for partition in range(group.partitions)] == kept


@settings(deadline=None)
@given(sizes.filter(bool), degrees, st.sampled_from([2, 4]))
def test_slices_agree_with_the_published_formulas(numels: tuple[int, ...], partitions: int, itemsize: int) -> None:
    gaps: list[int] = []  # zeros after each tensor, so that the next one starts on 16 bytes
    for numel in numels[:-1]:
        gaps.append(-(sum(numels[: len(gaps)]) + numel + sum(gaps)) % (16 // itemsize))
    gaps.append(0)
    flat = FlatGroup(numels, partitions, tuple(gaps))
    total = sum(numels) + sum(gaps)
    length = (total + 2 * partitions - 1) // (2 * partitions) * 2
    for index, numel in enumerate(numels):
        offset = sum(numels[:index]) + sum(gaps[:index])
        for element in range(numel):
            (part,) = flat.slices(index, element, element + 1)
            assert (part.partition, part.buffer_start) == divmod(offset + element, length)
            (part,) = SlicedGroup(numels, partitions).slices(index, element, element + 1)
            share = [(n + partitions - 1) // partitions for n in numels]
            assert part.partition == element // share[index]
            assert part.buffer_start == sum(share[:index]) + element % share[index]


def test_a_small_group_leaves_whole_partitions_of_padding() -> None:
    group = FlatGroup((1,), partitions=4)
    assert [group.buffer_numel(partition) for partition in range(4)] == [2, 2, 2, 2]
    assert [group.unpadded_numel(partition) for partition in range(4)] == [1, 0, 0, 0]
    assert [len(list(group.held_by(partition))) for partition in range(4)] == [1, 0, 0, 0]


def test_stage_0_is_one_unpadded_buffer() -> None:
    group = FlatGroup((3, 4), partitions=1, alignment=1)
    assert group.buffer_numel(0) == 7
    assert list(group.held_by(0)) == [Slice(0, 0, 0, 0, 3), Slice(1, 0, 0, 3, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numels": (1,), "partitions": 0}, "at least one partition, not 0"),
        ({"numels": (1, -1), "partitions": 1}, r"negative tensor size in \(1, -1\)"),
    ],
)
def test_an_impossible_group_is_refused(arguments: dict[str, object], message: str) -> None:
    for kind in (FlatGroup, SlicedGroup):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)  # type: ignore[arg-type]


def test_gaps_and_alignment_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="1 alignment gaps for 2 tensors"):
        FlatGroup((1, 2), 1, gaps=(0,))
    with pytest.raises(ValueError, match="gaps not negative"):
        FlatGroup((1, 2), 1, gaps=(0, -1))
    with pytest.raises(ValueError, match="alignment must be positive"):
        FlatGroup((1, 2), 1, alignment=0)
