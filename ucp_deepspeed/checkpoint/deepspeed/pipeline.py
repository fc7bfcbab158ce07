"""The ``layer_*`` files of a pipeline engine: weights and buffers, by layer and tensor-parallel rank.

A layer's file has local names. The optimizer files have ``{layer}.{local name}``, with the layer's number in the whole model.
For tied modules they have ``tied_modules.{key}.{local name}``, whatever layers use them (``runtime/pipe/module.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles, layer_file
from ucp_deepspeed.checkpoint.deepspeed.weights import tensors_in
from ucp_deepspeed.checkpoint.extra_states import extra_states_in
from ucp_deepspeed.checkpoint.slots import Located
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.layout import Topology

TIED = "tied_modules."
"""Prefix of the names of tied parameters."""


def layer_of(name: str) -> int | None:
    """Return the layer number at the beginning of a parameter's name; None for a tied one."""
    first, _, rest = name.partition(".")
    return int(first) if first.isdecimal() and rest else None


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
    modules: dict[str, dict[str, int]] = {}
    for name, numel in tied.items():
        module, _, local_name = name.removeprefix(TIED).partition(".")
        modules.setdefault(module, {})[local_name] = numel
    fitting = [
        (layer, module)
        for module, members in modules.items()
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


class PipelineLayers:
    """The ``layer_*`` files of all stages.

    Args:
        files: the tag folder.
        topology: topology of the run that saved.
        trained: names and elements of trained parameters; called only if no manifest tells which layers there are, and which of
            them use a tied module.
    """

    def __init__(self, files: DeepSpeedFiles, topology: Topology, trained: Callable[[], Mapping[str, int]]) -> None:
        self._files, self._topology, self._trained = files, topology, trained
        self.on = lru_cache(maxsize=None)(self._read)

    def _read(self, tp_rank: int) -> dict[str, Located]:
        """Return the needed tensors of a tensor-parallel rank, tied ones under their own names."""
        self._check_all_there()
        named: dict[str, Located] = {}
        for key, located in self._tensors(tp_rank, self._needed).items():
            named.setdefault(self.keys.get(key, key), located)  # for a tied module the first of its layers counts
        return named

    def _check_all_there(self) -> None:
        """Check that layers named in other files are there, where no manifest lists the files. Nothing names frozen layers."""
        if self._files.manifest is not None:
            return
        firsts = range(0, self._topology.model_parallel, self._topology.tp)
        buffers = [name for rank in firsts for name in self._files.model_states(rank)["buffer_names"]]
        there = {place[0] for name in self._files.names if (place := layer_file(name))}
        known = {layer: name for name in (*buffers, *self._trained()) if (layer := layer_of(name)) is not None}
        if gone := sorted(known.keys() - there):
            told = ", ".join(f"layer_{layer:02d}-*model_states.pt (of {known[layer]})" for layer in gone[:20])
            raise DamagedCheckpointError(f"{self._files.path} lacks the files of {len(gone)} layers: {told}")
        held = self._tensors(0).keys()
        if lost := [name for name in buffers if layer_of(name) is not None and name not in held]:
            raise DamagedCheckpointError(
                f"{self._files.path}/layer_{layer_of(lost[0]):02d}-*model_states.pt lacks the buffer {lost[0]}"
            )

    def order(self) -> Iterable[str]:
        """Return the names, layer by layer; of a tied module the first layer counts. There may be more than are saved."""
        if self._files.manifest is None or self._needed is None:
            return self.on(0)
        places: dict[str, int] = {}
        for key, name in self.keys.items():
            if (layer := layer_of(key)) is not None:
                places[name] = min(layer, places.get(name, layer))
        layers = {name: places.get(name, layer_of(name)) for name in self._files.manifest.parameters}
        return sorted(layers, key=lambda name: (layers[name] is None, layers[name]))

    def extra_states(self, tp_rank: int) -> dict[str, Any]:
        """Return the extra states of all layers, with their tensors read."""
        found: dict[str, Any] = {}
        for name in sorted(self._files.names):
            place = layer_file(name)
            if place is not None and place[1] == tp_rank:
                path = self._files.path / name
                held = extra_states_in(self._files.weights(path), path)
                found |= {f"{place[0]}.{key}": value for key, value in held.items()}
        return found

    def _tensors(self, tp_rank: int, wanted: Collection[int] | None = None) -> dict[str, Located]:
        """Return the tensors of all layers, or of the wanted ones, in the model's order, as ``{layer}.{local name}``."""
        found = {place: name for name in self._files.names if (place := layer_file(name)) is not None}
        layers = sorted({layer for layer, _ in found})
        lacking = [place for place in product(layers, range(self._topology.tp)) if place not in found]
        if lacking:
            raise DamagedCheckpointError(
                f"{self._files.path} lacks the files of {len(lacking)} layers and tensor-parallel ranks, first of layer "
                f"{lacking[0][0]} on rank {lacking[0][1]}"
            )
        tensors: dict[str, Located] = {}
        for layer in (layer for layer in layers if wanted is None or layer in wanted):
            path = self._files.path / found[layer, tp_rank]
            held = tensors_in(self._files.weights(path), path)
            tensors |= {f"{layer}.{key}": located for key, located in held.items()}
        return tensors

    @cached_property
    def _needed(self) -> frozenset[int] | None:
        """The layers with frozen parameters and buffers; None for all, if they aren't recorded or no ZeRO files hold the rest."""
        manifest = self._files.manifest
        described = self._files.partitioned and self._files.param_shapes(0) is not None
        if manifest is None or not described or any(entry.kind is None for entry in manifest.parameters.values()):
            return None
        aside = {name for name, entry in manifest.parameters.items() if entry.kind != "trainable"}
        keys = (*aside, *(key for key, name in manifest.layer_keys.items() if name in aside))
        return frozenset(layer for key in keys if (layer := layer_of(key)) is not None)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Key of a layer file → name, if they differ: for tied modules."""
        if self._files.manifest is not None:
            return self._files.manifest.layer_keys
        trained, found = self._trained(), self._tensors(0)
        free = {name: tensor.numel() for name, (tensor, _) in found.items() if name not in trained}
        tied = {name: numel for name, numel in trained.items() if name.startswith(TIED)}
        return tied_keys(tied, free, self._files.path)
