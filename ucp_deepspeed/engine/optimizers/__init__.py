"""A module per family of DeepSpeed's optimizer classes; `engine_optimizer` picks by the live optimizer's class."""

from __future__ import annotations

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.optimizers.absent import AbsentOptimizer, only_evaluates
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.stage0 import FusedOptimizer, PlainOptimizer, UnfusedOptimizer
from ucp_deepspeed.engine.optimizers.zero3 import Zero3Optimizer
from ucp_deepspeed.engine.optimizers.zero12 import Bf16Optimizer, Zero12Optimizer
from ucp_deepspeed.errors import UnsupportedError

FAMILIES: dict[type, type[EngineOptimizer]] = {
    DeepSpeedZeroOptimizer: Zero12Optimizer,
    DeepSpeedZeroOptimizer_Stage3: Zero3Optimizer,
    BF16_Optimizer: Bf16Optimizer,
    FP16_Optimizer: FusedOptimizer,
    FP16_UnfusedOptimizer: UnfusedOptimizer,
}
"""Exact classes: a subclass may keep its state elsewhere."""


def engine_optimizer(engine: Engine) -> EngineOptimizer:
    """Return the family of an engine's optimizer.

    Raises:
        UnsupportedError: the optimizer is of an unknown class, or its tensors lie on NVMe.
    """
    optimizer = engine.optimizer
    if only_evaluates(engine):
        return AbsentOptimizer(engine)
    if type(optimizer) in FAMILIES:
        return FAMILIES[type(optimizer)](engine)
    if isinstance(optimizer, torch.optim.Optimizer):
        return PlainOptimizer(engine)
    raise UnsupportedError(f"optimizer class {type(optimizer).__name__} is not supported by this release")


def is_offloaded(engine: Engine) -> bool:
    """Return whether ``engine.offload_states`` has moved tensors away. ZeRO then lacks some that a load fills."""
    return bool(getattr(engine.optimizer, "offloaded_states", ()))


__all__ = ["EngineOptimizer", "EngineSlot", "engine_optimizer", "is_offloaded", "only_evaluates"]
