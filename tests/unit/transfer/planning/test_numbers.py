"""The numbers that a rank takes of a checkpoint: against what is looked up or computed by hand for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_files import NativeRun, write_native
from native_models import model_of
from sketches import Sketch, model, paired, reasons

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import ParameterGroup
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import FlatGroup, Topology
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers, schedule_of_groups, settings_of_groups, usable
from ucp_deepspeed.transfer.planning.policies import Obstacles, Policies
from ucp_deepspeed.transfer.planning.target import TargetSlot
from ucp_deepspeed.transfer.planning.target_ranks import target_ranks

FOUR = (4, 3)
NAMES = tuple("abcdef")
ONE: dict[str, Callable[[list[float]], float]] = {
    "first": lambda found: found[0],
    "last": lambda found: found[-1],
    "mean": fmean,
    "max": max,
}
RATES = st.sampled_from([0.5, 0.25, 1.0])


def numbers_of(checkpoint: Sketch, how: OnDiffering = "error") -> PartitionNumbers:
    names = {name: name for name in checkpoint.parameters}
    return PartitionNumbers(checkpoint, names, Topology(), (0, 0), [], Policies(differing=how))


@given(how=st.sampled_from(get_args(OnDiffering)), held=st.lists(RATES, min_size=2, max_size=4))
def test_numbers_of_partitions_become_one(how: OnDiffering, held: list[float]) -> None:
    places = {f"partition {number}": value for number, value in enumerate(held)}
    differing = {"d": places} if len(set(held)) > 1 else {}
    group = ParameterGroup(("a",), {"d": held[0], "lr": 0.1}, differing)
    numbers = numbers_of(Sketch({"a": FOUR}), how)
    found = numbers.of_group(0, group)
    refused = bool(differing) and how == "error"
    assert [place for place, _ in numbers.problems] == ["the parameter group of a"] * refused
    assert len(numbers.merged) == (bool(differing) and not refused)
    if not refused:
        assert found == {"d": ONE[how](held) if differing else held[0], "lr": 0.1}


@given(how=st.sampled_from(get_args(OnDiffering)), held=st.lists(RATES, min_size=1, max_size=4))
def test_parameters_that_come_to_lie_in_one_slot(how: OnDiffering, held: list[float]) -> None:
    """One number is made of all but ``step``: steps that differ stand against the load whatever the policy."""
    sketch = Sketch(dict.fromkeys(NAMES[: len(held)], FOUR))
    for place, (parameter, value) in enumerate(zip(sketch.parameters.values(), held, strict=True)):
        parameter.scalars.update(step=float(place), mu=value)  # type: ignore[attr-defined]
    numbers = numbers_of(sketch, how)
    found = numbers.together(list(sketch.parameters.values()))
    one = how != "error" and len(set(held)) > 1
    assert [parameter.scalars for parameter in found] == [
        {"step": float(place), "mu": ONE[how](held) if one else value} for place, value in enumerate(held)
    ]
    assert numbers.problems == [] and len(numbers.merged) == one


@pytest.fixture(scope="module")
def by_partition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three partitions of ZeRO-1; ``mu`` and the groups' ``d`` are each partition's number, in one of two groups."""
    root = tmp_path_factory.mktemp("numbers")
    run = NativeRun(dp=3, stage=1, groups=(("first", "third"), ("second",)))
    folder = write_native(root, model_of({"first": (5, 3), "second": (7,), "third": (2, 2)}), run)
    for path in folder.glob("*_optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        base, number = saved["optimizer_state_dict"]["base_optimizer_state"], float(path.name.split("_")[3])
        base["state"][0]["mu"] = torch.tensor(number)
        base["param_groups"][0]["d"] = number
        torch.save(saved, path)
    return folder


@pytest.mark.parametrize("target", [Topology(1, 1, 3, 1), Topology(1, 1, 3, 3), Topology(1, 1, 2, 1)], ids=str)
def test_a_rank_with_a_partition_of_the_checkpoint_gets_its_numbers(target: Topology, by_partition: Path) -> None:
    checkpoint = open_checkpoint(by_partition)
    view, same = UniversalView.of(checkpoint), target == checkpoint.topology
    shapes = {name: parameter.local_shapes for name, parameter in view.parameters.items()}
    for rank in target_ranks(view, target, shapes):
        place, policies = (rank.model_parallel_rank, rank.data_parallel_rank), Policies(differing="max")
        numbers = PartitionNumbers(checkpoint, view.logical_of, target, (place[0], 0), rank.slots, policies)
        wanted = float(place[1]) if same else 2.0
        slot = next(slot for slot in rank.slots if "first" in slot.names)
        assert numbers.has_own(slot) == same
        assert numbers.of_parameter(slot, view.parameters["first"]).scalars["mu"] == wanted
        assert numbers.of_group(slot.group, view.groups[0])["d"] == wanted
        assert bool(numbers.merged) == (not same) and numbers.problems == []


def test_numbers_that_are_not_restored_are_nobodys_own(by_partition: Path) -> None:
    checkpoint = open_checkpoint(by_partition)
    slot = TargetSlot(("first", "third"), FlatGroup((15, 4), 3), 1, 0)
    names = {name: name for name in checkpoint.parameters}
    for states, own in (("restore", True), ("reset", False)):
        policies = Policies(optimizer_states=states)  # type: ignore[arg-type]
        assert PartitionNumbers(checkpoint, names, checkpoint.topology, (0, 0), [slot], policies).has_own(slot) == own


def test_a_group_with_other_slots_too_has_no_numbers_of_its_own(by_partition: Path) -> None:
    checkpoint = open_checkpoint(by_partition)
    names, policies = {name: name for name in checkpoint.parameters}, Policies(differing="max")
    own = TargetSlot(("first", "third"), FlatGroup((15, 4), 3), 1, 0)
    other = TargetSlot(("new",), FlatGroup((7,), 3), 1, 0)
    for slots, wanted in (([own], 1.0), ([own, other], 2.0)):
        numbers = PartitionNumbers(checkpoint, names, checkpoint.topology, (0, 0), slots, policies)
        assert numbers.of_group(0, checkpoint.groups[0])["d"] == wanted


@given(
    saved=st.lists(st.tuples(st.integers(0, 2), RATES), min_size=6, max_size=6),
    live=st.lists(st.sampled_from([0, 1, 2]), min_size=6, max_size=6),
    how=st.sampled_from(get_args(OnDiffering)),
    keep=st.booleans(),
)
def test_hyper_parameters_follow_names(
    saved: list[tuple[int, float]], live: list[int], how: OnDiffering, keep: bool
) -> None:
    rates = {group: rate for group, rate in saved}
    members = {group: tuple(NAMES[place] for place, (each, _) in enumerate(saved) if each == group) for group in rates}
    groups = {group: ParameterGroup(names, {"lr": rates[group], "k": 3}) for group, names in members.items()}
    wanted = [[name for name, each in zip(NAMES, live, strict=True) if each == group] for group in range(3)]
    sketch, obstacles = Sketch(dict.fromkeys(NAMES, FOUR), groups=tuple(groups.values())), Obstacles()
    source = {name: group for group in groups.values() for name in group.names}
    configured = {"lr": 9.0, "k": 3, "foreach": True}
    found = settings_of_groups(
        source, {}, wanted, lambda index: configured, lambda index: None, numbers_of(sketch, how), keep, obstacles
    )
    for index, names in enumerate(wanted):
        first_of = {id(source[name]): source[name].hyperparameters["lr"] for name in names}
        held = list(first_of.values())
        place, differs = f"parameter group {index}", len(set(held)) > 1
        assert (place in obstacles.names) == (differs and how == "error" and not keep)
        if keep or not names:
            assert found.values[index] == {}
            assert any(place in line for line in found.kept) == bool(names)
        elif not (differs and how == "error"):
            assert found.values[index] == {"lr": ONE[how](held) if differs else held[0], "k": 3}


def test_groups_keep_their_own_switches_and_what_optimizers_count_is_restored() -> None:
    saved = {"lr": 0.1, "foreach": True, "fused": None, "params": [0], "step": 7, "amsgrad": True}
    assert usable(saved) == {"lr": 0.1, "step": 7, "amsgrad": True}
    sketch = Sketch({"a": FOUR}, groups=(ParameterGroup(("a",), saved),))
    source, live = {"a": sketch.groups[0]}, {"lr": 0.2, "amsgrad": False, "step": 3}
    found = settings_of_groups(
        source, {}, [["a"]], lambda index: live, lambda index: None, numbers_of(sketch), True, Obstacles()
    )
    assert found.values == ({"step": 7},)
    assert [line.partition(": ")[2] for line in found.kept] == [
        "'lr' is 0.1 in the checkpoint, 0.2 here",
        "'amsgrad' is True in the checkpoint, False here",
    ]


@given(order=st.permutations(range(4)), joined=st.integers(0, 3))
def test_schedules_follow_the_groups_that_parameters_come_from(order: list[int], joined: int) -> None:
    state = {"base_lrs": [0.0, 0.1, 0.2, 0.3], "milestones": [5, 6, 7, 8], "last_epoch": 3}
    sources, obstacles = [[index] for index in order], Obstacles()
    nested = {"_schedulers": [state, {"min_lrs": [9, 8, 7, 6]}], "_last_lr": [4, 3, 2, 1]}
    found = schedule_of_groups(nested, {}, sources, 4, False, obstacles)
    assert found == {
        "_schedulers": [
            {**state, "base_lrs": [index / 10 for index in order]},
            {"min_lrs": [9 - index for index in order]},
        ],
        "_last_lr": [4 - index for index in order],
    }
    assert not obstacles
    sources[0] = sorted({order[0], joined})
    schedule_of_groups(state, {}, sources, 4, False, obstacles)
    assert bool(obstacles) == (joined != order[0])


def test_groups_that_become_one_are_told_by_their_first_parameters() -> None:
    groups = (ParameterGroup(("b",), {"lr": 0.2}), ParameterGroup(("a", "c"), {"lr": 0.1}))
    shapes = {"a": FOUR, "b": FOUR, "c": FOUR}
    found = paired(Sketch(shapes, groups=groups), model(shapes))
    numbers = PartitionNumbers(found.checkpoint, found.names.source, Topology(), (0, 0), [], found.policies)
    settings = found.settings([["a", "b", "c"], []], lambda index: {}, lambda index: None, numbers)
    assert settings.values == ({"lr": 0.1}, {})
    assert reasons(found)["parameter group 0"].startswith("'lr' is 0.1 for a and 0.2 for b; ")


def test_a_scheduler_follows_the_groups() -> None:
    groups = (ParameterGroup(("a",), {}), ParameterGroup(("b",), {}))
    state = {"base_lrs": [0.1, 0.2], "_last_lr": [0.01, 0.02], "milestones": [7, 9], "mine": [1, 2], "last_epoch": 3}
    sketch, described = Sketch({"a": FOUR, "b": (2,)}, groups=groups, scheduler=state), model({"a": FOUR, "b": (2,)})
    found = paired(sketch, described)
    assert found.schedule([["a"], ["b"]], {}) == state and not found.obstacles
    moved = found.schedule([["b"], [], ["a"]], {"base_lrs": [9.0, 8.0, 7.0], "mine": [1, 2]})
    assert moved == {**state, "base_lrs": [0.2, 8.0, 0.1], "_last_lr": [0.02, 0.01, 0.01]} and not found.obstacles
    kept = paired(sketch, described, Policies(keep_settings=True)).schedule([["a"], ["b"]], {"base_lrs": [1.0, 1.0]})
    assert kept is not None and kept["base_lrs"] == [1.0, 1.0] and kept["_last_lr"] == pytest.approx([0.1, 0.1])
    found.schedule([["b"], ["a"]], {})
    assert "may be of the groups" in reasons(found)["the scheduler's mine"]
