"""Compare the numbers that a live optimizer keeps over all ranks. If they are the same, a manifest records it, and no load
compares them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES
from ucp_deepspeed.engine.agreement import gathered
from ucp_deepspeed.engine.optimizers import EngineOptimizer
from ucp_deepspeed.engine.optimizers.states import is_number


def are_same(stage: int, optimizer: EngineOptimizer) -> bool:
    """Return whether the numbers that the optimizer keeps are the same on all ranks of each pipeline stage. Collective."""
    digest = hashlib.sha256(repr(_numbers_of(optimizer)).encode()).hexdigest()
    found = gathered((stage, digest))
    return len(set(found)) == len({stage for stage, _ in found})


def _numbers_of(optimizer: EngineOptimizer) -> list[Any]:
    """Return each group's settings and its slots' numbers, sorted by name: ranks may order groups of experts differently."""
    groups, left_out = optimizer.base.param_groups, {"params", *IMPLEMENTATION_SWITCHES}
    found: list[tuple[str, Any, list[Any]]] = [
        (
            str(group.get("name")),
            sorted((str(key), _plain(value)) for key, value in group.items() if key not in left_out),
            [],
        )
        for group in groups
    ]
    for slot in optimizer.slots():
        state = optimizer.state_of(slot).items()
        kept = [(str(key), _plain(value)) for key, value in state if is_number(key, value, slot.master)]
        found[min(slot.group, len(groups) - 1)][2].append(sorted(kept))
    return sorted(found, key=lambda each: each[0])


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value)
