"""Stage 0 in fp32: the torch optimizer itself, one slot per parameter. Source: ``runtime/engine.py::_configure_optimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import LossScale
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.loading.exchange import replica_group
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot
from ucp_deepspeed.layout import FlatGroup


class PlainOptimizer(EngineOptimizer):
    """The masters are the model's weights."""

    form = "plain"

    def __init__(self, engine: Engine) -> None:
        self._engine, self.base = engine, engine.optimizer
        self._names: Mapping[torch.Tensor, str] = ModelNames(engine).of_parameters

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        return [
            EngineSlot((self._names[param],), FlatGroup((param.numel(),), 1, alignment=1), 0, index, master=param)
            for index, group in enumerate(self.base.param_groups)
            for param in group["params"]
            if param in self._names and param.numel()
        ]

    def group_names(self) -> list[list[str | None]]:
        """See `EngineOptimizer.group_names`."""
        return [[self._names.get(param) for param in group["params"]] for group in self.base.param_groups]

    def replicas(self, slot: EngineSlot) -> Any:
        """See `EngineOptimizer.replicas`."""
        return replica_group(self._engine, slot.master)

    def refresh_weights(self) -> None:
        """Do nothing: the masters are the weights."""

    def loss_scale(self) -> LossScale | None:
        """Return None: fp32 isn't scaled."""
        return None

    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """Do nothing: fp32 isn't scaled."""
