"""Parameter groups of a ``torch_dist`` folder, which list no parameters: Megatron-Core's own rule tells whose they are.

It makes a group of the parameters with the same overrides, and one of those among them whose experts are spread over ranks
(``optimizer/__init__.py``, ``_get_param_groups``). Biases and vectors have ``wd_mult`` 0; all else that an override may change
is the training script's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, ParameterGroup
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import settings_in
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.safe_load import scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import Shape

logger = logging.getLogger("ucp_deepspeed")

NO_DECAY, OF_EXPERTS = "wd_mult", "is_expert_parallel"


@dataclass(frozen=True)
class StoredGroup:
    """A group as it is stored: hyper-parameters, and the steps that its parameters have taken; None if nothing counts them."""

    settings: Mapping[str, Any]
    step: float | None


def stored_groups(optimizer: Any, path: Path) -> list[StoredGroup]:
    """Return the groups in what was saved of an optimizer, or of several that are chained.

    Raises:
        DamagedCheckpointError: it has another form than Megatron-Core writes.
    """
    found: list[StoredGroup] = []
    for held in _chained(optimizer):
        inner = held.get("optimizer", held) if isinstance(held, Mapping) else held
        groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
            raise DamagedCheckpointError(f"{path} holds an optimizer without parameter groups; {REMEDY}")
        state = inner.get("state")
        shared = state.get("common_step") if isinstance(state, Mapping) else None
        for group in groups:
            settings = settings_in(group, path)
            step = settings.pop(GROUP_STEP, None)
            step = _number(shared if step is None else step, path)
            found.append(StoredGroup(settings, step))
    return found


def _chained(optimizer: Any) -> Iterator[Any]:
    numbered = isinstance(optimizer, Mapping) and bool(optimizer) and all(type(key) is int for key in optimizer)
    yield from (optimizer[key] for key in sorted(optimizer)) if numbered else [optimizer]


def _number(value: Any, path: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not (
        isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    ):
        raise DamagedCheckpointError(f"{path} counts steps in a {type(value).__name__}, which is no number; {REMEDY}")
    return scalar_of(value, path)


def assigned(
    groups: list[StoredGroup], trained: Mapping[str, Shape], path: Path
) -> tuple[tuple[ParameterGroup, ...], dict[str, float]]:
    """Give each parameter its group; return the groups with names, and the steps of each parameter.

    Hyper-parameters of groups that the rule doesn't tell apart are left out where they differ, with a warning.

    Args:
        trained: whole shapes of the trained parameters, by name.

    Raises:
        DamagedCheckpointError: no group is there for a parameter, or groups that aren't told apart count other steps.
    """
    spread = any(group.settings.get(OF_EXPERTS) for group in groups)
    held: dict[tuple[int, ...], list[str]] = {}
    for name, shape in trained.items():
        fitting = tuple(index for index, group in enumerate(groups) if _fits(group, name, shape, spread))
        if not fitting:
            raise DamagedCheckpointError(f"{path} has no parameter group for {name}; {REMEDY}")
        held.setdefault(fitting, []).append(name)
    found: list[ParameterGroup] = []
    steps: dict[str, float] = {}
    for fitting, names in sorted(held.items()):
        first, *others = [groups[index] for index in fitting]
        if any(other.step != first.step for other in others):
            raise DamagedCheckpointError(f"{path} counts different steps in groups of the same parameters; {REMEDY}")
        untold = {
            key
            for other in others
            for key in (*first.settings, *other.settings)
            if not same_value(first.settings.get(key), other.settings.get(key))
        }
        if untold:
            logger.warning(
                "%s has several groups that %d parameters (%s, …) may be in, and lists no names: their %s stay as configured",
                *(path, len(names), names[0], ", ".join(sorted(untold))),
            )
        settings = {key: value for key, value in first.settings.items() if key not in untold}
        found.append(ParameterGroup(tuple(names), settings))
        steps |= {} if first.step is None else dict.fromkeys(names, first.step)
    return tuple(found), steps


def _fits(group: StoredGroup, name: str, shape: Shape, spread: bool) -> bool:
    if NO_DECAY in group.settings and bool(group.settings[NO_DECAY]) != decays(name, shape):
        return False
    return not spread or bool(group.settings.get(OF_EXPERTS)) == (".experts." in name)


def decays(name: str, shape: Shape) -> bool:
    """Return whether Megatron-Core's rule gives a parameter weight decay."""
    return not (len(shape) == 1 or name.endswith(".bias"))
