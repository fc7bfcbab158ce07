"""Pipelines: which stage holds which layers, and the files of the layers (``runtime/pipe/module.py``)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED, layer_of
from ucp_deepspeed.checkpoint.deepspeed.written_names import layer_file
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.layout import Topology


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a checkpoint on another number of stages.

    Attributes:
        checkpoint: DeepSpeed's files of the pipeline: no other form tells all of its layers.
        topology: the target's.
        counts: number of layers of each stage, as the user says.
    """

    checkpoint: DeepSpeedCheckpoint
    topology: Topology
    counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, topology: Topology, counts: tuple[int, ...] | None) -> Pipeline | None:
        """Return the pipeline of a checkpoint; None for a plain model.

        Raises:
            UnsupportedError: it is of one, and the form doesn't tell its layers; or a plain model is to become one.
            ConfigError: the numbers of layers are missing, or aren't those of so many stages.
        """
        if not (isinstance(checkpoint, DeepSpeedCheckpoint) and checkpoint.files.is_pipeline):
            if topology.pp > 1 or any(name.startswith(TIED) for name in checkpoint.parameters):
                raise UnsupportedError(
                    f"{checkpoint.path} doesn't tell the layers of a pipeline, of which each has a file: take DeepSpeed's own "
                    f"files of a pipeline engine as SRC, or resume with this package"
                )
            if counts is not None:
                raise ConfigError(
                    f"{checkpoint.path} is of no pipeline, and its files have no stages: leave --layers out"
                )
            return None
        if counts is not None and len(counts) != topology.pp:
            raise ConfigError(f"--layers gives {len(counts)} stages, and --pp {topology.pp}")
        if counts is None and topology.pp not in (1, checkpoint.topology.pp):
            raise ConfigError(
                f"{checkpoint.path} has {checkpoint.topology.pp} stages, and --pp {topology.pp}: say how many layers each has, "
                f"as DeepSpeed prints them when the engine starts: --layers 3,4"
            )
        if checkpoint.topology.pp == 1 < topology.pp and any(name.startswith(TIED) for name in checkpoint.parameters):
            raise UnsupportedError(
                f"nothing in {checkpoint.path} tells which layers of its one stage share a tied module, and so on which of "
                f"several stages it would be; resume with this package"
            )
        return cls(checkpoint, topology, counts)

    def stages(self, view: UniversalView) -> dict[str, set[int]]:
        """Return the stages that hold each parameter and buffer, by logical name. A tied module that several stages share is on
        the first and the last one, if their number changes."""
        found: dict[str, set[int]] = {}
        source = self.checkpoint.topology
        for name, parameter in self.checkpoint.parameters.items():
            held = {rank // source.tp for rank, shape in enumerate(parameter.local_shapes) if shape is not None}
            if self.topology.pp == 1:
                held = {0}
            elif self.counts is not None:
                layers = {layer_of(key) for key in (name, *self._keys_of.get(name, ()))} - {None}
                shared = {0, self.topology.pp - 1} if len(held) > 1 else set()
                held = shared | {self._stage(layer) for layer in layers if layer is not None}
            found[view.logical_of[name]] = held
        return found

    def _stage(self, layer: int) -> int:
        assert self.counts is not None
        return min(bisect_right(list(accumulate(self.counts)), layer), self.topology.pp - 1)

    @cached_property
    def _keys_of(self) -> dict[str, list[str]]:
        """Keys in the files of layers of the parameters and buffers of tied modules, by name."""
        found: dict[str, list[str]] = {}
        for key, name in self.keys.items():
            found.setdefault(name, []).append(key)
        return found

    @property
    def keys(self) -> Mapping[str, str]:
        """Keys in the files of layers (``{layer}.{local name}``) → names, where they differ."""
        return self.checkpoint.layers.keys

    def ordered(self, names: Sequence[str]) -> list[str]:
        """Return the checkpoint's names in the order of a stage's modules: tied ones first, then by layers."""
        return sorted(names, key=lambda name: -1 if (layer := layer_of(name)) is None else layer)

    def files(self) -> Iterator[tuple[int, int, str]]:
        """Yield layer, tensor-parallel rank and name of each file. A topology has an axis for tensor parallelism, or none."""
        layers = sorted({found[0] for name in self.checkpoint.files.names if (found := layer_file(name)) is not None})
        axis = self.topology.tp > 1 or any(re.match(r"layer_\d+-model_", name) for name in self.checkpoint.files.names)
        for layer in layers:
            for rank in range(self.topology.tp):
                yield layer, rank, f"layer_{layer:02d}{f'-model_{rank:02d}' if axis else ''}-model_states.pt"

    def content(self, layer: int, weights: Mapping[str, Any], extra: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the content of a layer's file.

        Args:
            weights: the tensors of a tensor-parallel rank, by the checkpoint's names.
            extra: extra states of its modules, by key.
        """
        prefix = f"{layer}."
        own = {name: name for name in weights} | dict(self.keys)
        held = {key: weights[name] for key, name in own.items() if key.startswith(prefix) and name in weights}
        held |= {key: value for key, value in extra.items() if key.startswith(prefix)}
        return OrderedDict((key.removeprefix(prefix), value) for key, value in held.items())
