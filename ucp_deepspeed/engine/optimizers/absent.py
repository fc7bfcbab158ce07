"""Engines that were built without an optimizer, to evaluate: all that they have counts as frozen."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

from ucp_deepspeed.checkpoint.checkpoint import LossScale
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot


def only_evaluates(engine: Engine) -> bool:
    """Whether an engine was built without an optimizer.

    In its place DeepSpeed has an object of another kind under ZeRO-3, and one that steps on nothing in bf16.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return not optimizer.using_real_optimizer
    return optimizer is None or isinstance(optimizer, DeepSpeedZeRoOffload)


class AbsentOptimizer(EngineOptimizer):
    """Steps on nothing, and keeps nothing; filling ends with the weights."""

    form = "none"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.base = cast(torch.optim.Optimizer, SimpleNamespace(param_groups=[], state={}))

    def slots(self) -> list[EngineSlot]:
        """None."""
        return []

    def group_names(self) -> list[list[str | None]]:
        """None."""
        return []

    def begin(self) -> None:
        """Under ZeRO-3 partition what is gathered, so that no stale whole copy outlives the filling."""
        if isinstance(self._engine.optimizer, DeepSpeedZeRoOffload):
            self._engine.optimizer.partition_all_parameters()

    def refresh_weights(self) -> None:
        """Nothing to do: there are no masters."""

    def end(self) -> None:
        """Under ZeRO-3 drop secondary copies, and gather persistent parameters again."""
        if isinstance(self._engine.optimizer, DeepSpeedZeRoOffload):
            for param in self._engine.module.parameters():
                param.ds_secondary_tensor = None
            if persistent := self._engine.optimizer.persistent_parameters:
                persistent[0].all_gather(persistent)

    def loss_scale(self) -> LossScale | None:
        """None."""
        return None

    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """Nothing to do."""
