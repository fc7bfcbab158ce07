"""The states that a torch optimizer keeps, and their form, before it has made them.

DeepSpeed's own classes are listed. For others, a copy of the optimizer takes a step on a scratch tensor.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import MOMENTUM
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import is_number_in_tensor
from ucp_deepspeed.transfer.planning.target import KeptStates, PlaceOfSteps

_COMPILED_STATES: Mapping[str, tuple[str, ...]] = {
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
    "DeepSpeedCPUAdam": ("exp_avg", "exp_avg_sq"),
    "FusedLamb": ("exp_avg", "exp_avg_sq"),
    "FusedLion": ("exp_avg",),
    "DeepSpeedCPULion": ("exp_avg", "exp_avg_sq"),  # the second is never used (``ops/lion/cpu_lion.py``)
    "DeepSpeedCPUAdagrad": ("exp_avg_sq",),
}
"""Element-wise states of DeepSpeed's compiled classes (``ops/*/``), all of which count steps in a Python number for each state.
A copy of these must not step or be deleted: some of them free their compiled half in ``__del__``. Apex's and Transformer Engine's
``FusedAdam`` are others of the same name."""

MUON = "MuonWithAuxAdam"
"""DeepSpeed's Muon (``runtime/zero/muon/muon_optimizer.py``). Its groups with ``use_muon`` keep a momentum. ``aux_optimizer``
steps on the others or, without one, the class itself does."""


def kept_states(found: Mapping[str, Any], probed: Mapping[str, Any], master: torch.Tensor) -> KeptStates:
    """Sort states into kinds, as `ucp_deepspeed.checkpoint.slots.split_states` does.

    Args:
        found: the states as the optimizer has them, or would have them.
        probed: the states after one step without a gradient; they show which states begin at zero.
    """
    numbers = frozenset(key for key, value in found.items() if is_number(key, value, master))
    elementwise = frozenset(key for key, value in found.items() if isinstance(value, torch.Tensor)) - numbers
    from_zero = frozenset(key for key in elementwise if key in probed and not probed[key].any())
    names = frozenset(key for key, value in found.items() if value is not None)
    return KeptStates(elementwise, numbers, from_zero, names)


def is_number(key: str, value: Any, master: torch.Tensor) -> bool:
    """Return whether a state is one number, as `ucp_deepspeed.checkpoint.slots.split_states` tells."""
    if isinstance(value, torch.Tensor):
        return is_number_in_tensor(key, value, master)
    return isinstance(value, (bool, int, float))


def compiled_class(optimizer: torch.optim.Optimizer) -> type | None:
    """Return which of DeepSpeed's compiled classes an optimizer is of, or of a subclass of."""
    return next((kind for kind in type(optimizer).__mro__ if _is_compiled(kind)), None)


def _is_compiled(kind: type) -> bool:
    return kind.__name__ in _COMPILED_STATES and kind.__module__.startswith("deepspeed.")


def counts_in_last_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether only the last tensor of a group that an optimizer steps on counts the steps."""
    kind = compiled_class(optimizer)
    return kind is not None and kind.__name__ in ("FusedAdam", "FusedLion")


def scaled_states(optimizer: torch.optim.Optimizer) -> dict[str, torch.dtype]:
    """Return the states that Transformer Engine's ``FusedAdam`` keeps in another type than fp32, with scales beside them."""
    if not any(kind.__module__.startswith("transformer_engine.") for kind in type(optimizer).__mro__):
        return {}
    dtypes = getattr(optimizer, "name_to_dtype_map", {})
    return {state: dtype for state, dtype in dtypes.items() if state.startswith("exp_avg") and dtype != torch.float32}


def is_muon_group(optimizer: torch.optim.Optimizer, group: int) -> bool:
    """Return whether a parameter group is one of Muon's own."""
    return type(optimizer).__name__ == MUON and bool(optimizer.param_groups[group]["use_muon"])


def example_states(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor, settings: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return states of any value, in the form in which an optimizer keeps them; None when that can't be told.

    Args:
        group: the parameter group.
        master: the tensor that the optimizer steps on.
        settings: hyper-parameters in place of the group's own, since some decide which states there are (``amsgrad``).
    """
    if type(optimizer).__name__ == MUON:
        if group["use_muon"]:
            return {MOMENTUM: _nothing(master, master.dtype)}
        optimizer = getattr(optimizer, "aux_optimizer", None)
    if optimizer is None or _is_compiled(type(optimizer)):
        names = _COMPILED_STATES["FusedAdam" if optimizer is None else type(optimizer).__name__]
        whole = getattr(optimizer, "fp32_optimizer_states", False)  # the classes for CPUs have that
        return {"step": 0} | dict.fromkeys(names, _nothing(master, torch.float32 if whole else master.dtype))
    probe = _stepped(optimizer, {**group, **settings}, master)
    return None if probe is None else probe.state[probe.param_groups[0]["params"][0]]


def place_of_steps(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor
) -> PlaceOfSteps | None:
    """Return where an optimizer counts steps; see `KeptStates.steps`. An entry of the group that no step raises is no count."""
    begun = {**group, GROUP_STEP: group[GROUP_STEP] * 0} if GROUP_STEP in group else group
    states, counted = example_states(optimizer, begun, master, {}), example_settings(optimizer, begun, master)
    in_state, in_group = GROUP_STEP in (states or {}), same_value(_number(counted.get(GROUP_STEP)), 1)
    if in_state == in_group:
        return None
    return "group" if in_group else "state"


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def keys_after_load(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Collection[str]:
    """Return the keys that a parameter group has after the optimizer's ``load_state_dict`` has put it in place of its own:
    torch's classes set keys that older versions of them lacked."""
    if compiled_class(optimizer):
        return {*group, "amsgrad"}
    probe, loaded = copy.copy(optimizer), {**group, "params": []}
    try:
        probe.__setstate__({"state": defaultdict(dict), "param_groups": [loaded]})
    except Exception:  # a user's own class may raise anything
        return group.keys()
    return loaded.keys()


def example_settings(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor
) -> Mapping[str, Any]:
    """Return a parameter group as it is after a step on a tensor like the master. It shows the form of each entry: some
    optimizers make tensors there. Empty where that can't be told."""
    if type(optimizer).__name__ == MUON:
        return {}
    probe = _stepped(optimizer, group, master)
    return {} if probe is None else probe.param_groups[0]


def _nothing(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((1,) * master.ndim, dtype=dtype, device=master.device)


def _apart(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a copy without parameters, states and hooks, that shares nothing with the original that a step could change; raise
    if the optimizer steps by another optimizer, is compiled, or keeps what can't be copied."""
    if compiled_class(optimizer):
        raise TypeError(f"{type(optimizer).__name__} can't be copied")
    own = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")}
    # torch's schedulers put a ``step`` in place of the class's that steps on the original.
    own = {key: value for key, value in own.items() if not (callable(value) and hasattr(type(optimizer), key))}
    if any(
        getattr(value, "__self__", None) is optimizer or getattr(value, "__closure__", None) for value in own.values()
    ):
        raise TypeError(f"{type(optimizer).__name__} keeps functions that may step on the original")
    if any(isinstance(value, torch.optim.Optimizer) for value in own.values()):
        raise TypeError(f"{type(optimizer).__name__} steps by another optimizer")
    shared = {id(param): param for group in optimizer.param_groups for param in group["params"]}
    probe = object.__new__(type(optimizer))  # torch's ``__getstate__`` leaves a class's own attributes out of a copy
    vars(probe).update(own)
    for key, value in own.items():
        if key.endswith("_hooks"):
            setattr(probe, key, type(value)())
        elif isinstance(value, (dict, list, set, torch.Tensor)):
            setattr(probe, key, copy.deepcopy(value, shared))
    probe.state = defaultdict(dict)
    return probe


def _stepped(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor
) -> torch.optim.Optimizer | None:
    """Return a copy of the optimizer after a step on a scratch tensor, alone in a group; torch's optimizers make their states
    then."""
    scratch = torch.zeros((2,) * master.ndim, dtype=master.dtype, device=master.device, requires_grad=True)
    scratch.grad = torch.zeros_like(scratch)
    try:
        probe = _apart(optimizer)
        settings = {key: value for key, value in group.items() if key != "params"}
        probe.param_groups = [{**copy.deepcopy(settings), "params": [scratch]}]
        probe.step()
    except Exception:  # a user's own class may raise anything; then the states are taken as they are
        return None
    return probe
