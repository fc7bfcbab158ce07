"""The differences between the supported versions of DeepSpeed, looked up once.

Where a version lacks something, the functions here answer as if nothing of it were in use. So no other module asks for a
version, catches an `ImportError`, or looks whether an attribute is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.checkpoint import constants
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from packaging.version import Version

from ucp_deepspeed.engine.deepspeed_types import Engine

OLDEST_AUTOEP = "0.19.8"
"""First version whose AutoEP marks each tensor with the experts that it holds."""

OLDEST_MOE = "0.19.3"
"""First version whose files of models with DeepSpeed's own experts tell the names of parameters and buffers."""

SAVES_BF16_WITHOUT_ZERO = "0.18.5"
"""First version that saves the optimizer's state of bf16 where no ZeRO optimizer wraps it."""


_AUTOEP_LAYER: type | None = None
with suppress(ModuleNotFoundError):
    _AUTOEP_LAYER = import_module("deepspeed.module_inject.auto_ep_layer").AutoEPMoELayer
_DEALT = getattr(constants, "DS_AUTOEP_UC_META", None)


def autoep_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and modules of AutoEP's layers. Before 0.19.2 there is no AutoEP."""
    if _AUTOEP_LAYER is not None:
        yield from ((name, each) for name, each in module.named_modules() if isinstance(each, _AUTOEP_LAYER))


def autoep_marks_experts() -> bool:
    """Return whether `dealt_experts` can tell which experts a tensor of AutoEP holds."""
    return _DEALT is not None


def moe_files_have_names() -> bool:
    """Return whether ``_save_moe_checkpoint`` (``runtime/engine.py``) writes ``param_shapes`` and ``buffer_names``."""
    return Version(deepspeed.__version__) >= Version(OLDEST_MOE)


class DealtExperts(NamedTuple):
    """A tensor of experts that AutoEP has dealt out over ranks: the shape with all experts, and this rank's first expert."""

    shape: tuple[int, ...]
    first: int


def dealt_experts(tensor: torch.Tensor) -> DealtExperts | None:
    """Return what AutoEP has recorded on a tensor of experts; None for any other tensor."""
    told = getattr(tensor, _DEALT, None) if _DEALT is not None else None
    if told is None:
        return None
    return DealtExperts(
        tuple(told[constants.AUTOEP_PARAM_LOGICAL_SHAPE]), int(told[constants.AUTOEP_PARAM_LOCAL_EXPERTS][0])
    )


def uncut_by_autotp(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield weights and biases that AutoTP has left whole: it replaces each linear layer that it partitions with one of its own.

    Embeddings that it partitions stay embeddings, so they are left out here. From 0.19.7 on AutoTP records all that it does.
    """
    for each in module.modules():
        if type(each) is torch.nn.Linear:
            yield from each.parameters(recurse=False)


def loss_scale_of(wrapper: Any) -> Any:
    """Return the object on which ``FP16_Optimizer`` and ``FP16_UnfusedOptimizer`` keep their loss scale; None without one.

    In older versions that object is the optimizer itself, and ``FP16_UnfusedOptimizer`` scales the loss in bf16 too.
    """
    holder = getattr(wrapper, "loss_scale_config", wrapper)
    return holder if getattr(holder, "use_grad_scaling", True) else None


def saves_optimizer(engine: Engine) -> bool:
    """Return whether this version saves the optimizer's state of an engine.

    Before 0.18.5 ``_save_checkpoint`` (``runtime/engine.py``) took every bf16 engine for a ZeRO one, whose state is in other
    files, and ``_do_optimizer_sanity_check`` didn't handle ``BF16_Optimizer``.
    """
    wrapped = isinstance(engine.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)) and engine.bfloat16_enabled()
    return not wrapped or Version(deepspeed.__version__) >= Version(SAVES_BF16_WITHOUT_ZERO)
