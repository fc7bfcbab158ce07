"""The hyper-parameters, and the scheduler's values, of a checkpoint's groups that each parameter group of a target takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, IMPLEMENTATION_SWITCHES, ParameterGroup
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers, usable
from ucp_deepspeed.transfer.planning.obstacles import Obstacles

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
    groups: Sequence[Sequence[str]],
    live_group: Callable[[int], Mapping[str, Any]],
    numbers: PartitionNumbers,
    keep: bool,
    obstacles: Obstacles,
) -> GroupSettings:
    """Give each group of the target the hyper-parameters of its parameters, whatever the order of their groups was.

    It gives all of them, also those that the live group doesn't have yet: optimizers make some at their first step.

    Args:
        source: the checkpoint's groups, by the logical names of the parameters in them.
        groups: logical names in each group of the target.
        live_group: the hyper-parameters that a group of the target has now.
        numbers: gives the groups' values of numbers that differ over partitions.
        keep: whether the groups keep what was configured; their counts are restored even so.
        obstacles: takes the keys for which the parameters of a group come from groups with different values.
    """
    values: list[Mapping[str, Any]] = []
    kept: list[str] = []
    for index, names in enumerate(groups):
        joined: dict[int, str] = {}  # the checkpoint's groups → the first parameter of each
        for name in (name for name in names if name in source):
            joined.setdefault(id(source[name]), name)
        settled = {name: numbers.of_group(index, source[name]) for name in joined.values()}
        one = numbers.of_joined(index, settled)
        held = {name: {**found, **one} for name, found in settled.items()}
        first, live = next(iter(held.values()), {}), live_group(index)
        taken = {key: value for key, value in usable(first).items() if not keep or _is_counted(key, live)}
        values.append(taken)
        kept += [
            f"parameter group {index}: {key!r} is {value!r} in the checkpoint, {live[key]!r} here"
            for key, value in first.items()
            if key not in taken and key in live and not same_value(_plain(value), _plain(live[key]))
        ]
        for problem in _differing(taken, held, keep):
            obstacles.add(f"parameter group {index}", problem)
    return GroupSettings(tuple(values), tuple(kept))


JOINED_HINT = (
    '"on_differing": "first", "last", "mean" or "max" makes one of numbers, "hyperparameters": "keep" keeps the configured '
    "ones"
)


def _is_counted(key: str, live: Mapping[str, Any]) -> bool:
    """Return whether a hyper-parameter is one that the optimizer made while it ran, and no setting."""
    return key == GROUP_STEP or (key not in live and key != "initial_lr")


def _differing(taken: Mapping[str, Any], held: Mapping[str, Mapping[str, Any]], keep: bool) -> Iterator[str]:
    """Yield the differences between groups that become one, each under the name of a parameter."""
    absent: Any = object()
    for key in taken if keep else dict.fromkeys(key for found in held.values() for key in usable(found)):
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

ANEW_HINT = "load_lr_scheduler_states=False starts the schedule anew"


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
