"""Weights, buffers and extra states of a pipeline, in the files of its layers; those that nothing is needed from stay closed."""

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

Numels = Mapping[str, int]
"""Elements of each parameter, by name."""


class PipelineLayers:
    """The ``layer_*`` files of all stages.

    Args:
        files: the tag folder.
        degree: tensor-parallel size.
        trained: asked only where no manifest tells which layers use a tied module.
    """

    def __init__(self, files: DeepSpeedFiles, degree: int, trained: Callable[[], Numels]) -> None:
        self._files, self._degree, self._trained = files, degree, trained
        self.on = lru_cache(maxsize=None)(self._read)

    def _read(self, tp_rank: int) -> dict[str, Located]:
        """The tensors of a tensor-parallel rank, as far as they are needed, tied ones under their own names.

        Raises:
            DamagedCheckpointError: a layer has files of some tensor-parallel ranks only.
        """
        named: dict[str, Located] = {}
        for key, located in self._tensors(tp_rank, self._needed).items():
            named.setdefault(self._keys.get(key, key), located)  # of a tied module's layers the first
        return named

    def order(self) -> Iterable[str]:
        """Names, layer by layer; there may be more than are saved."""
        if self._files.manifest is None or self._needed is None:
            return self.on(0)
        return in_order_of_layers(self._files.manifest.parameters, self._keys)

    def extra_states(self, tp_rank: int) -> dict[str, Any]:
        """Of all layers, with their tensors read."""
        found: dict[str, Any] = {}
        for name in sorted(self._files.names):
            place = layer_file(name)
            if place is not None and place[1] == tp_rank:
                path = self._files.path / name
                held = extra_states_in(self._files.open(path), path)
                found |= {f"{place[0]}.{key}": value for key, value in held.items()}
        return found

    def _tensors(self, tp_rank: int, wanted: Collection[int] | None = None) -> dict[str, Located]:
        return read_layers(self._files.path, self._files.names, self._degree, tp_rank, self._files.open, wanted)

    @cached_property
    def _needed(self) -> frozenset[int] | None:
        """Under ZeRO the layers with frozen parameters and buffers, if that is recorded; else None for all.

        All too where the optimizer's files, which hold the rest, aren't there.
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
        """Key of a layer file → name, where it is another: of tied modules."""
        if self._files.manifest is not None:
            return self._files.manifest.layer_keys
        trained, found = self._trained(), self._tensors(0)
        free = {name: tensor.numel() for name, (tensor, _) in found.items() if name not in trained}
        tied = {name: numel for name, numel in trained.items() if name.startswith(TIED)}
        return tied_keys(tied, free, self._files.path)
