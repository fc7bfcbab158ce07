"""One rank's plan, without ranks: copies carried out on sketched tensors, the states that slots get, and one error for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from native_files.described import Cut, shares
from sketches import STATES, Sketch, file_of, model, paired

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT, Kind, ParameterGroup
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import FlatGroup, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard
from ucp_deepspeed.plan import BlockCopy
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.rank_planner import RankPlanner, SlotStates, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import KeptStates, TargetRank, TargetSlot
from ucp_deepspeed.transfer.planning.target_ranks import target_ranks

FOUR, GROWN = (4, 3), (6, 3)
NEVER = 1 << 60
"""No buffer is large enough to be read together."""

SHAPES: dict[str, Shape] = {"rows": (6, 4), "columns": (4, 6), "same": (5,), "still": (3,), "mask": (5,)}
KINDS: dict[str, Kind] = {"still": "frozen", "mask": "buffer"}
CUTS: dict[str, Cut] = {"rows": "rows", "columns": "columns"}
PATTERNS: dict[str, Pattern] = {"rows": Shard(0), "columns": Shard(1), "same": Replicate(), "still": Replicate()}
SOURCES = [Topology(zero_stage=1), Topology(2, 1, 2, 3)]
TARGETS = [Topology(tp, 1, dp, stage) for tp in (1, 2) for dp in (1, 3) for stage in range(4)]


def whole(name: str, state: str) -> torch.Tensor:
    """Every element of every state has a value of its own; none is zero."""
    place = sum(prod(shape) for other, shape in SHAPES.items() if other < name)
    first = 1 + place + 1000 * (MASTER, "exp_avg", WEIGHT).index(state)
    return torch.arange(first, first + prod(SHAPES[name])).view(SHAPES[name]).double()


def local(name: str, state: str, degree: int, rank: int) -> torch.Tensor:
    return shares(whole(name, state), CUTS.get(name, "replicated"), degree)[rank].flatten().clone()


def carry_out(copies: Sequence[BlockCopy[FileExtent, None]], buffer: torch.Tensor, degree: int) -> None:
    """Copy from the sketch's files, which hold what ``local`` has of ``degree`` ranks."""
    for copy in copies:
        [view] = copy.sources
        name, state, rank = view.buffer.path.split("/")
        held = local(name, state, degree, int(rank))
        block = torch.as_strided(held, copy.shape, view.strides, view.start)
        torch.as_strided(buffer, copy.shape, copy.target.strides, copy.target.start).copy_(block)


def saved_by(topology: Topology) -> Sketch:
    return Sketch(SHAPES, KINDS, topology=topology, patterns=PATTERNS)


def numbers_of(found: Pair, *slots: TargetSlot) -> PartitionNumbers:
    topology = found.model.topology
    return PartitionNumbers(found.checkpoint, found.names.source, topology, (0, 0), slots, found.policies)


def ranks_of(checkpoint: Checkpoint, target: Topology) -> tuple[Pair, list[TargetRank]]:
    described = model(SHAPES, KINDS, topology=target, inferred=PATTERNS)
    found, view = paired(checkpoint, described), UniversalView.of(checkpoint)
    return found, list(target_ranks(view, target, {name: each.local_shapes for name, each in found.tensors.items()}))


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_each_rank_is_filled_with_its_own_elements(source: Topology, target: Topology) -> None:
    found, ranks = ranks_of(saved_by(source), target)
    planner = RankPlanner(found, TargetOptimizer(), set(), NEVER)
    for rank in ranks:
        planned = planner.plan(rank, numbers_of(found, *rank.slots))
        assert (planned.initialised, planned.dropped, planned.exchanged) == ((), (), ())
        slots = [(slot, plan.buffers) for slot, plan in zip(rank.slots, planned.slots, strict=True)]
        assert all(plan.scalars == {"step": 3.0} and set(plan.buffers) == set(STATES) for plan in planned.slots)
        slots += [(slot, {WEIGHT: plan}) for slot, plan in zip(rank.weights, planned.weights, strict=True)]
        for slot, buffers in slots:
            for state, plan in buffers.items():
                buffer, expected = (torch.zeros(slot.numel(state)).double() for _ in range(2))
                carry_out(plan.copies, buffer, source.tp)
                for name, part in slot.fragments(state):
                    held = local(name, state, target.tp, rank.model_parallel_rank)
                    values = held[part.local_start : part.local_start + part.numel]
                    expected[part.buffer_start : part.buffer_start + part.numel] = values
                assert torch.equal(buffer, expected), (slot, state)
        assert planned.bytes_needed == sum(prod(copy.shape) * 4 for each in planned.buffers for copy in each.copies)


@pytest.mark.parametrize(
    ("degree", "target"),
    [(1, Topology(1, 1, 3, 0)), (1, Topology(2, 1, 1, 1)), (1, Topology(2, 1, 3, 0)), (2, Topology(3, 1, 1, 1))],
    ids=str,
)
def test_what_ranks_hold_alike_is_read_once(degree: int, target: Topology) -> None:
    """All ranks read the first of the checkpoint's copies of a parameter."""
    source = saved_by(Topology(degree, zero_stage=1))
    found, ranks = ranks_of(source, target)
    read: Counter[tuple[str, int]] = Counter()
    planner, exchanged = RankPlanner(found, TargetOptimizer(), set(), 1), False
    for rank in ranks:
        planned = planner.plan(rank, numbers_of(found, *rank.slots))
        exchanged |= bool(planned.exchanged)
        for copy in (copy for buffer in planned.buffers for copy in buffer.copies):
            [view] = copy.sources
            places = torch.as_strided(torch.arange(100), copy.shape, view.strides, view.start)
            read.update((view.buffer.path, int(place)) for place in places.flatten())
    assert exchanged == (target.tp > 1)
    assert read == {
        (file_of(name, state, copy), place): 1
        for name, parameter in source.parameters.items()
        for state in parameter.states
        for copy in range(degree if name in CUTS else 1)
        for place in range(prod(parameter.local_shapes[copy] or ()))
    }


def test_names_that_are_kept_apart_are_read_by_each_rank() -> None:
    found, ranks = ranks_of(saved_by(Topology(zero_stage=1)), Topology(2, 1, 1, 1))
    planned = RankPlanner(found, TargetOptimizer(), set(SHAPES), 1).plan(ranks[0], numbers_of(found, *ranks[0].slots))
    assert planned.exchanged == ()


def kept(elementwise: str = "", scalars: str = "", not_from_zero: str = "") -> KeptStates:
    names, numbers = frozenset(elementwise.split()), frozenset(scalars.split())
    return KeptStates(names, numbers, names - set(not_from_zero.split()), names | numbers)


def saved(states: str = "m", /, **scalars: float) -> tuple[Sequence[str], Mapping[str, float]]:
    return states.split(), scalars


INIT, DROP = {"initialise": True}, {"drop": True}


@pytest.mark.parametrize(
    ("held", "wanted", "policies", "expected"),
    [
        (saved(step=3.0), kept("m", "step"), {}, (["m"], {"step": 3.0})),
        (saved(step=3.0), None, {}, (["m"], {"step": 3.0})),
        (saved(""), kept("m"), {}, ([], {})),
        (saved("m", step=3.0), kept("m", "step"), {"optimizer_states": "keep"}, ([], {})),
        (saved("m"), kept("m n"), {}, '"on_missing": "init" starts [\'n\'] at zero'),
        (saved("m"), kept("m n"), INIT, (["n", "m"], {}, "begun")),
        (saved("m"), kept("m n", "", "n"), {}, "go on with the optimizer that saved them, or"),
        (saved("m"), kept("m n", "", "n"), INIT, ([], {}, "begun")),
        (saved("m"), kept("m", "step"), INIT, ([], {}, "begun")),
        (saved("m n", mu=0.5), kept("m"), {}, "\"on_extra\": \"drop\" leaves ['mu', 'n'] out"),
        (saved("m n", mu=0.5), kept("m"), DROP, (["m"], {}, "left")),
        (saved("m"), kept("n"), INIT | DROP, (["n"], {}, "begun", "left")),
        (
            saved("m"),
            kept("", "m"),
            INIT | DROP,
            "['m']: one number on one side, and one for each element on the other",
        ),
    ],
)
def test_states_of_a_slot(
    held: tuple[Sequence[str], Mapping[str, float]], wanted: KeptStates | None, policies: dict[str, Any], expected: Any
) -> None:
    """``expected``: states, numbers and which of them begin anew or are left out, or what the error says."""
    states, scalars = held
    entry = Parameter("a", "trainable", (FOUR,), dict.fromkeys((MASTER, *states), "F32"), scalars)
    found = paired(Sketch({}, parameters={"a": entry}), model({"a": FOUR}), Policies(**policies))
    slot = TargetSlot(("a",), FlatGroup((12,), 1, alignment=1), 0, 0)
    planner = RankPlanner(found, TargetOptimizer(lambda slot: wanted), set(), NEVER)
    got = planner.states_of(slot, numbers_of(found, slot))
    if isinstance(expected, str):
        assert expected in "".join(str(obstacle) for obstacle in found.obstacles)
    else:
        names, numbers, *changed = expected
        begun, left = (("a",) * (word in changed) for word in ("begun", "left"))
        assert got == SlotStates((MASTER, *names), numbers, begun, left) and not found.obstacles
        assert planner.outcome([got]) == (begun, left)


def counted(*counts: tuple[int | None, int | None]) -> tuple[Any, TargetSlot]:
    """A checkpoint with a parameter in a group of its own for each pair of its step and its group's; and a slot of all."""
    names = [f"p{place}" for place in range(len(counts))]
    steps = [{} if of_state is None else {GROUP_STEP: of_state} for of_state, _ in counts]
    entries = {
        name: Parameter(name, "trainable", (FOUR,), STATES, step) for name, step in zip(names, steps, strict=True)
    }
    groups = tuple(
        ParameterGroup((name,), {} if step is None else {GROUP_STEP: step})
        for name, (_, step) in zip(names, counts, strict=True)
    )
    found = paired(Sketch({}, parameters=entries, groups=groups), model(dict.fromkeys(names, FOUR)))
    return found, TargetSlot(tuple(names), FlatGroup((12,) * len(names), 1, alignment=1), 0, 0)


@pytest.mark.parametrize(
    ("counts", "place", "of_states", "of_group"),
    [
        ([(None, 7)], "state", {"step": 7}, {}),
        ([(None, 7), (7, 0)], "state", {"step": 7}, {}),
        ([(5, 0)], "state", {"step": 5}, {"step": 0}),
        ([(5, 7)], "state", {"step": 5}, {"step": 7}),
        ([(None, 7)], "last state", {"step": 7}, {}),
        ([(5, 0)], "last state", {"step": 5}, {"step": 0}),
        ([(5, None)], "group", {}, {"step": 5}),
        ([(None, 5), (5, None)], "group", {}, {"step": 5}),
        ([(3, 5)], "group", {}, {"step": 5}),
        ([(5, 7)], None, {"step": 5}, {"step": 7}),
        ([(None, 7), (6, None)], "state", "scalars {'step': 6}, and p0, which the target", {}),
        ([(4, None), (6, None)], "group", "'step' is 4 for p0 and 6 for p1, and the optimizer counts for all", {}),
        ([(None, 4), (None, 6)], "group", "'step' is 4 for p0 and 6 for p1, and the optimizer counts for all", {}),
        ([(4, 7), (6, 7)], "last state", "'step' is 4 for p0 and 6 for p1, and the optimizer counts for all", {}),
        ([(None, 4), (6, 0)], "last state", "'step' is 4 for p0 and 6 for p1, and the optimizer counts for all", {}),
    ],
)
def test_the_step_of_a_state_or_of_a_group(counts: Any, place: Any, of_states: Any, of_group: Any) -> None:
    """Apex's optimizers count in the group alone, torch's in each state; one goes on with the steps of the other."""
    found, slot = counted(*counts)
    keeps = replace(kept("exp_avg", "" if place == "group" else "step"), steps=place)
    planner, numbers = RankPlanner(found, TargetOptimizer(lambda slot: keeps), set(), NEVER), numbers_of(found, slot)
    settings = found.settings([list(slot.names)], lambda index: {}, lambda index: place, numbers)
    scalars = planner.states_of(slot, numbers).scalars
    if isinstance(of_states, str):
        assert of_states in "".join(str(obstacle) for obstacle in found.obstacles)
    else:
        assert (scalars, settings.values) == (of_states, (of_group,)) and not found.obstacles


def test_an_optimizer_that_goes_on_may_have_made_states_later() -> None:
    found = paired(Sketch({"a": FOUR}), model({"a": FOUR}))
    slot, keeps = TargetSlot(("a",), FlatGroup((12,), 1), 0, 0), kept("", "step")
    refusing = RankPlanner(found, TargetOptimizer(lambda slot: keeps), set(), NEVER)
    same = TargetOptimizer(lambda slot: keeps, lambda slot, settings: settings == {"lr": 0.1})
    assert RankPlanner(found, same, set(), NEVER).states_of(slot, numbers_of(found, slot)).states == (*STATES,)
    assert not found.obstacles
    refusing.states_of(slot, numbers_of(found, slot))
    assert found.obstacles.names == {"a"}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"scalars": {"step": 4.0}}, "give them parameter groups of their own"),
        ({"scalars": {"step": 3.0, "mu": 1.0}}, "give them parameter groups of their own"),
        ({"states": {MASTER: "F32"}, "scalars": {}}, '"on_missing": "init" gives it zero state'),
    ],
)
def test_one_buffer_needs_the_same_states_and_numbers(change: dict[str, Any], hint: str) -> None:
    sketch = Sketch({"a": FOUR, "b": (5,)})
    sketch.parameters = {**sketch.parameters, "b": replace(sketch.parameters["b"], **change)}
    together = TargetSlot(("a", "b"), FlatGroup((12, 5), 1), 0, 0)
    apart = [TargetSlot((name,), FlatGroup((numel,), 1), 0, 0) for name, numel in (("a", 12), ("b", 5))]
    found = paired(sketch, model({"a": FOUR, "b": (5,)}))
    planner = RankPlanner(found, TargetOptimizer(), set(), NEVER)
    for slot in apart:
        planner.states_of(slot, numbers_of(found, slot))
    assert not found.obstacles
    planner.states_of(together, numbers_of(found, together))
    [obstacle] = found.obstacles
    assert str(obstacle).startswith("b: has states ") and hint in str(obstacle)


def test_further_rows_and_other_shapes_keep_the_models_values() -> None:
    """Rows of a vocabulary that grew are begun, and the saved ones filled; a function of the user's fills another shape."""
    source = Sketch({"grown": FOUR, "other": (5,)})
    allowing = Policies(initialise=True, reshape=True)
    found = paired(source, model({"grown": GROWN, "other": (3,)}), allowing)
    planner = RankPlanner(found, TargetOptimizer(), set(), NEVER)
    assert (planner.grown, planner.reshaped, list(planner.restored)) == (("grown",), ("other",), ["grown"])
    slots = tuple(
        TargetSlot((name,), FlatGroup((n,), 1, alignment=1), 0, 0) for name, n in (("grown", 18), ("other", 3))
    )
    planned = planner.plan(TargetRank(0, 0, slots, ()), numbers_of(found, *slots))
    assert planned.initialised == ("grown", "other")
    grown, other = (slot.buffers for slot in planned.slots)
    assert {state: sum(prod(copy.shape) for copy in plan.copies) for state, plan in grown.items()} == {
        MASTER: 12,
        "exp_avg": 12,
    }
    assert other.keys() == {MASTER} and not other[MASTER].copies
    held = [sum(part.numel for part in plan.held) for plan in (grown[MASTER], grown["exp_avg"], other[MASTER])]
    assert held == [18, 0, 3]


KEPT = TargetOptimizer(lambda slot: KeptStates(*(frozenset(names) for names in (["sum"], ["step"], ["sum"], ["sum"]))))


def test_one_error_lists_all_that_does_not_fit() -> None:
    """A load used to be refused for names first, then for groups, then for the scheduler, then for shapes, then for states."""
    shapes = {"a": FOUR, "b": FOUR, "old": (2,), "c": (5,)}
    groups = tuple(
        ParameterGroup((name,), {"lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2), ("c", 0.1), ("old", 0.1))
    )
    checkpoint = Sketch(shapes, {"c": "frozen"}, groups=groups, scheduler={"base_lrs": [0.1, 0.2, 0.1, 0.1]})
    found = paired(checkpoint, model({"a": FOUR, "b": GROWN, "c": (5,), "new": (7,)}))
    slot = TargetSlot(("a", "b", "c", "new"), FlatGroup((12, 18, 5, 7), 1, alignment=1), 0, 0)
    numbers = PartitionNumbers(found.checkpoint, found.names.source, Topology(), (0, 0), [slot], found.policies)
    found.settings([list(slot.names)], lambda index: {}, lambda index: None, numbers)
    found.schedule([list(slot.names)], {})
    with pytest.raises(MismatchError) as caught:
        RankPlanner(found, KEPT, set(), 1).plan(TargetRank(0, 0, (slot,), ()), numbers)
    told = {line.partition(": ")[0]: line.partition(": ")[2] for line in caught.value.problems}
    assert told.keys() == {"c", "new", "old", "parameter group 0", "the scheduler's base_lrs", "b", "a"}
    assert told["new"].startswith("missing in the checkpoint") and told["old"].startswith("extra in the checkpoint")
    assert told["c"].startswith("frozen in the checkpoint, trainable in the model")
    assert told["parameter group 0"].startswith("'lr' is 0.1 for a and 0.2 for b; ")
    assert told["the scheduler's base_lrs"].startswith("parameter group 0 joins groups with [0.1, 0.2, 0.1]; load_lr")
    assert told["b"].startswith("expected logical shape (6, 3), found (4, 3)")
    assert told["a"].startswith("the optimizer keeps ['step', 'sum'], the checkpoint holds ['exp_avg', 'step']")
    assert caught.value.heading == "sketch doesn't fit the model" and '"on_extra": "drop"' in caught.value.remedy


def test_what_policies_allow_is_no_obstacle() -> None:
    checkpoint = Sketch({"a": FOUR, "old": (2,)})
    found = paired(checkpoint, model({"a": GROWN, "new": (7,)}), Policies(initialise=True, drop=True))
    planner = RankPlanner(found, TargetOptimizer(), set(), 1)
    assert not found.obstacles and planner.grown == ("a",)
    assert planner.outcome([SlotStates((), {}, ("x", "a"), ("y",))]) == (("new", "a", "x"), ("old", "y"))
