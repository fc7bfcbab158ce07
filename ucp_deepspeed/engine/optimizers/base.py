"""The interface that every optimizer class offers to loading and saving.

A *slot* is one tensor that the base (torch) optimizer steps on, with the parameters in it; its counterpart on the source side
is `ucp_deepspeed.checkpoint.slots.Slot`. The base optimizer's state for a slot has that tensor as its key.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, LossScale
from ucp_deepspeed.checkpoint.slots import OFFLOAD_COPY
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.exchange import Held
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers.states import (
    counts_in_last_state,
    example_settings,
    example_states,
    kept_states,
    keys_after_load,
    place_of_steps,
)
from ucp_deepspeed.transfer.planning.numbers import UNTELLING
from ucp_deepspeed.transfer.planning.target import KeptStates, PlaceOfSteps, TargetSlot


@dataclass(frozen=True)
class EngineSlot(TargetSlot):
    """A tensor that the base optimizer steps on.

    Attributes:
        master: the fp32 master weights of this rank; contiguous, of any shape.
    """

    master: torch.Tensor = field(kw_only=True)


class EngineOptimizer(ABC):
    """An engine's optimizer, of one class. All methods are called on every rank, in the order in which they stand here.

    Attributes:
        form: the name that `DeepSpeedCheckpoint.optimizer_form` has for the files that this class writes.
        base: the torch optimizer.
    """

    form: str
    base: torch.optim.Optimizer

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._names: Mapping[torch.Tensor, str] = ModelNames(engine).of_parameters
        self._places: dict[int, PlaceOfSteps | None] = {}
        self._examples: dict[int, Mapping[str, Any]] = {}

    @abstractmethod
    def slots(self) -> list[EngineSlot]:
        """Return the slots of this rank."""

    @abstractmethod
    def group_names(self) -> list[list[str | None]]:
        """Return the names in each parameter group, in the optimizer's order; None for a parameter that isn't the model's."""

    def begin(self) -> None:
        """Prepare; called before anything is filled."""

    def own_weights(self) -> Sequence[tuple[Held, Any]]:
        """Make this rank's partitions of the weights from its masters. Called when these are filled, and the optimizer's states
        aren't yet.

        Returns:
            What ranks may send one another meanwhile, with their process groups.
        """
        return ()

    def make_weights(self) -> None:
        """Make the (low-precision) weights that the rank makes alone from the masters, unless they are one. Called when replicas
        have all masters."""

    def send_weights(self) -> None:
        """Give the other ranks the weights that they haven't got yet. Collective."""

    def end(self) -> None:
        """Finish; called after frozen parameters and buffers are filled too. Collective."""

    def loss_scale(self) -> LossScale | None:
        """Return the live loss scale; None without fp16."""
        return None

    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """Take over values of a loss scale of the same kind, under the names of `LossScale`."""

    def state_of(self, slot: EngineSlot) -> Mapping[str, Any]:
        """Return the base optimizer's state for a slot as it is now; empty before the first step."""
        held = self.base.state.get(slot.master, {})
        return {key: value for key, value in held.items() if not str(key).endswith(OFFLOAD_COPY)}

    def live_group(self, index: int) -> dict[str, Any]:
        """Return a parameter group of the base optimizer. ZeRO makes torch's Adagrad anew, with one group for all parameters
        (``runtime/zero/stage_1_and_2.py::initialize_optimizer_states``)."""
        groups: list[dict[str, Any]] = self.base.param_groups
        return groups[min(index, len(groups) - 1)]

    def place_of_steps(self, index: int) -> PlaceOfSteps | None:
        """Return where the base optimizer counts the steps of a parameter group; see `KeptStates.steps`."""
        if index not in self._places:
            masters = [slot.master for slot in self.slots() if slot.group == index]
            place = place_of_steps(self.base, self.live_group(index), masters[0]) if masters else None
            # ZeRO-3 steps on one tensor after another, each alone in its group.
            together = len(masters) > 1 and self._engine.zero_optimization_stage() == 0
            self._places[index] = "last state" if together and counts_in_last_state(self.base) else place
        return self._places[index]

    def finds_steps(self, index: int, saved: Mapping[str, Any]) -> bool:
        """Return whether steps stay where the optimizer counts them, if a saved group and its states are put in place of the live
        ones."""
        place = self.place_of_steps(index)
        if place == "group":
            return bool(saved.get(GROUP_STEP))
        return place is None or GROUP_STEP not in saved or counts_in_last_state(self.base)

    def has_keys(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether saved groups, put in place of the live ones, have every key that these have."""
        pairs = zip(self.base.param_groups, groups, strict=False)
        return all(live.keys() - UNTELLING <= set(keys_after_load(self.base, saved)) for live, saved in pairs)

    def set_settings(self, index: int, values: Mapping[str, Any]) -> None:
        """Put hyper-parameters in a live group, each in the form in which the optimizer keeps it."""
        live = self.base.param_groups[index]
        master = next((slot.master for slot in self.slots() if slot.group == index), None)
        forms = {} if master is None else example_settings(self.base, live, master)
        for key, value in values.items():
            kept = live.get(key)
            form = kept if isinstance(kept, torch.Tensor) else forms.get(key)
            if not isinstance(form, torch.Tensor):
                live[key] = copy.deepcopy(value)  # the optimizer may change what it gets
                continue
            found = torch.as_tensor(value, dtype=form.dtype, device=form.device)  # such as a rate on the device
            if kept is form and (found.numel() == kept.numel() == 1 or found.shape == kept.shape):
                with torch.no_grad():
                    kept.copy_(found.view(kept.shape))
            else:
                live[key] = found.clone().view(form.shape) if found.numel() == form.numel() == 1 else found.clone()

    def is_like(self, index: int, saved: Mapping[str, Any]) -> bool:
        """Return whether a saved group has the very keys of a live one. Then states that the optimizer lacks now may be made at a
        later step, and aren't a contradiction."""
        return bool(saved) and self.live_group(index).keys() - UNTELLING == set(saved) - UNTELLING

    def replicas(self, slot: EngineSlot) -> Any:
        """Return the process group of the ranks that hold all of a slot as this one does; None for a slot that is partitioned
        over ranks."""
        return None

    def state_buffer(self, slot: EngineSlot, state: str) -> torch.Tensor:
        """Return a tensor to fill with an element-wise state and to give to `set_state`: the live one, or one of undefined
        values."""
        live, master = self.state_of(slot).get(state), slot.master.data
        dtype = live.dtype if isinstance(live, torch.Tensor) else self._dtype_of(slot, state)
        if (
            isinstance(live, torch.Tensor)
            and (live.shape, live.device) == (master.shape, master.device)
            and live.is_contiguous()
        ):
            return live
        return _empty_like(master, dtype)

    def _dtype_of(self, slot: EngineSlot, state: str) -> torch.dtype:
        """Return the dtype in which the base optimizer makes a state; the master's if that can't be told."""
        if slot.group not in self._examples:
            self._examples[slot.group] = example_states(self.base, self.live_group(slot.group), slot.master, {}) or {}
        made = self._examples[slot.group].get(state)
        return made.dtype if isinstance(made, torch.Tensor) else slot.master.dtype

    def set_state(self, slot: EngineSlot, states: Mapping[str, torch.Tensor], scalars: Mapping[str, float]) -> None:
        """Replace the base optimizer's state for a slot; without states and scalars, as if no step had been taken."""
        if not (states or scalars):
            self.reset_state(slot)
            return
        group = self.live_group(slot.group)
        like = self.state_of(slot) or example_states(self.base, group, slot.master, {}) or {}
        numbers = {key: _in_form_of(like.get(key), value) for key, value in scalars.items()}
        self.base.state[slot.master] = {**states, **numbers}

    def reset_state(self, slot: EngineSlot) -> None:
        """Make the base optimizer's state for a slot what it is before a first step."""
        self.base.state.pop(slot.master, None)
        if isinstance(self.base, torch.optim.Adagrad):  # its constructor makes the state
            total = torch.full_like(slot.master.data, self.live_group(slot.group)["initial_accumulator_value"])
            self.base.state[slot.master] = {"step": torch.tensor(0.0, device="cpu"), "sum": total}

    def kept_states(self, slot: EngineSlot, settings: Mapping[str, Any]) -> KeptStates | None:
        """Return the states that the base optimizer keeps for a slot once it has stepped; None when that can't be told.

        Args:
            settings: hyper-parameters that the slot's group will have in place of its own.
        """
        group = self.live_group(slot.group)
        changes = {
            key: torch.full_like(group[key], value)
            if isinstance(group[key], torch.Tensor) and _is_number(value)
            else value
            for key, value in settings.items()
            if key in group
        }
        probed = example_states(self.base, group, slot.master, changes)
        found = probed if changes else (self.state_of(slot) or probed)
        if found is None:
            return None
        return replace(kept_states(found, probed or {}, slot.master), steps=self.place_of_steps(slot.group))


def _empty_like(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor of the master's shape. numpy asks the system for large pages, with which a first pass takes half the
    time."""
    if master.device.type != "cpu":
        return torch.empty_like(master, dtype=dtype, memory_format=torch.contiguous_format)
    raw = np.empty(master.numel() * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(master.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _in_form_of(example: Any, value: float) -> Any:
    """Return a scalar state as the optimizer keeps it: torch's classes keep tensors, DeepSpeed's own keep numbers."""
    if isinstance(example, torch.Tensor):
        return torch.full_like(example, value)
    return int(value) if type(value) is float and value.is_integer() and type(example) is not float else value
