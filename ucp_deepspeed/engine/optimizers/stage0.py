"""Stage 0: in fp32 the torch optimizer itself, in bf16 or fp16 ``FP16_UnfusedOptimizer`` or ``FP16_Optimizer``.

Source: ``runtime/fp16/unfused_optimizer.py``, ``runtime/fp16/fused_optimizer.py``. Both step once, with zero gradients, in their
constructor; filling replaces the state that this leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import SCALE_KEYS, LossScale
from ucp_deepspeed.engine.deepspeed_surface import loss_scale_of
from ucp_deepspeed.engine.deepspeed_types import Engine, Fp16, Fp16Fused, Fp16Unfused
from ucp_deepspeed.engine.exchange import replica_group
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot
from ucp_deepspeed.layout import FlatGroup


class Stage0Optimizer(EngineOptimizer):
    """The part that all classes share."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._params = {name: param for param, name in self._names.items()}

    def replicas(self, slot: EngineSlot) -> Any:
        """See `EngineOptimizer.replicas`; all parameters of a slot have the same."""
        return replica_group(self._engine, self._params[slot.names[0]])

    def _slot(self, params: Sequence[torch.Tensor], master: torch.Tensor, group: int) -> EngineSlot:
        names, numels = zip(*((self._names[param], param.numel()) for param in params), strict=True)
        return EngineSlot(names, FlatGroup(numels, 1, alignment=1), 0, group, master=master)


class PlainOptimizer(Stage0Optimizer):
    """fp32: the torch optimizer itself; the masters are the model's weights (``runtime/engine.py::_configure_optimizer``)."""

    form = "plain"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.base = engine.optimizer  # also where it wraps another

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        return [
            self._slot([param], param, index)
            for index, group in enumerate(self.base.param_groups)
            for param in group["params"]
            if param in self._names and param.numel()
        ]

    def group_names(self) -> list[list[str | None]]:
        """See `EngineOptimizer.group_names`."""
        return [[self._names.get(param) for param in group["params"]] for group in self.base.param_groups]


class Fp16Optimizer(Stage0Optimizer):
    """The part that the two 16-bit classes share."""

    _wrapper: Fp16

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._wrapper = engine.optimizer

    def group_names(self) -> list[list[str | None]]:
        """See `EngineOptimizer.group_names`."""
        return [[self._names[param] for param in group] for group in self._wrapper.fp16_groups]

    def loss_scale(self) -> LossScale | None:
        """See `EngineOptimizer.loss_scale`."""
        scale = loss_scale_of(self._wrapper)
        if scale is None:
            return None
        return LossScale(scale.dynamic_loss_scale, {key: getattr(scale, key, None) for key in SCALE_KEYS})

    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """See `EngineOptimizer.set_loss_scale`."""
        scale = loss_scale_of(self._wrapper)
        for key in SCALE_KEYS:
            if key in values:
                setattr(scale, key, values[key])


class UnfusedOptimizer(Fp16Optimizer):
    """``FP16_UnfusedOptimizer``: a master tensor per parameter."""

    form = "fp16-unfused"
    _wrapper: Fp16Unfused

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        groups = zip(self._wrapper.fp32_groups, self._wrapper.fp16_groups, strict=True)
        return [
            self._slot([param], master, group)
            for group, (masters, params) in enumerate(groups)
            for master, param in zip(masters, params, strict=True)
        ]

    def make_weights(self) -> None:
        """See `EngineOptimizer.make_weights`."""
        for masters, params in zip(self._wrapper.fp32_groups, self._wrapper.fp16_groups, strict=True):
            for master, param in zip(masters, params, strict=True):
                param.data.copy_(master.data)


class FusedOptimizer(Fp16Optimizer):
    """``FP16_Optimizer``: a flat, unpadded master buffer per parameter group; the weights are views of its 16-bit twin."""

    form = "fp16-fused"
    _wrapper: Fp16Fused

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        groups = zip(self._wrapper.fp32_groups_flat, self._wrapper.fp16_groups, strict=True)
        return [self._slot(params, master, group) for group, (master, params) in enumerate(groups)]

    def make_weights(self) -> None:
        """See `EngineOptimizer.make_weights`."""
        for master, weights in zip(self._wrapper.fp32_groups_flat, self._wrapper.fp16_groups_flat, strict=True):
            weights.data.copy_(master.data)
        for slot, params in zip(self.slots(), self._wrapper.fp16_groups, strict=True):
            for part, param in zip(slot.flattening.held_by(0), params, strict=True):
                held = slot.master.data[part.buffer_start : part.buffer_start + part.numel]
                param.data.copy_(held.view(param.shape))
