"""What modules keep beside parameters and buffers: the values of torch's ``get_extra_state``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.torch_files import read_tensors


def is_extra_state(key: str) -> bool:
    """Whether a key of a ``state_dict`` is that of a module's ``get_extra_state`` (``torch/nn/modules/module.py``)."""
    return key.rpartition(".")[2] == "_extra_state"


def extra_states_in(state_dict: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The extra states, but None, in a ``state_dict`` of `open_torch_file`, with their tensors read."""
    found = {key: value for key, value in state_dict.items() if is_extra_state(key) and value is not None}
    return {key: read_tensors(value, path) for key, value in found.items()}


def shared_extra_states(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Extra states that are the same on all tensor-parallel ranks, and the keys of those that aren't."""
    shared: dict[str, Any] = {}
    differing: dict[str, None] = {}
    for held in found:
        for key in found[0].keys() | held.keys():
            if key not in held or not same_value(shared.setdefault(key, held[key]), held[key]):
                differing[key] = None
    return {key: value for key, value in shared.items() if key not in differing}, tuple(differing)
