"""What every optimizer class offers to loading and saving.

A *slot* is one tensor that the base (torch) optimizer steps on, with the parameters in it; the source side's twin is
`ucp_deepspeed.checkpoint.slots.Slot`. The base optimizer's state for a slot has that tensor as its key.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import LossScale
from ucp_deepspeed.layout import Flattening
from ucp_deepspeed.plan import Fragment

DEEPSPEED_ADAMS = ("FusedAdam", "DeepSpeedCPUAdam")
"""Classes whose compiled step can't be tried on a copy."""


@dataclass(frozen=True)
class EngineSlot:
    """One tensor that the base optimizer steps on.

    Attributes:
        master: the fp32 master weights of this rank; contiguous, of any shape.
        names: the parameters in it, in buffer order.
        flattening: where their elements lie in the masters of all partitions.
        partition: which partition this rank holds.
        group: index of the parameter group.
    """

    master: torch.Tensor
    names: tuple[str, ...]
    flattening: Flattening
    partition: int
    group: int

    def fragments(self) -> Iterator[tuple[str, Fragment[None]]]:
        """For each run of elements that this rank holds: the parameter's name, and where it lies in ``master``."""
        for part in self.flattening.held_by(self.partition):
            yield self.names[part.index], Fragment(part.local_start, part.numel, None, part.buffer_start)


class EngineOptimizer(ABC):
    """An engine's optimizer, of one class. All methods are called on every rank, in the order in which they stand here.

    Attributes:
        form: as `DeepSpeedCheckpoint.optimizer_form` calls the files that this class writes.
        base: the torch optimizer.
    """

    form: str
    base: torch.optim.Optimizer

    @abstractmethod
    def __init__(self, engine: Any) -> None: ...

    @abstractmethod
    def slots(self) -> list[EngineSlot]:
        """The slots of this rank."""

    @abstractmethod
    def group_names(self) -> list[list[str | None]]:
        """For each parameter group the names, in the optimizer's order; None for a parameter that isn't the model's."""

    def begin(self) -> None:
        """Called before anything is filled."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Make the model's (low-precision) weights from the masters. Collective."""

    def end(self) -> None:
        """Called after frozen parameters and buffers are filled too. Collective."""

    @abstractmethod
    def loss_scale(self) -> LossScale | None:
        """The live loss scale; None without fp16."""

    @abstractmethod
    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """Take over values of a loss scale of the same kind, under the names of `LossScale`."""

    def state_of(self, slot: EngineSlot) -> Mapping[str, Any]:
        """The base optimizer's state for a slot as it is now; empty before the first step."""
        state: Mapping[str, Any] = self.base.state.get(slot.master, {})
        return state

    def set_state(self, slot: EngineSlot, states: Mapping[str, torch.Tensor], scalars: Mapping[str, float]) -> None:
        """Replace the base optimizer's state for a slot; without states and scalars, as if no step had been taken."""
        like = self._examples(slot) or {}
        self.base.state.pop(slot.master, None)
        if states or scalars:
            self.base.state[slot.master] = dict(states) | {
                key: _in_form_of(like.get(key), value) for key, value in scalars.items()
            }

    def reset_state(self, slot: EngineSlot) -> None:
        """Make the base optimizer's state for a slot what it is before a first step."""
        self.base.state.pop(slot.master, None)
        if isinstance(self.base, torch.optim.Adagrad):  # whose constructor makes the state
            initial = self.base.param_groups[slot.group]["initial_accumulator_value"]
            self.base.state[slot.master] = {
                "step": torch.tensor(0.0),
                "sum": torch.full_like(slot.master.data, initial),
            }

    def state_names(self, slot: EngineSlot) -> frozenset[str] | None:
        """Element-wise states that the base optimizer keeps for a slot once it has stepped; None when that can't be told."""
        found = self._examples(slot)
        if found is None:
            return None
        return frozenset(key for key, value in found.items() if isinstance(value, torch.Tensor) and value.ndim > 0)

    def _examples(self, slot: EngineSlot) -> Mapping[str, Any] | None:
        """Values, of any number, in the form in which the base optimizer keeps them for a slot; None when that can't be told."""
        if live := self.state_of(slot):
            return live
        if type(self.base).__name__ in DEEPSPEED_ADAMS:
            return {"step": 0} | dict.fromkeys(("exp_avg", "exp_avg_sq"), slot.master)
        return self._probed_state(slot)

    def _probed_state(self, slot: EngineSlot) -> Mapping[str, Any] | None:
        """What a copy of the base optimizer keeps after a step on a scratch tensor; torch's make their states then."""
        scratch = torch.zeros((2,) * slot.master.ndim, device=slot.master.device, requires_grad=True)
        scratch.grad = torch.zeros_like(scratch)
        try:
            probe = copy.copy(self.base)
            probe.state = defaultdict(dict)
            probe.param_groups = [{**self.base.param_groups[slot.group], "params": [scratch]}]
            probe.step()
        except Exception:  # a user's own class may raise anything; then the states are taken as they are
            return None
        return probe.state[scratch]


def _in_form_of(example: Any, value: float) -> Any:
    """A scalar state as the optimizer keeps it: torch's classes do so in tensors, DeepSpeed's own in numbers."""
    if isinstance(example, torch.Tensor):
        return torch.full_like(example, value)
    return int(value) if type(value) is float and value.is_integer() and type(example) is not float else value
