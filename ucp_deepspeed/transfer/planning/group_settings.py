"""The hyper-parameters of a checkpoint's groups that each parameter group of a target takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, IMPLEMENTATION_SWITCHES, ParameterGroup
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers, usable

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
        problems: groups and keys for which the parameters of a live group come from groups with different values.
    """

    values: Settings = ()
    kept: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def settings_of_groups(
    source: Mapping[str, ParameterGroup],
    groups: Sequence[Sequence[str]],
    live_group: Callable[[int], Mapping[str, Any]],
    numbers: PartitionNumbers,
    keep: bool,
) -> GroupSettings:
    """Give each group of the target the hyper-parameters of its parameters, whatever the order of their groups was.

    It gives all of them, also those that the live group doesn't have yet: optimizers make some at their first step.

    Args:
        source: the checkpoint's groups, by the logical names of the parameters in them.
        groups: logical names in each group of the target.
        live_group: the hyper-parameters that a group of the target has now.
        numbers: gives the groups' values of numbers that differ over partitions.
        keep: whether the groups keep what was configured; their counts are restored even so.
    """
    values: list[Mapping[str, Any]] = []
    kept: list[str] = []
    problems: list[str] = []
    for index, names in enumerate(groups):
        held = [name for name in names if name in source]
        joined = {id(source[name]): source[name] for name in held}
        settled = {key: numbers.of_group(index, group) for key, group in joined.items()}
        one = numbers.of_joined(index, {id(source[name]): name for name in reversed(held)}, settled)
        of_name = {name: {**settled[id(source[name])], **one} for name in held}
        first, live = of_name[held[0]] if held else {}, live_group(index)
        taken = {key: value for key, value in usable(first).items() if not keep or _is_counted(key, live)}
        values.append(taken)
        kept += [
            f"parameter group {index}: {key!r} is {value!r} in the checkpoint, {live[key]!r} here"
            for key, value in first.items()
            if key not in taken and key in live and not same_value(_plain(value), _plain(live[key]))
        ]
        problems += [f"parameter group {index}: {problem}" for problem in _differing(taken, held, of_name, keep)]
    return GroupSettings(tuple(values), tuple(kept), tuple(problems))


JOINED_HINT = (
    '"on_differing": "first", "last", "mean" or "max" makes one of numbers, "hyperparameters": "keep" keeps the configured '
    "ones"
)


def _is_counted(key: str, live: Mapping[str, Any]) -> bool:
    """Return whether a hyper-parameter is one that the optimizer made while it ran, and no setting."""
    return key == GROUP_STEP or (key not in live and key != "initial_lr")


def _differing(
    taken: Mapping[str, Any], held: Sequence[str], of_name: Mapping[str, Mapping[str, Any]], keep: bool
) -> Iterator[str]:
    """Yield the differences between the parameters of a live group."""
    absent: Any = object()
    keys = taken if keep else dict.fromkeys(key for name in held for key in usable(of_name[name]))
    for key in keys:
        nothing = 0 if key == GROUP_STEP else absent
        value = taken.get(key, nothing)
        for name in held:
            other = of_name[name].get(key, nothing)
            if (other is absent) != (value is absent) or not same_value(value, other):
                found = ["missing" if each is absent else each for each in (value, other)]
                yield f"{key!r} is {found[0]} for {held[0]} and {found[1]} for {name}; {JOINED_HINT}"
                break


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
