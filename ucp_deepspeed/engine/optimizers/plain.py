"""Stage 0 in fp32: the torch optimizer itself, one slot per parameter. Source: ``runtime/engine.py::_configure_optimizer``."""

from __future__ import annotations

from typing import Any

from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.exchange import replica_group
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot
from ucp_deepspeed.layout import FlatGroup


class PlainOptimizer(EngineOptimizer):
    """The masters are the model's weights."""

    form = "plain"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.base = engine.optimizer  # also where it wraps another

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
