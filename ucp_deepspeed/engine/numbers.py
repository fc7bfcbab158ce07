"""Numbers that differ over the partitions of a checkpoint: a rank that has one of these partitions gets its own back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES, Differing, ParameterGroup
from ucp_deepspeed.checkpoint.deepspeed import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.differing import DIFFERING_HINT, all_same, in_words, made_one
from ucp_deepspeed.checkpoint.slots import Numbers, place_of
from ucp_deepspeed.engine.matching import Names
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.states import is_number
from ucp_deepspeed.transfer.matching import Policies


class PartitionNumbers:
    """What the live slots and groups of this rank take of the numbers in a checkpoint.

    Attributes:
        merged: in words, those of which one was made.
        problems: those of which none may be made.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: EngineModel, optimizer: EngineOptimizer, names: Names, policies: Policies
    ) -> None:
        self._how, self._names = policies.differing, names
        self.merged: list[str] = []
        self.problems: list[str] = []
        self._told: set[str] = set()
        self._own: dict[tuple[str, ...], Numbers] = {}
        self._own_groups: dict[int, Numbers] = {}
        restored = policies.optimizer_states == "restore"
        same = replace(checkpoint.topology, dp=1, zero_stage=0) == replace(model.topology, dp=1, zero_stage=0)
        if same and restored and isinstance(checkpoint, DeepSpeedCheckpoint):
            self._find_own(checkpoint, model, optimizer)

    def _find_own(self, checkpoint: DeepSpeedCheckpoint, model: EngineModel, optimizer: EngineOptimizer) -> None:
        """The slots that are the same in the checkpoint, and groups all of whose slots are."""
        saved = {logical: name for name, logical in self._names.source.items() if name in checkpoint.parameters}
        others: set[int] = set()
        known = {(slot.names, slot.flattening): slot for slot in checkpoint.trained_slots(model.rank)}
        for slot in optimizer.slots():
            names = tuple(saved.get(self._names.target[name], "") for name in slot.names)
            found = known.get((names, slot.flattening))
            if found is None or not found.numbers:
                others.add(slot.group)
            else:
                own = found.numbers.get(place_of("expert-parallel rank", model.ep_rank))
                numbers = (own or found.numbers[place_of("partition", slot.partition)])()
                self._own[slot.names] = self._own_groups[slot.group] = numbers
        for group in others:
            self._own_groups.pop(group, None)

    def of_parameter(self, slot: EngineSlot, parameter: Parameter) -> Parameter:
        """A parameter of a slot with the scalars that the slot is to have."""
        if slot.names in self._own:
            return replace(parameter, scalars=self._own[slot.names].scalars)
        return replace(parameter, scalars=self._settled(parameter.name, parameter.scalars, parameter.differing))

    def of_group(self, index: int, group: ParameterGroup) -> Mapping[str, Any]:
        """Hyper-parameters that a live group takes from one of the checkpoint's."""
        if index in self._own_groups:
            return self._own_groups[index].settings
        place = f"the parameter group of {self._names.source[group.names[0]]}"
        return self._settled(place, group.hyperparameters, group.differing)

    def of_joined(
        self, index: int, names: Mapping[int, str], held: Mapping[int, Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Numbers of which groups that become one live group have different ones, as pipeline stages may; if one may be made.

        Args:
            names: for each group the name of a parameter in it.
            held: its hyper-parameters.
        """
        settings = list(held.values())
        differing = {
            key: {f"the group of {names[group]}": values[key] for group, values in held.items()}
            for key, value in (settings[0] if settings else {}).items()
            if all(type(values.get(key)) in (int, float) for values in settings)
            and not all(values[key] == value for values in settings)
        }
        if not differing or self._how == "error":
            return {}
        made = self._settled(f"parameter group {index}", settings[0], differing)
        return {key: made[key] for key in differing}

    def together(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """Parameters of one slot with the same scalars, if one may be made of several; but for steps, which must be the same."""
        found = {parameter.name: parameter.scalars for parameter in parameters}
        differing = {
            key: {name: scalars[key] for name, scalars in found.items()}
            for key in parameters[0].scalars
            if key != "step" and all(key in scalars for scalars in found.values())
        }
        differing = {key: held for key, held in differing.items() if not all_same(list(held.values()))}
        if not differing or self._how == "error":
            return parameters
        values = self._settled(parameters[0].name, parameters[0].scalars, differing)
        return [
            replace(each, scalars={**each.scalars, **{key: values[key] for key in differing}}) for each in parameters
        ]

    def _settled(self, place: str, values: Mapping[str, Any], differing: Differing) -> Mapping[str, Any]:
        if not differing:
            return values
        found, refused = made_one(values, differing, self._how)
        for key, held in differing.items():
            told = f"{key!r} is {in_words(held)}"
            if told in self._told:  # of another parameter of the same slot
                continue
            self._told.add(told)
            if key in refused:
                self.problems.append(f"{place}: {told}; {DIFFERING_HINT}")
            else:
                self.merged.append(f"{place}: {told}; now {found[key]!r}")
        return found


def are_same(stage: int, optimizer: EngineOptimizer) -> bool:
    """Whether the numbers that the optimizer keeps are the same on all ranks of each pipeline stage. Collective."""
    digest = hashlib.sha256(repr(_numbers_of(optimizer)).encode()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (stage, digest))
    return len(set(found)) == len({stage for stage, _ in found})


def _numbers_of(optimizer: EngineOptimizer) -> list[Any]:
    """Of each group, by name as ranks may order groups of experts otherwise, its settings and its slots' numbers."""
    groups, left_out = optimizer.base.param_groups, {"params", *IMPLEMENTATION_SWITCHES}
    found: list[tuple[str, Any, list[Any]]] = [
        (
            str(group.get("name")),
            sorted((str(key), _plain(value)) for key, value in group.items() if key not in left_out),
            [],
        )
        for group in groups
    ]
    for slot in optimizer.slots():
        state = optimizer.state_of(slot).items()
        kept = [(str(key), _plain(value)) for key, value in state if is_number(key, value, slot.master)]
        found[min(slot.group, len(groups) - 1)][2].append(sorted(kept))
    return sorted(found, key=lambda each: each[0])


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value)
