"""Weights, buffers and extra states in a pipeline's layer files. Files from which nothing is needed stay closed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

from ucp_deepspeed.checkpoint.deepspeed_files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed_pipeline import (
    TIED,
    in_order_of_layers,
    layer_file,
    layer_of,
    read_layers,
    tied_keys,
)
from ucp_deepspeed.checkpoint.extra_states import extra_states_in
from ucp_deepspeed.checkpoint.slots import Located
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import Topology

Numels = Mapping[str, int]
"""Elements of each parameter, by name."""


class PipelineLayers:
    """The ``layer_*`` files of all stages.

    Args:
        files: the tag folder.
        topology: topology of the run that saved.
        trained: called only if no manifest tells which layers there are, and which of them use a tied module.
    """

    def __init__(self, files: DeepSpeedFiles, topology: Topology, trained: Callable[[], Numels]) -> None:
        self._files, self._topology, self._trained = files, topology, trained
        self.on = lru_cache(maxsize=None)(self._read)

    def _read(self, tp_rank: int) -> dict[str, Located]:
        """Return the needed tensors of a tensor-parallel rank, tied ones under their own names.

        Raises:
            DamagedCheckpointError: a layer has no files, or files of only some tensor-parallel ranks.
        """
        self._check_all_there()
        named: dict[str, Located] = {}
        for key, located in self._tensors(tp_rank, self._needed).items():
            named.setdefault(self._keys.get(key, key), located)  # for a tied module the first of its layers counts
        return named

    def _check_all_there(self) -> None:
        """Check that layers named in other files are there. With a manifest this isn't needed: it lists the files themselves.

        No file names a layer with frozen parameters only, and tied modules may have no file.
        """
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
        """Return the names, layer by layer. There may be more than are saved."""
        if self._files.manifest is None or self._needed is None:
            return self.on(0)
        return in_order_of_layers(self._files.manifest.parameters, self._keys)

    def extra_states(self, tp_rank: int) -> dict[str, Any]:
        """Return the extra states of all layers, with their tensors read."""
        found: dict[str, Any] = {}
        for name in sorted(self._files.names):
            place = layer_file(name)
            if place is not None and place[1] == tp_rank:
                path = self._files.path / name
                held = extra_states_in(self._files.open(path), path)
                found |= {f"{place[0]}.{key}": value for key, value in held.items()}
        return found

    def _tensors(self, tp_rank: int, wanted: Collection[int] | None = None) -> dict[str, Located]:
        return read_layers(self._files.path, self._files.names, self._topology.tp, tp_rank, self._files.open, wanted)

    @cached_property
    def _needed(self) -> frozenset[int] | None:
        """The layers with frozen parameters and buffers, if ZeRO is used and they are recorded; else None for all layers.

        None also if the optimizer's files are missing, since they hold the rest.
        """
        manifest = self._files.manifest
        described = self._files.partitioned and self._files.param_shapes(0) is not None
        if manifest is None or not described or any(entry.kind is None for entry in manifest.parameters.values()):
            return None
        aside = {name for name, entry in manifest.parameters.items() if entry.kind != "trainable"}
        keys = (*aside, *(key for key, name in manifest.layer_keys.items() if name in aside))
        return frozenset(layer for key in keys if (layer := layer_of(key)) is not None)

    @cached_property
    def _keys(self) -> Mapping[str, str]:
        """Key of a layer file → name, if they differ: for tied modules."""
        if self._files.manifest is not None:
            return self._files.manifest.layer_keys
        trained, found = self._trained(), self._tensors(0)
        free = {name: tensor.numel() for name, (tensor, _) in found.items() if name not in trained}
        tied = {name: numel for name, numel in trained.items() if name.startswith(TIED)}
        return tied_keys(tied, free, self._files.path)
