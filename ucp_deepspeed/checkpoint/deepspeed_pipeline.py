"""The ``layer_*`` files of a pipeline engine: weights and buffers, by layer and tensor-parallel rank.

A layer's file has local names. The optimizer files have ``{layer}.{local name}``, with the layer's number in the whole model.
For tied modules they have ``tied_modules.{key}.{local name}``, whatever layers use them (``runtime/pipe/module.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.extra_states import is_extra_state
from ucp_deepspeed.checkpoint.slots import Located
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError

TIED = "tied_modules."
"""Prefix of the names of tied parameters."""

_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")


def layer_file(file_name: str) -> tuple[int, int] | None:
    """Return layer and tensor-parallel rank of a layer file; None for any other file."""
    found = _FILE.fullmatch(file_name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def layer_of(name: str) -> int | None:
    """Return the layer number at the beginning of a parameter's name; None for a tied one."""
    first, _, rest = name.partition(".")
    return int(first) if first.isdecimal() and rest else None


def in_order_of_layers(names: Iterable[str], keys: Mapping[str, str]) -> list[str]:
    """Sort names as the layer files would list them. Within a layer they keep their order.

    Args:
        keys: keys of tied modules' layer files → names; the first layer counts.
    """
    places: dict[str, int] = {}
    for key, name in keys.items():
        if (layer := layer_of(key)) is not None:
            places[name] = min(layer, places.get(name, layer))
    layers = {name: places.get(name, layer_of(name)) for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0) + 1
    return sorted(layers, key=lambda name: last if (layer := layers[name]) is None else layer)


def read_layers(
    folder: Path,
    file_names: Collection[str],
    degree: int,
    rank: int,
    open_file: Callable[[Path], Mapping[str, Any]],
    wanted: Collection[int] | None = None,
) -> dict[str, Located]:
    """Return the tensors of a tensor-parallel rank's layers, in the model's order, as ``{layer}.{local name}``.

    Args:
        degree: tensor-parallel size.
        wanted: layers whose files are opened; all if None.

    Raises:
        DamagedCheckpointError: a layer has files of only some tensor-parallel ranks.
    """
    found = {place: name for name in file_names if (place := layer_file(name)) is not None}
    layers = sorted({layer for layer, _ in found})
    lacking = [(layer, held) for layer in layers for held in range(degree) if (layer, held) not in found]
    if lacking:
        raise DamagedCheckpointError(
            f"{folder} lacks the files of {len(lacking)} layers and tensor-parallel ranks, first of layer {lacking[0][0]} on "
            f"rank {lacking[0][1]}"
        )
    tensors: dict[str, Located] = {}
    for layer in layers if wanted is None else [layer for layer in layers if layer in wanted]:
        path = folder / found[layer, rank]
        for key, value in open_file(path).items():
            if isinstance(value, torch.Tensor) and not is_extra_state(key):
                tensors[f"{layer}.{key}"] = value, path
    return tensors


def tied_keys(tied: Mapping[str, int], free: Mapping[str, int], folder: Path) -> dict[str, str]:
    """Find the key in a layer file of each parameter and buffer of a tied module.

    The layers that use a tied module aren't recorded. Among tensors that no other parameter claims, a tied module's layer is one
    with all of the module's local names, of the same sizes. That layer's other tensors, frozen or buffers, are the module's too.

    Args:
        tied: names of tied parameters → elements.
        free: keys of layer files (``{layer}.{local name}``) that are no parameter's own → elements.
        folder: the tag folder, for the message.

    Returns:
        Key → name. A module is missing if all its layers use a function of their own: they have no file.

    Raises:
        MismatchError: several layers fit a module, or several modules a layer, which may be a frozen layer of its own; lists the
            keys of those layers.
    """
    layers: dict[int, list[str]] = {}
    for name in free:
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, []).append(name)
    fitting = [
        (layer, module)
        for module, members in _modules(tied).items()
        for layer in layers
        if all(free.get(f"{layer}.{local_name}") == numel for local_name, numel in members.items())
    ]
    layer_uses, module_uses = (Counter(place[index] for place in fitting) for index in (0, 1))
    ambiguous = {layer for layer, module in fitting if layer_uses[layer] > 1 or module_uses[module] > 1}
    if ambiguous:
        raise MismatchError(
            f"{folder} doesn't record which layers use a tied module, and several fit; save with ucp_deepspeed enabled, which "
            f"records them. Parameters and buffers that could be a tied module's or their own layer's",
            [name for layer in sorted(ambiguous) for name in layers[layer]],
        )
    return {name: f"{TIED}{module}.{name.partition('.')[2]}" for layer, module in fitting for name in layers[layer]}


def _modules(tied: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return for each tied module its local names → elements."""
    modules: dict[str, dict[str, int]] = {}
    for name, numel in tied.items():
        module, _, local_name = name.removeprefix(TIED).partition(".")
        modules.setdefault(module, {})[local_name] = numel
    return modules
