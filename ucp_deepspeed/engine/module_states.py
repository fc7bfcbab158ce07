"""Restore extra states: what modules keep beside parameters and buffers (torch's ``get_extra_state`` and ``set_extra_state``)."""

from __future__ import annotations

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
    policies, before, degree = pair.policies, len(pair.obstacles), model.topology.tp
    live = {logical: name for name, logical in pair.names.target.items()}
    pairs = {name: live[logical] for name, logical in pair.names.source.items() if logical in live}
    restoring, under_first_name = _restoring(module, remove_duplicate=False), _restoring(module)
    found = under_other_keys(pair.checkpoint.extra_states(), pairs, under_first_name.keys())
    shared, differing = shared_extra_states(found)
    if len(found) == degree:
        shared, differing = found[model.rank % degree], ()
    if policies.strict and not policies.initialise:
        for key, part in under_first_name.items():
            if key not in (*shared, *differing) and part.get_extra_state() is not None:
                pair.obstacles.add(key, "missing in the checkpoint")
    if policies.strict and not policies.drop:
        for key in differing:
            pair.obstacles.add(
                key,
                f"differs over the {len(found)} tensor-parallel ranks that saved: on as many each gets its own back, "
                f'"on_extra": "drop" leaves it out',
            )
        for key in shared if model.topology.pp == 1 else ():  # a stage has no modules for the others' extra states
            if key not in restoring:
                pair.obstacles.add(key, "extra in the checkpoint")
    if len(pair.obstacles) > before and not pair.obstacles.remedies:  # other names of modules make other keys here
        pair.obstacles.add_remedy(STRICT_HINT)
    return tuple((restoring[key], value) for key, value in shared.items() if key in restoring)


def _restoring(module: Module, remove_duplicate: bool = True) -> dict[str, Module]:
    """Return the modules that take an extra state, by key of the ``state_dict``."""
    return {
        f"{name}._extra_state".lstrip("."): part
        for name, part in module.named_modules(remove_duplicate=remove_duplicate)
        if type(part).set_extra_state is not Module.set_extra_state
    }


def has_extra_states(module: Module) -> bool:
    """Return whether a module's ``state_dict`` holds an extra state that isn't None."""
    keeping = (part for part in module.modules() if type(part).get_extra_state is not Module.get_extra_state)
    return any(part.get_extra_state() is not None for part in keeping)
