"""Numbers that differ over the partitions of a checkpoint: a rank that has one of these partitions again gets its own back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES, Differing, ParameterGroup
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.differing import DIFFERING_HINT, all_same, in_words, made_one
from ucp_deepspeed.checkpoint.slots import Numbers, place_of
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.target import TargetSlot


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
        topology: topology of the target.
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

    def of_group(self, index: int, group: ParameterGroup) -> Mapping[str, Any]:
        """Return the hyper-parameters that a live group takes from one of the checkpoint's."""
        if index in self._own_groups:
            return self._own_groups[index].settings
        place = f"the parameter group of {self._names[group.names[0]]}"
        return self._settled(place, group.hyperparameters, group.differing)

    def of_joined(self, index: int, held: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return numbers that differ over the groups that become one live group, as over pipeline stages; only if one may be made
        of them.

        Args:
            held: for each group the name of a parameter in it → its hyper-parameters.
        """
        values = {f"the group of {name}": settings for name, settings in held.items()}
        numbers = (
            key
            for key in next(iter(values.values()), {})
            if all(type(settings.get(key)) in (int, float) for settings in values.values())
        )
        return self._joined(f"parameter group {index}", values, numbers)

    def together(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """Return parameters of one slot with the same scalars, if one may be made of several; ``step`` must be the same
        anyway."""
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
            if told in self._told:  # already told for another parameter of the same slot
                continue
            self._told.add(told)
            if key in refused:
                self.problems.append((place, f"{told}; {DIFFERING_HINT}"))
            else:
                self.merged.append(f"{place}: {told}; now {found[key]!r}")
        return found


def usable(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a group that mean the same on every machine."""
    return {key: value for key, value in hyperparameters.items() if key not in (*IMPLEMENTATION_SWITCHES, "params")}
