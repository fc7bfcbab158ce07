"""The numbers of a checkpoint's optimizer and scheduler that a rank takes: scalars of states, and values of parameter groups.

Numbers may differ over partitions: a rank that has one of these partitions again gets its own back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.checkpoint import (
    GROUP_STEP,
    IMPLEMENTATION_SWITCHES,
    Differing,
    ParameterGroup,
    step_in_group,
)
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.differing import DIFFERING_HINT, all_same, in_words, made_one
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import Numbers, place_of
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.policies import Obstacles, Policies
from ucp_deepspeed.transfer.planning.target import PlaceOfSteps, TargetSlot


class PartitionNumbers:
    """The numbers in a checkpoint that the slots and groups of one rank take.

    Attributes:
        merged: numbers that were made of several, in words.
        problems: numbers that may not be made of several: their place, and why.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        topology: Topology,
        place: tuple[int, int],
        slots: Sequence[TargetSlot],
        policies: Policies,
    ) -> None:
        """Args:
        names: the checkpoint's names of parameters → logical ones.
        topology: the target's.
        place: the rank's model- and expert-parallel rank.
        slots: slots of the rank, under logical names.
        """
        self._how, self._names = policies.differing, names
        self.merged: list[str] = []
        self.problems: list[tuple[str, str]] = []
        self._told: set[str] = set()
        self._own: dict[tuple[str, ...], Numbers] = {}
        self._own_groups: dict[int, Numbers] = {}
        restored = policies.optimizer_states == "restore"
        same = replace(checkpoint.topology, dp=1, zero_stage=0) == replace(topology, dp=1, zero_stage=0)
        if same and restored and isinstance(checkpoint, DeepSpeedCheckpoint) and not checkpoint.same_numbers:
            self._find_own(checkpoint, *place, slots)

    def _find_own(self, checkpoint: DeepSpeedCheckpoint, rank: int, ep_rank: int, slots: Sequence[TargetSlot]) -> None:
        """Find the slots that are the same in the checkpoint, and the groups all of whose slots are."""
        others: set[int] = set()
        known = {
            (tuple(self._names.get(name) for name in slot.names), slot.flattening): slot
            for slot in checkpoint.trained_slots(rank)
        }
        for slot in slots:
            found = known.get((slot.names, slot.flattening))
            if found is None or not found.numbers:
                others.add(slot.group)
            else:
                own = found.numbers.get(place_of("expert-parallel rank", ep_rank))
                numbers = (own or found.numbers[place_of("partition", slot.partition)])()
                self._own[slot.names] = self._own_groups[slot.group] = numbers
        for group in others:
            self._own_groups.pop(group, None)

    def has_own(self, slot: TargetSlot) -> bool:
        """Return whether a slot gets the numbers that its own partition had."""
        return slot.names in self._own

    def of_parameter(self, slot: TargetSlot, parameter: Parameter) -> Parameter:
        """Return a parameter of a slot with the scalars that the slot is to have."""
        if slot.names in self._own:
            return replace(parameter, scalars=self._own[slot.names].scalars)
        return replace(parameter, scalars=self._settled(parameter.name, parameter.scalars, parameter.differing))

    def step(self, index: int, parameter: Parameter, settings: Mapping[str, Any]) -> float | None:
        """Return the step that a live group takes from one of its parameters, if the group alone counts: the parameter's own, or
        that of its group in the checkpoint, which has these settings. Where both count, the later one goes on."""
        own = self._own_groups.get(index)
        scalars = own.scalars if own else self._settled(parameter.name, parameter.scalars, parameter.differing)
        if GROUP_STEP not in scalars:
            return step_in_group(parameter, settings)
        of_group = settings.get(GROUP_STEP)
        return max(scalars[GROUP_STEP], of_group if isinstance(of_group, (int, float)) else 0)

    def of_group(self, index: int, group: ParameterGroup) -> Mapping[str, Any]:
        """Return the hyper-parameters that a live group takes from one of the checkpoint's."""
        if index in self._own_groups:
            return self._own_groups[index].settings
        place = f"the parameter group of {self._names[group.names[0]]}"
        return self._settled(place, group.hyperparameters, group.differing)

    def of_joined(self, index: int, held: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return numbers that differ over groups that become one, as over pipeline stages; only if one may be made of them.

        Args:
            held: for each group the name of a parameter in it → its hyper-parameters.
        """
        values = {f"the group of {name}": settings for name, settings in held.items()}
        keys = next(iter(values.values()), {})
        numbers = [key for key in keys if {type(each.get(key)) for each in values.values()} <= {int, float}]
        return self._joined(f"parameter group {index}", values, numbers)

    def together(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """Return parameters of one slot with the same scalars, if one may be made of several, but for ``step``."""
        found, first = {parameter.name: parameter.scalars for parameter in parameters}, parameters[0]
        numbers = (key for key in first.scalars if key != "step" and all(key in scalars for scalars in found.values()))
        one = self._joined(first.name, found, numbers)
        return [replace(each, scalars={**each.scalars, **one}) for each in parameters] if one else parameters

    def _joined(self, place: str, held: Mapping[str, Mapping[str, Any]], keys: Iterable[str]) -> Mapping[str, Any]:
        """Return one number for each key for which the holders' numbers differ; none if none may be made."""
        all_held = {key: {holder: values[key] for holder, values in held.items()} for key in keys}
        differing = {key: values for key, values in all_held.items() if not all_same(list(values.values()))}
        if not differing or self._how == "error":
            return {}
        made = self._settled(place, next(iter(held.values())), differing)
        return {key: made[key] for key in differing}

    def _settled(self, place: str, values: Mapping[str, Any], differing: Differing) -> Mapping[str, Any]:
        if not differing:
            return values
        found, refused = made_one(values, differing, self._how)
        for key, held in differing.items():
            told = f"{key!r} is {in_words(held)}"
            if told not in self._told and key in refused:
                self.problems.append((place, f"{told}; {DIFFERING_HINT}"))
            elif told not in self._told:  # else told for another parameter of the same slot
                self.merged.append(f"{place}: {told}; now {found[key]!r}")
            self._told.add(told)
        return found


def usable(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a group that mean the same on every machine."""
    return {key: value for key, value in hyperparameters.items() if key not in (*IMPLEMENTATION_SWITCHES, "params")}


UNTELLING = frozenset(("params", "initial_lr", *IMPLEMENTATION_SWITCHES, GROUP_STEP))
"""Keys of groups that don't tell an optimizer's class: something else makes them, or the optimizer makes them at its first
step."""

Settings = tuple[Mapping[str, Any], ...]
"""The hyper-parameters to take over, for each parameter group of the target."""


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """The values that the target's parameter groups take over.

    Attributes:
        values: for each group.
        kept: the checkpoint's hyper-parameters that differ and aren't taken over, in words.
    """

    values: Settings = ()
    kept: tuple[str, ...] = ()


def settings_of_groups(
    source: Mapping[str, ParameterGroup],
    parameters: Mapping[str, Parameter],
    groups: Sequence[Sequence[str]],
    live_group: Callable[[int], Mapping[str, Any]],
    place_of_steps: Callable[[int], PlaceOfSteps | None],
    numbers: PartitionNumbers,
    keep: bool,
    obstacles: Obstacles,
    scheduled: frozenset[str] = frozenset(),
) -> GroupSettings:
    """Give each group of the target all hyper-parameters of its parameters, whatever the order of their groups was, also those
    that the live group doesn't have yet: optimizers make some at their first step.

    Args:
        source: the checkpoint's groups, by the logical names of the parameters in them.
        parameters: the checkpoint's parameters, by logical name.
        groups: logical names in each group of the target.
        live_group: the hyper-parameters that a group of the target has now.
        place_of_steps: the place where the optimizer counts a group's steps; see `KeptStates.steps`.
        numbers: gives the groups' values of numbers that differ over partitions.
        keep: whether the groups keep what was configured; their counts are restored even so.
        obstacles: takes the keys for which the parameters of a group come from groups with different values.
        scheduled: keys of which the groups keep what they have.
    """
    values: list[Mapping[str, Any]] = []
    kept: list[str] = []
    for index, names in enumerate(groups):
        joined: dict[int, str] = {}  # the checkpoint's groups → the first parameter of each
        for name in (name for name in names if name in source):
            joined.setdefault(id(source[name]), name)
        settled = {name: numbers.of_group(index, source[name]) for name in joined.values()}
        place = place_of_steps(index)
        held_here = (name for name in names if name in source and name in parameters)
        trained = [(parameters[name], joined[id(source[name])]) for name in held_here]
        if place == "group":
            steps = {each.name: numbers.step(index, each, settled[first]) for each, first in trained}
            step = _one_step(steps, f"parameter group {index}", obstacles)
            settled = {name: {**found, **step} for name, found in settled.items()}
        elif place is not None:
            steps = {each.name: step_in_group(each, settled[first]) for each, first in trained}
            moved = {first for each, first in trained if steps[each.name] is not None}
            settled = {name: _without_step(found) if name in moved else found for name, found in settled.items()}
            if place == "last state":
                steps |= {each.name: numbers.step(index, each, {}) for each, _ in trained if GROUP_STEP in each.scalars}
                _one_step(steps, f"parameter group {index}", obstacles)
        one = numbers.of_joined(index, settled)
        held = {name: {**found, **one} for name, found in settled.items()}
        first, live = next(iter(held.values()), {}), live_group(index)
        # A number that the optimizer made while it ran is no setting.
        made = {key for key in first if key == GROUP_STEP or (key not in live and key != "initial_lr")}
        asked = made if keep else usable(first).keys()
        taken = {key: value for key, value in usable(first).items() if key in asked and key not in scheduled}
        values.append(taken)
        kept += _left_out(index, first, taken, live)
        for problem in _differing(taken, held, keep, scheduled):
            obstacles.add(f"parameter group {index}", problem)
    return GroupSettings(tuple(values), tuple(kept))


def _left_out(index: int, saved: Mapping[str, Any], taken: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[str]:
    """Yield, in words, a group's saved hyper-parameters that differ from the live ones and aren't taken over."""
    for key, value in saved.items():
        if key not in taken and key in live and not same_value(_plain(value), _plain(live[key])):
            yield f"parameter group {index}: {key!r} is {value!r} in the checkpoint, {live[key]!r} here"


def _without_step(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in settings.items() if key != GROUP_STEP}


def _one_step(steps: Mapping[str, float | None], group: str, obstacles: Obstacles) -> dict[str, float]:
    """Return the step of a group's parameters under its key; nothing if none of them has been stepped on."""
    counted = [(name, step) for name, step in steps.items() if step is not None]
    for name, step in counted:
        if step != counted[0][1]:
            told = (
                f"'step' is {counted[0][1]} for {counted[0][0]} and {step} for {name}, and the optimizer counts for all"
            )
            obstacles.add(group, f"{told}; give them parameter groups of their own")
            break
    return {GROUP_STEP: int(counted[0][1])} if counted else {}


JOINED_HINT = (
    '"on_differing": "first", "last", "mean" or "max" makes one of numbers, "hyperparameters": "keep" keeps the configured '
    "ones"
)


def _differing(
    taken: Mapping[str, Any], held: Mapping[str, Mapping[str, Any]], keep: bool, scheduled: frozenset[str]
) -> Iterator[str]:
    """Yield the differences between groups that become one, each under the name of a parameter."""
    absent: Any = object()
    every = dict.fromkeys(key for found in held.values() for key in usable(found) if key not in scheduled)
    for key in taken if keep else every:
        nothing = 0 if key == GROUP_STEP else absent
        value = taken.get(key, nothing)
        for name, found in held.items():
            other = found.get(key, nothing)
            if (other is absent) != (value is absent) or not same_value(value, other):
                one, two = ("missing" if each is absent else each for each in (value, other))
                yield f"{key!r} is {one} for {next(iter(held))} and {two} for {name}; {JOINED_HINT}"
                break


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Values that torch's schedulers keep for each parameter group, in the optimizer's order (``torch/optim/lr_scheduler.py``)."""

OF_ALL_GROUPS = ("_milestones", "milestones", "_schedule_phases")
"""Lists that belong to a scheduler's whole schedule, even if they are as long as there are groups."""

ANEW_HINT = 'load_lr_scheduler_states=False, or "scheduler": "keep" in the block, starts the schedule anew'


def schedule_of_groups(
    state: Mapping[str, Any] | None,
    live: Mapping[str, Any],
    sources: Sequence[Sequence[int]],
    count: int,
    keep: bool,
    obstacles: Obstacles,
) -> Mapping[str, Any] | None:
    """Return a scheduler's saved state, with its values for each group in the order of the target's groups.

    Args:
        live: the target's own state; its values stay for groups without parameters in the checkpoint.
        sources: for each group of the target the checkpoint's groups that its parameters are in.
        count: number of the checkpoint's groups.
        keep: whether all groups keep their configured hyper-parameters: the schedule then goes on from these.
        obstacles: takes joined groups for which the scheduler keeps different values, and unknown names with as many values as
            there are groups.
    """
    if state is None:
        return None
    if list(map(list, sources)) != [[index] for index in range(count)]:
        state = _regrouped(state, live, sources, count, "", obstacles)
    return _from_configured(state, live) if keep else state


def _regrouped(
    state: Mapping[str, Any], live: Any, sources: Sequence[Sequence[int]], count: int, place: str, obstacles: Obstacles
) -> dict[str, Any]:
    found = dict(state)
    for key, value in state.items():
        if not isinstance(value, (list, tuple)):
            continue
        other = live.get(key) if isinstance(live, Mapping) else None
        name = f"the scheduler's {place}{key}"
        if key == "_schedulers":
            parts = other if isinstance(other, (list, tuple)) and len(other) == len(value) else [None] * len(value)
            found[key] = [
                _regrouped(one, mine, sources, count, f"{place}{key}.", obstacles)
                for one, mine in zip(value, parts, strict=True)
            ]
        elif len(value) == count and key in PER_GROUP:
            found[key] = [_of_group(value, other, held, i, name, obstacles) for i, held in enumerate(sources)]
        elif len(value) == count > 1 and key not in OF_ALL_GROUPS and not same_value(value, other):
            obstacles.add(name, f"{value} may be of the groups, in an order that isn't the model's; {ANEW_HINT}")
    return found


def _of_group(value: Any, live: Any, held: Sequence[int], index: int, name: str, obstacles: Obstacles) -> Any:
    if not held:
        return live[index] if isinstance(live, (list, tuple)) and index < len(live) else value[0]
    if not all(same_value(value[other], value[held[0]]) for other in held):
        joined = [value[other] for other in held]
        obstacles.add(name, f"parameter group {index} joins groups with {joined}; {ANEW_HINT}")
    return value[held[0]]


def _from_configured(state: Mapping[str, Any], live: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state that a schedule begun at the saved rates would have had it begun at the live ones (torch's, which know
    ``base_lrs``)."""
    began, now = state.get("base_lrs"), live.get("base_lrs")
    if not (isinstance(began, list) and isinstance(now, list) and len(began) == len(now)):
        return state
    last = state.get("_last_lr", began)
    scaled = [rate * new / old if old else rate for rate, old, new in zip(last, began, now, strict=True)]
    return {**state, **{key: live[key] for key in PER_GROUP if key in live}, "_last_lr": scaled}
