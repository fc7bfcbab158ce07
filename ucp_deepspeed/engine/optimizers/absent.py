"""Engines that were built without an optimizer, to evaluate: all their parameters count as frozen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot


def only_evaluates(engine: Engine) -> bool:
    """Return whether an engine was built without an optimizer.

    In its place DeepSpeed has an object of another kind under ZeRO-3, and in bf16 one that steps on nothing.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return not optimizer.using_real_optimizer
    return optimizer is None or isinstance(optimizer, DeepSpeedZeRoOffload)


class AbsentOptimizer(EngineOptimizer):
    """An optimizer that steps on nothing and keeps nothing; filling ends with the weights."""

    form = "none"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.base = cast(torch.optim.Optimizer, SimpleNamespace(param_groups=[], state={}))

    def slots(self) -> list[EngineSlot]:
        """Return no slots."""
        return []

    def group_names(self) -> list[list[str | None]]:
        """Return no groups."""
        return []

    def begin(self) -> None:
        """Partition gathered parameters under ZeRO-3, so that no stale whole copy outlives the filling."""
        if isinstance(self._engine.optimizer, DeepSpeedZeRoOffload):
            self._engine.optimizer.partition_all_parameters()

    def end(self) -> None:
        """Drop secondary copies under ZeRO-3, and gather persistent parameters again."""
        if isinstance(self._engine.optimizer, DeepSpeedZeRoOffload):
            for param in self._engine.module.parameters():
                param.ds_secondary_tensor = None
            if persistent := self._engine.optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)
