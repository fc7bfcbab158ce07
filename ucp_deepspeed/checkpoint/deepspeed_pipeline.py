"""The ``layer_*`` files of a pipeline engine: weights and buffers, by layer and tensor-parallel rank.

A layer's file has local names; the optimizer files say ``{layer}.{local name}``, with the layer's number in the whole model,
and for tied modules ``tied_modules.{key}.{local name}``, whatever layers use them (``runtime/pipe/module.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.slots import Located
from ucp_deepspeed.errors import DamagedCheckpointError

TIED = "tied_modules."
"""How the names of tied parameters begin."""

_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")


def layer_file(file_name: str) -> tuple[int, int] | None:
    """Layer and tensor-parallel rank of a layer file; None for any other file."""
    found = _FILE.fullmatch(file_name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def layer_of(name: str) -> int | None:
    """The layer that a parameter's name begins with; None for a tied one."""
    first, _, rest = name.partition(".")
    return int(first) if first.isdecimal() and rest else None


def read_layers(
    folder: Path, file_names: Collection[str], degree: int, open_file: Callable[[Path], Mapping[str, Any]]
) -> list[dict[str, Located]]:
    """For each tensor-parallel rank the tensors of all layers, in the model's order, as ``{layer}.{local name}``.

    Raises:
        DamagedCheckpointError: a layer has files of some tensor-parallel ranks only.
    """
    found = sorted((place, name) for name in file_names if (place := layer_file(name)) is not None)
    layers = sorted({layer for (layer, _), _ in found})
    lacking = [(layer, rank) for layer in layers for rank in range(degree) if (layer, rank) not in dict(found)]
    if lacking:
        raise DamagedCheckpointError(
            f"{folder} lacks the files of {len(lacking)} layers and tensor-parallel ranks, first of layer {lacking[0][0]} on "
            f"rank {lacking[0][1]}"
        )
    tensors: list[dict[str, Located]] = [{} for _ in range(degree)]
    for (layer, rank), name in found:
        for key, value in open_file(folder / name).items():
            if isinstance(value, torch.Tensor):
                tensors[rank][f"{layer}.{key}"] = value, folder / name
    return tensors


def tied_keys(tied: Mapping[str, int], free: Mapping[str, int]) -> dict[str, str]:
    """Under which key of a layer file each parameter and buffer of a tied module lies.

    The layers that use a tied module aren't recorded: among the tensors that no other parameter claims, they are those with all
    of the module's local names, of the same sizes. What else such a layer holds, frozen or a buffer, is the module's too.

    Args:
        tied: names of tied parameters → elements.
        free: keys of layer files (``{layer}.{local name}``) that are no parameter's own → elements.

    Returns:
        Key → name, several keys for one name where several layers have a file of the module; without a module whose layers all
        use a function of their own, which have no file.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in tied:
        key, _, local_name = name.removeprefix(TIED).partition(".")
        modules.setdefault(key, {})[local_name] = name
    found: dict[str, str] = {}
    layers = sorted({layer for name in free if (layer := layer_of(name)) is not None})
    for module, members in modules.items():
        for layer in layers:
            keys = {f"{layer}.{local_name}": name for local_name, name in members.items()}
            if all(key in free and key not in found and free[key] == tied[name] for key, name in keys.items()):
                rest = [name for name in free if layer_of(name) == layer]
                found |= {name: f"{TIED}{module}.{name.partition('.')[2]}" for name in rest}
    return found
