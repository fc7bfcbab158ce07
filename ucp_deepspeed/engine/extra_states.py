"""Restore extra states: what modules keep beside parameters and buffers (torch's ``get_extra_state`` and ``set_extra_state``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ucp_deepspeed.checkpoint.extra_states import shared_extra_states, under_other_keys
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.transfer.planning.pairing import Pair

ExtraStates = tuple[tuple[Module, Any], ...]
"""Modules, each with the value for its ``set_extra_state``."""


STRICT_HINT = "load_module_strict=False takes what both have, and leaves the rest as it is"


def plan_extra_states(pair: Pair, module: Module, model: EngineModel) -> ExtraStates:
    """Pair the modules of this rank with their extra states in the checkpoint.

    If the tensor-parallel size is unchanged, each rank takes its own. Otherwise only an extra state that was the same on all
    ranks has a meaning. An extra state that one side lacks, or that can't be shared, is an obstacle unless a policy allows it.
    """
    policies, before = pair.policies, len(pair.obstacles)
    found, degree = _under_live_keys(pair, module), model.topology.tp
    shared, differing = shared_extra_states(found)
    if len(found) == degree:
        shared, differing = found[model.rank % degree], ()
    live = _modules(module)
    lacking = not (policies.initialise or not policies.strict)
    surplus = not (policies.drop or not policies.strict)
    for key in live if lacking else ():
        if key not in (*shared, *differing):
            pair.obstacles.add(key, "missing in the checkpoint")
    for key in differing if surplus else ():
        pair.obstacles.add(
            key,
            f"differs over the {len(found)} tensor-parallel ranks that saved: on as many each gets its own back, "
            f'"on_extra": "drop" leaves it out',
        )
    for key in (
        shared if surplus and model.topology.pp == 1 else ()
    ):  # a stage has no modules for the others' extra states
        if not _is_live(key, module):
            pair.obstacles.add(key, "extra in the checkpoint")
    if len(pair.obstacles) > before and not pair.obstacles.remedies:  # other names of modules make other keys here
        pair.obstacles.add_remedy(STRICT_HINT)
    return tuple((module.get_submodule(_owner(key)), shared[key]) for key in shared if _is_live(key, module))


def _under_live_keys(pair: Pair, module: Module) -> tuple[dict[str, Any], ...]:
    live = {logical: name for name, logical in pair.names.target.items()}
    pairs = {name: live[logical] for name, logical in pair.names.source.items() if logical in live}
    keys = [f"{name}._extra_state".lstrip(".") for name, part in module.named_modules() if _restores(part)]
    return under_other_keys(pair.checkpoint.extra_states(), pairs, keys)


def has_extra_states(module: Module) -> bool:
    """Return whether a module's ``state_dict`` holds an extra state that isn't None."""
    keeping = (part for part in module.modules() if type(part).get_extra_state is not Module.get_extra_state)
    return any(part.get_extra_state() is not None for part in keeping)


def _modules(module: Module) -> Mapping[str, Module]:
    """Return the modules that have something to restore, by key of the ``state_dict``."""
    own = {f"{name}._extra_state".lstrip("."): part for name, part in module.named_modules() if _restores(part)}
    return {key: part for key, part in own.items() if part.get_extra_state() is not None}


def _restores(module: Module) -> bool:
    return type(module).set_extra_state is not Module.set_extra_state


def _is_live(key: str, module: Module) -> bool:
    try:
        return _restores(module.get_submodule(_owner(key)))
    except AttributeError:
        return False


def _owner(key: str) -> str:
    return key.rpartition(".")[0]
