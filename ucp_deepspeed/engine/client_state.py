"""The client state: values of the user's own that are saved beside DeepSpeed's state.

DeepSpeed writes both into one dictionary, where the user's entries replace its own
(``runtime/engine.py::_save_checkpoint``), and resumes from it. Of parameters that only the optimizer has, DeepSpeed's files hold
the states, and at best a master without a name. So saving adds their values, by name, under `VALUES_KEY`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO

from ucp_deepspeed.checkpoint.deepspeed.files import ENGINE_KEYS
from ucp_deepspeed.checkpoint.deepspeed.written_names import VALUES_KEY
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.names import optimizer_only
from ucp_deepspeed.errors import SaveError

logger = logging.getLogger("ucp_deepspeed")

COUNTERS = ("global_steps", "skipped_steps", "dp_world_size", "mp_world_size", "data_sampler", "random_ltd")
"""Keys of the run's progress, which a load takes over and doesn't return."""

RESUMED = frozenset((*COUNTERS, "module", "optimizer", "lr_scheduler"))
"""The keys that a load takes over."""


ADDED = "_universal_checkpoint_added"
"""Attribute of an engine: keys of the client state → functions that give their values when it is saved."""

LOADED = "universal_checkpoint_client_state"
"""Attribute of an engine: the client state that its last load returned."""


def add_to_client_state(engine: Engine, key: str, value: Callable[[], Any]) -> None:
    """Save a value with every client state of an engine, as the function gives it on each rank when a save begins; a load finds
    it there, under `LOADED` too. The function of another call with the same key takes its place."""
    vars(engine).setdefault(ADDED, {})[key] = value


def to_be_saved(engine: Engine, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a client state without the engine's keys, and with the values that DeepSpeed leaves out.

    A script that saves what its load returned gives the engine some of its own keys back, with old values. The current values
    are saved instead.

    Raises:
        SaveError: the client state has keys that the next resume would use; names all of them.
    """
    live = {key: getattr(engine, key) for key in ("global_steps", "skipped_steps", "mp_world_size")}
    live["dp_world_size"] = engine.seq_dp_world_size
    given = client_state.keys() & ENGINE_KEYS
    wrong = sorted(key for key in given & RESUMED if key not in live or client_state[key] != live[key])
    if wrong:
        raise SaveError(
            f"the client state has keys of DeepSpeed's, which would take the place of what the run resumes from: "
            f"{', '.join(wrong)}; nothing was saved; give them other names, or leave them out"
        )
    old = {key for key in given if not _is_users(engine, key, client_state[key])}
    if old:
        logger.debug(
            "of the client state the engine's own entries are saved as they are now: %s", ", ".join(sorted(old))
        )
    values = {name: param.detach() for param, name in optimizer_only(engine).items()}
    kept = {key: value for key, value in client_state.items() if key not in old}
    kept |= {key: value() for key, value in vars(engine).get(ADDED, {}).items()}
    return kept | {VALUES_KEY: values} if values else kept


def _is_users(engine: Engine, key: str, value: Any) -> bool:
    """Return whether an entry under one of DeepSpeed's keys may be the user's own: Megatron-DeepSpeed keeps its layouts under one
    where AutoTP doesn't, and a script may keep the path of its config. Models of Megatron-DeepSpeed have a method of that name,
    which DeepSpeed would save in place of AutoTP's layouts."""
    if key == UNIVERSAL_CHECKPOINT_INFO:
        return not isinstance(getattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, None), Mapping)
    return key == "ds_config" and not isinstance(value, Mapping)


def take_values(engine: Engine, state: dict[str, Any] | None) -> None:
    """Take the values that `to_be_saved` adds out of a client state that DeepSpeed has loaded, and put them into the engine."""
    values: Mapping[str, torch.Tensor] = (state or {}).pop(VALUES_KEY, {})
    with torch.no_grad():
        for param, name in optimizer_only(engine).items():
            if name in values:
                param.copy_(values[name])
