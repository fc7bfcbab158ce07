"""The ranks of a topology without an engine: what they hold, counted element by element."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sketches import Sketch, cut

from ucp_deepspeed.checkpoint.checkpoint import Kind, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.expert_names import EXPERTS
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Shard
from ucp_deepspeed.transfer.planning.target import TargetRank
from ucp_deepspeed.transfer.planning.target_ranks import stages_of, target_ranks

EXPERT_NAMES = [f"moe.{EXPERTS}.{number}.w" for number in range(4)]
SHAPES: dict[str, Shape] = {
    "first": (6, 3),
    **dict.fromkeys(EXPERT_NAMES, (5,)),
    "still": (7,),
    "mlp.experts.w1": (4, 3, 2),
    "last": (2, 5),
    f"moe.{EXPERTS}.1.count": (3,),
    "mask": (5,),
}
KINDS: dict[str, Kind] = {"still": "frozen", f"moe.{EXPERTS}.1.count": "buffer", "mask": "buffer"}
PATTERNS: dict[str, Pattern] = {"first": Shard(0), "last": Shard(1)}

topologies = st.builds(
    lambda tp, ep, more, stage: Topology(tp, 1, ep * more, stage, ep=ep),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(0, 3),
)


def sketched(grouped: list[bool]) -> UniversalView:
    """Parameters that are trained are in one of two groups."""
    trained = [name for name in SHAPES if name not in KINDS]
    both = [
        tuple(name for name, second in zip(trained, grouped, strict=True) if second == index) for index in (False, True)
    ]
    groups = tuple(ParameterGroup(names, {}) for names in both if names)
    sketch = Sketch(SHAPES, KINDS, groups=groups)
    return UniversalView(sketch, {name: name for name in SHAPES}, PATTERNS)


def held_shapes(topology: Topology) -> dict[str, tuple[Shape, ...]]:
    return {name: cut(shape, PATTERNS.get(name), topology.tp) for name, shape in SHAPES.items()}  # type: ignore[misc]


def elements(rank: TargetRank) -> list[tuple[str, int]]:
    """Every element that a rank holds: the parameter, and the place in the local tensor; all are inside their buffers."""
    found = []
    for slot in (*rank.slots, *rank.weights):
        filled = torch.zeros(slot.numel(), dtype=torch.int64)
        for name, part in slot.fragments():
            filled[part.buffer_start : part.buffer_start + part.numel] += 1
            assert part.buffer_start + part.numel <= slot.numel()
            found += [(name, place) for place in range(part.local_start, part.local_start + part.numel)]
        assert filled.le(1).all()
    return found


@given(topology=topologies, grouped=st.lists(st.booleans(), min_size=7, max_size=7))
def test_each_element_is_on_one_data_parallel_rank_or_on_all(topology: Topology, grouped: list[bool]) -> None:
    shapes, ep, stage = held_shapes(topology), topology.ep, topology.zero_stage
    counts: dict[tuple[int, str, int], int] = defaultdict(int)
    for rank in target_ranks(sketched(grouped), topology, shapes):
        for name, place in elements(rank):
            counts[rank.model_parallel_rank, name, place] += 1
    wanted = {
        (rank, name, place): 1
        if (stage == 3 and KINDS.get(name) != "buffer") or (stage and name not in KINDS)
        else topology.dp // (ep if EXPERTS in name or "w1" in name else 1)
        for name, held in shapes.items()
        for rank, shape in enumerate(held)
        for place in range(prod(shape))
    }
    assert counts == wanted


@given(topology=topologies, grouped=st.lists(st.booleans(), min_size=7, max_size=7))
def test_replicas_hold_the_same_and_are_numbered(topology: Topology, grouped: list[bool]) -> None:
    alike: dict[object, list[tuple[int, int]]] = defaultdict(list)
    for rank in target_ranks(sketched(grouped), topology, held_shapes(topology)):
        for slot in (*rank.slots, *rank.weights):
            if slot.replicas is not None:
                key = rank.model_parallel_rank, slot.names, slot.flattening, slot.starts, slot.itemsize
                alike[key].append(rank.replicas[slot.replicas])
            elif slot.flattening.partitions == 1:
                spread = EXPERTS in slot.names[0] or "w1" in slot.names[0]
                assert topology.dp // (topology.ep if spread else 1) == 1 or slot.names[0].endswith(".count")
    for numbers in alike.values():
        count = numbers[0][0]
        assert sorted(numbers) == [(count, number) for number in range(count)] and count > 1


def test_slots_follow_groups_and_some_ranks_are_as_among_all() -> None:
    view, topology = sketched([False, True, False, True, False, True, False]), Topology(2, 1, 4, 1, ep=2)
    ranks = list(target_ranks(view, topology, held_shapes(topology)))
    places = [(rank.model_parallel_rank, rank.data_parallel_rank) for rank in ranks]
    assert places == list(product(range(2), range(4)))
    only = {(1, 3), (0, 2)}
    assert list(target_ranks(view, topology, held_shapes(topology), only)) == [
        rank for rank, place in zip(ranks, places, strict=True) if place in only
    ]
    assert [slot.names for slot in ranks[1].slots] == [
        ("first", "last"),
        (EXPERT_NAMES[2], "mlp.experts.w1"),
        (EXPERT_NAMES[3],),
    ]
    assert [slot.group for slot in ranks[1].slots] == [0, 1, 0]
    assert {slot.group for slot in ranks[1].weights} == {-1}


@pytest.mark.parametrize(("precision", "partitions"), [("fp32", 1), ("fp16", 1), ("bf16", 2)])
def test_pipelines_in_bf16_partition_their_states_at_stage_0(precision: str, partitions: int) -> None:
    run = RunState(precision, 3, 3, 0, None, None, "0")  # type: ignore[arg-type]
    view = UniversalView(Sketch({"a": (4,), "b": (3,)}, run=run), {"a": "a", "b": "b"}, {})
    shapes = {"a": ((4,), None), "b": (None, (3,))}
    ranks = list(target_ranks(view, Topology(1, 2, 2, 0), shapes))
    assert [[slot.names for slot in rank.slots] for rank in ranks] == [[("a",)], [("a",)], [("b",)], [("b",)]]
    assert {slot.flattening.partitions for rank in ranks for slot in rank.slots} == {partitions}


@pytest.mark.parametrize(
    ("names", "pp", "stages"),
    [
        (["first", "l.0.a", "l.0.b", "l.1.a", "l.2.a", "last"], 1, [0, 0, 0, 0, 0, 0]),
        (["first", "l.0.a", "l.0.b", "l.1.a", "l.2.a", "last"], 2, [0, 0, 0, 0, 1, 1]),
        (["first", "l.0.a", "l.0.b", "l.1.a", "l.2.a", "last"], 4, [0, 0, 0, 1, 2, 3]),
        (["e.0.a", "e.1.a", "between", "d.0.a", "d.1.a"], 2, [0, 0, 0, 1, 1]),
        (["0.a", "1.l.0.b", "1.l.1.b", "2.a"], 3, [0, 1, 1, 2]),
        (["l.9.a", "l.10.a", "v2.a"], 2, [0, 1, 1]),
    ],
)
def test_stages(names: list[str], pp: int, stages: list[int]) -> None:
    assert list(stages_of(names, pp).values()) == stages
