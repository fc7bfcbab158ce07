"""What differs in DeepSpeed from one supported version to the next, looked up once.

What a version lacks is answered here as if nothing of it were in use, so that no other module asks for a version, catches an
`ImportError`, or looks whether an attribute is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import constants

OLDEST_AUTOEP = "0.19.8"
"""First version whose AutoEP marks each tensor with the experts that it holds."""


def _class_of(module: str, name: str) -> type | None:
    """A class of DeepSpeed's; None if this version lacks its module."""
    try:
        found: type = getattr(import_module(module), name)
    except ModuleNotFoundError:
        return None
    return found


_AUTOEP_LAYER = _class_of("deepspeed.module_inject.auto_ep_layer", "AutoEPMoELayer")
_DEALT = getattr(constants, "DS_AUTOEP_UC_META", None)


def autoep_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of AutoEP's layers. Before 0.19.4 there is no AutoEP."""
    if _AUTOEP_LAYER is not None:
        yield from ((name, each) for name, each in module.named_modules() if isinstance(each, _AUTOEP_LAYER))


def autoep_marks_experts() -> bool:
    """Whether `dealt_experts` can tell which experts a tensor of AutoEP holds."""
    return _DEALT is not None


class DealtExperts(NamedTuple):
    """A tensor of which AutoEP has given each rank some: the shape with all experts, and this rank's first expert."""

    shape: tuple[int, ...]
    first: int


def dealt_experts(tensor: torch.Tensor) -> DealtExperts | None:
    """What AutoEP has written on a tensor of experts; None for any other."""
    told = getattr(tensor, _DEALT, None) if _DEALT is not None else None
    if told is None:
        return None
    return DealtExperts(
        tuple(told[constants.AUTOEP_PARAM_LOGICAL_SHAPE]), int(told[constants.AUTOEP_PARAM_LOCAL_EXPERTS][0])
    )


def loss_scale_of(wrapper: Any) -> Any:
    """The object on which ``FP16_Optimizer`` and ``FP16_UnfusedOptimizer`` keep their loss scale; None without one.

    At first it is the optimizer itself, and ``FP16_UnfusedOptimizer`` scales the loss in bf16 too.
    """
    holder = getattr(wrapper, "loss_scale_config", wrapper)
    return holder if getattr(holder, "use_grad_scaling", True) else None
