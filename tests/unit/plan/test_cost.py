"""The cost of a plan: copies depend on the topology, never on the number of elements, and nothing needless is read."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from ucp_deepspeed.layout import FlatGroup, Flattening, Layout, Partial, Pattern, Replicate, Shape, Shard, SlicedGroup
from ucp_deepspeed.plan import BlockCopy, Fragment, Source, Target, plan_tensor

Place = tuple[int, int]


def layout_of(pattern: Pattern, shape: Shape, degree: int) -> Layout:
    return pattern.layout(shape, pattern.local_shapes(shape, degree))


def group(stage: int, partitions: int, numel: int, neighbour: int) -> Flattening:
    numels = (neighbour, numel, neighbour)
    if stage == 3:
        return SlicedGroup(numels, partitions)
    return FlatGroup(numels, partitions, alignment=2 if stage else 1)


def plans(
    shape: Shape,
    source: tuple[Pattern, int, int, int],
    target: tuple[Pattern, int, int, int],
    neighbour: int = 0,
    asked: Counter[int] | None = None,
) -> dict[Place, tuple[BlockCopy[Place, Place], ...]]:
    """The plan of every target place. Topologies are (pattern, degree, stage, partitions).

    Args:
        asked: counts the elements of each source rank whose fragments are looked up.
    """
    old, new = layout_of(source[0], shape, source[1]), layout_of(target[0], shape, target[1])
    old_groups = [group(source[2], source[3], prod(local.shape), neighbour) for local in old.locals]
    new_groups = [group(target[2], target[3], prod(local.shape), neighbour) for local in new.locals]

    def fragments(rank: int, start: int, stop: int) -> list[Fragment[Place]]:
        if asked is not None:
            asked[rank] += stop - start
        slices = old_groups[rank].slices(1, start, stop)
        return [Fragment(s.local_start, s.numel, (rank, s.partition), s.buffer_start) for s in slices]

    found = {}
    for rank, flattening in enumerate(new_groups):
        for partition in range(target[3]):
            place = (rank, partition)
            slices = [s for s in flattening.held_by(partition) if s.index == 1]
            wanted = [Fragment(s.local_start, s.numel, place, s.buffer_start) for s in slices]
            found[place] = plan_tensor(Source(old, fragments), Target(new, rank, wanted), "fp32")
    return found


def count(found: dict[Place, tuple[BlockCopy[Place, Place], ...]]) -> int:
    return sum(len(copies) for copies in found.values())


SHAPE = (48, 36, 28)
NEIGHBOUR = 1002
SOURCES = [Shard(0), Shard(1), Shard(2), Shard(0, parts=(2, 1, 1)), Replicate(), Partial()]
TARGETS = [Shard(0), Shard(1), Shard(1, parts=(1, 1)), Replicate()]


def count_at(times: int, source: tuple[Pattern, int, int, int], target: tuple[Pattern, int, int, int]) -> int:
    """Copies of all target places when each extent is ``times`` larger; all shares and partitions scale exactly."""
    shape = tuple(times * extent for extent in SHAPE)
    return count(plans(shape, source, target, neighbour=NEIGHBOUR * times ** len(shape)))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_without_zero_ten_times_the_extents_make_the_same_copies(source: Pattern, target: Pattern) -> None:
    counts = {count_at(times, (source, 4, 0, 1), (target, 3, 0, 1)) for times in (1, 10)}
    assert len(counts) == 1
    assert counts != {0}


@pytest.mark.parametrize("source_stage", [0, 1, 3])
@pytest.mark.parametrize("target_stage", [0, 1, 3])
@pytest.mark.parametrize("source", [Shard(0), Shard(0, parts=(2, 1, 1)), Replicate(), Partial()])
@pytest.mark.parametrize("target", [Shard(0), Replicate()])
def test_runs_that_no_shard_cuts_do_not_multiply_with_the_extents(
    source: Pattern, target: Pattern, source_stage: int, target_stage: int
) -> None:
    old = (source, 4, source_stage, 3 if source_stage else 1)
    new = (target, 3, target_stage, 2 if target_stage else 1)
    counts = {count_at(times, old, new) for times in (1, 10)}
    assert len(counts) == 1
    assert counts != {0}


@pytest.mark.parametrize("stages", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_copies_are_bounded_by_the_pieces_that_meet(source: Pattern, target: Pattern, stages: tuple[int, int]) -> None:
    """Partitions end in the middle of a row: how many columns the ragged ends meet varies, their number doesn't."""
    pieces = [sum(len(local.pieces) for local in layout_of(p, SHAPE, d).locals) for p, d in ((source, 4), (target, 3))]
    ragged = 2 * len(SHAPE) - 1
    bound = (pieces[0] + 3 * ragged) * (pieces[1] + 2 * ragged)
    for times in (1, 10):
        assert 0 < count_at(times, (source, 4, stages[0], 3), (target, 3, stages[1], 2)) <= bound


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("degrees", [(1, 1), (1, 4), (4, 1), (2, 4), (4, 2), (3, 2), (2, 5), (8, 8)])
def test_a_sharded_weight_without_zero_is_one_copy_per_pair_of_ranks(dim: int, degrees: tuple[int, int]) -> None:
    shape = (120, 240)
    for (rank, _), copies in plans(shape, (Shard(dim), degrees[0], 0, 1), (Shard(dim), degrees[1], 0, 1)).items():
        old, new = shape[dim] // degrees[0], shape[dim] // degrees[1]
        meet = [r for r in range(degrees[0]) if r * old < (rank + 1) * new and rank * new < (r + 1) * old]
        assert [copy.sources[0].buffer[0] for copy in copies] == meet


def test_an_unsharded_parameter_is_one_run_per_pair_of_partitions() -> None:
    shape = (120, 7, 11)
    found = plans(shape, (Replicate(), 1, 1, 4), (Shard(0), 1, 1, 3))
    for (_, partition), copies in found.items():
        assert all(len(copy.shape) == 1 for copy in copies)
        read = [copy.sources[0].buffer[1] for copy in copies]
        assert read == [s for s in range(4) if s * 3 < (partition + 1) * 4 and partition * 4 < (s + 1) * 3]


@pytest.mark.parametrize("dim", [0, 1])
def test_only_what_is_wanted_is_looked_up_and_copied(dim: int) -> None:
    asked: Counter[int] = Counter()
    copies = plans((12, 20), (Replicate(), 2, 1, 3), (Shard(dim), 4, 0, 1), asked=asked)
    assert sum(prod(copy.shape) for held in copies.values() for copy in held) == 240
    assert sum(asked.values()) <= (240 if dim == 0 else 4 * 240)
    assert set(asked) == {0, 1}


def test_readers_of_replicas_spread_over_the_ranks_that_hold_them() -> None:
    found = plans((6,), (Replicate(), 3, 0, 1), (Replicate(), 5, 0, 1))
    read = {rank: [copy.sources[0].buffer[0] for copy in copies] for (rank, _), copies in found.items()}
    assert read == {0: [0], 1: [1], 2: [2], 3: [0], 4: [1]}


def test_a_mean_reads_each_rank_once() -> None:
    found = plans((6, 4), (Partial(), 3, 0, 1), (Replicate(), 2, 0, 1))
    for copies in found.values():
        assert [[view.buffer[0] for view in copy.sources] for copy in copies] == [[0, 1, 2]]
