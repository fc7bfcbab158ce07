"""State of modules beside parameters and buffers: the values of torch's ``get_extra_state``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.torch_files.safe_load import read_tensors

_KEY = "_extra_state"


def is_extra_state(key: str) -> bool:
    """Return whether a key of a ``state_dict`` is of a module's ``get_extra_state`` (``torch/nn/modules/module.py``)."""
    return key.rpartition(".")[2] == _KEY


def extra_states_in(state_dict: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the extra states, except None, in a ``state_dict`` of `open_torch_file`, with their tensors read."""
    found = {key: value for key, value in state_dict.items() if is_extra_state(key) and value is not None}
    return {key: read_tensors(value, path) for key, value in found.items()}


def shared_extra_states(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return extra states that are the same on all tensor-parallel ranks, and the keys of all others."""
    shared: dict[str, Any] = {}
    differing: dict[str, None] = {}
    for held in found:
        for key in found[0].keys() | held.keys():
            if key not in held or not same_value(shared.setdefault(key, held[key]), held[key]):
                differing[key] = None
    return {key: value for key, value in shared.items() if key not in differing}, tuple(differing)


def under_other_keys(
    found: Sequence[Mapping[str, Any]], pairs: Mapping[str, str], wanted: Collection[str]
) -> tuple[dict[str, Any], ...]:
    """Move extra states to another model's keys, if its modules have other names.

    Args:
        pairs: names of parameters and buffers → names in the other model: they tell the module's name there.
        wanted: the other model's keys.
    """
    lost = {key for held in found for key in held if key not in wanted}
    moved = {key: other for key in lost if (other := _moved(key, pairs)) is not None and other in wanted}
    taken = Counter(moved.values())
    sound = {
        key: other for key, other in moved.items() if taken[other] == 1 and all(other not in held for held in found)
    }
    return tuple({sound.get(key, key): value for key, value in held.items()} for held in found)


def _moved(key: str, pairs: Mapping[str, str]) -> str | None:
    """Return the key of the module that holds the same parameters; None if they name none or several."""
    start = key.removesuffix(_KEY)
    places = {
        other[: len(other) - len(rest)]
        for name, other in pairs.items()
        if name.startswith(start) and other.endswith(rest := name[len(start) :])
    }
    places = {place for place in places if not place or place.endswith(".")}
    return f"{places.pop()}{_KEY}" if len(places) == 1 else None
