"""Parameters that only the optimizer has, and no module, such as a learned weight of a loss. DeepSpeed takes them only without
ZeRO.

DeepSpeed's files hold their states, and at best hold their values in a master without a name. So saving adds the values
under `VALUES_KEY`, by names of their own (`ucp_deepspeed.language.naming.OPTIMIZER_ONLY`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from ucp_deepspeed.checkpoint.deepspeed.files import VALUES_KEY
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.language.name_spaces import ModuleName
from ucp_deepspeed.language.naming import optimizer_only_name


def optimizer_only(engine: Engine) -> dict[torch.Tensor, ModuleName]:
    """Return this rank's such parameters and their names; a pipeline's later stages count their own."""
    found: dict[torch.Tensor, ModuleName] = {}
    number = getattr(engine, "stage_id", 0)  # only a pipeline's engine has a stage
    stage = f".stage{number}" if number else ""
    for group, params in enumerate(_groups(engine.optimizer)):
        own = [param for param in params if param not in engine.param_names]
        found |= {param: ModuleName(optimizer_only_name(group, index) + stage) for index, param in enumerate(own)}
    return found


def _groups(optimizer: Any) -> Sequence[Sequence[torch.Tensor]]:
    """Return the tensors that an optimizer steps on, as the model has them."""
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        groups: Sequence[Sequence[torch.Tensor]] = optimizer.fp16_groups
        return groups
    if isinstance(optimizer, torch.optim.Optimizer):
        return [group["params"] for group in optimizer.param_groups]
    return []  # ZeRO's classes fail on them


def values_to_save(engine: Engine) -> dict[str, Any]:
    """Return the entry that is added to the client state; empty where there are no such parameters."""
    values = {name: param.detach() for param, name in optimizer_only(engine).items()}
    return {VALUES_KEY: values} if values else {}


def take_values(engine: Engine, state: dict[str, Any] | None) -> None:
    """Take the values out of a client state that DeepSpeed has loaded, and put them into the engine."""
    values: Mapping[str, torch.Tensor] = (state or {}).pop(VALUES_KEY, {})
    with torch.no_grad():
        for param, name in optimizer_only(engine).items():
            if name in values:
                param.copy_(values[name])
