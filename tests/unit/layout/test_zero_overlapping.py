"""Buffers of whole tensors against a list of element numbers, element by element."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucp_deepspeed.layout import FlatGroup
from ucp_deepspeed.layout.zero import OverlappingGroup

numels = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
flat_groups = st.builds(FlatGroup, numels, st.integers(1, 6)) | numels.flatmap(
    lambda sizes: st.builds(
        FlatGroup, st.just(sizes), st.integers(1, 6), st.tuples(*(st.integers(0, 4) for _ in sizes)), st.integers(1, 4)
    )
)


def buffers(group: FlatGroup) -> list[list[tuple[int, int]]]:
    """For each partition, tensor and position of each element: all of each tensor of which a single one lies in the partition."""
    flat: list[tuple[int, int] | None] = []
    for index, numel in enumerate(group.numels):
        flat += [(index, position) for position in range(numel)] + [None] * (group.gaps[index] if group.gaps else 0)
    held: list[list[tuple[int, int]]] = []
    for partition in range(group.partitions):
        part = flat[partition * group.partition_numel : (partition + 1) * group.partition_numel]
        tensors = sorted({element[0] for element in part if element is not None})
        held.append([(index, position) for index in tensors for position in range(group.numels[index])])
    return held


@given(flat_groups)
def test_held_by_is_what_overlaps_whole(flat: FlatGroup) -> None:
    group = OverlappingGroup(flat)
    for partition, expected in enumerate(buffers(flat)):
        found = [(part.index, part.local_start + n) for part in group.held_by(partition) for n in range(part.numel)]
        assert found == expected
        assert group.buffer_numel(partition) == len(expected)
        assert [part.buffer_start for part in group.held_by(partition)] == [
            position for position, (_, local) in enumerate(expected) if local == 0
        ]


@given(flat_groups, st.data())
def test_slices_point_at_the_elements(flat: FlatGroup, data: st.DataObject) -> None:
    group, expected = OverlappingGroup(flat), buffers(flat)
    index = data.draw(st.integers(0, len(flat.numels) - 1))
    start = data.draw(st.integers(0, flat.numels[index]))
    stop = data.draw(st.integers(start, flat.numels[index]))
    wanted = list(range(start, stop))
    found: list[int] = []
    for part in group.slices(index, start, stop):
        for n in range(part.numel):
            assert expected[part.partition][part.buffer_start + n] == (index, part.local_start + n)
            found.append(part.local_start + n)
    assert found == wanted
