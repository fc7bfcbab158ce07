"""Trainers whose engine has the block on, and the calls that are wrapped."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ucp_deepspeed.integrations import is_on

Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]
Wrapped: TypeAlias = Callable[..., Any]

STATE_NAME = "trainer_state.json"
"""Name of the file with Trainer's own state."""


def trainer_is_on(trainer: Any) -> bool:
    """Return whether a Trainer's engine has the block on, or will have it."""
    if (engine := getattr(trainer, "deepspeed", None)) is not None:
        return is_on(engine)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    from ucp_deepspeed.config import parse_config

    return parse_config(plugin.hf_ds_config.config).enabled


def given(wrapped: Wrapped, args: Iterable[Any], kwargs: Keywords) -> dict[str, Any]:
    """Return the arguments of a call by name, also those that are left at their defaults."""
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def is_first() -> bool:
    """Return whether this process is the one that logs what all ranks see alike."""
    return os.environ.get("RANK", "0") == "0"
