"""The common part of catalogs of chunks: a tensor for each state of each parameter, whose boxes lie in ``*.distcp`` files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import (
    MASTER,
    WEIGHT,
    Checkpoint,
    Deferred,
    FileExtent,
    Kind,
    Parameter,
    Precision,
)
from ucp_deepspeed.checkpoint.dcp.entries import Entries
from ucp_deepspeed.checkpoint.dcp.metadata import Metadata, StoredTensor
from ucp_deepspeed.checkpoint.dcp.sorting import Sorted
from ucp_deepspeed.checkpoint.slots import is_number_in_tensor
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS, TORCH_DTYPES
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Layout, Shape, Topology
from ucp_deepspeed.plan import Fragment


class ChunkedCheckpoint(Checkpoint):
    """See `Checkpoint`. Each stored chunk is a box of the whole parameter, so that the topology is one rank."""

    topology = Topology()
    recorded_shapes: Mapping[str, Shape] = MappingProxyType({})
    logical_names: Mapping[str, str] = MappingProxyType({})
    _metadata: Metadata
    _entries: Entries
    _sorted: Sorted

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        extent = self._entries.extent(self._key(name, state), tuple(self._tensor(name).chunks)[rank])
        yield Fragment(local_start, local_stop - local_start, extent, local_start)

    def layout(self, name: str) -> Layout:
        """See `Checkpoint.layout`. The boxes are the stored chunks.

        Raises:
            DamagedCheckpointError: chunks are missing, or overlap.
        """
        return self._entries.layout(self._sorted.weights[name])

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`."""
        self._entries.check_files()

    def _key(self, name: str, state: str) -> str:
        if state not in self.parameters[name].states:
            raise KeyError(state)
        return self._first_key(name, state == MASTER) if state in (MASTER, WEIGHT) else self._sorted.states[name][state]

    def _tensor(self, name: str) -> StoredTensor:
        return self._metadata.tensors[self._sorted.weights[name]]

    def _parameter(self, name: str, trained: bool) -> Parameter:
        tensor = self._tensor(name)
        states = {MASTER if trained else WEIGHT: self._dtype(self._first_key(name, trained))}
        numbers: dict[str, str] = {}
        refused: dict[str, str] = {}
        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for state, key in self._sorted.states.get(name, {}).items() if trained else ():
            held = self._metadata.tensors.get(key)
            if held is None or is_number_in_tensor(state, torch.empty(held.shape, device="meta"), like):
                if held is not None or isinstance(self._entries.value(key), int | float):
                    numbers[state] = key
                elif (value := self._entries.value(key)) is not None:
                    refused[state] = f"optimizer state {state!r} is a {type(value).__name__} ({self.path})"
            elif (why := self._why_not_alike(key, name, f"optimizer state {state!r}")) is None:
                states[state] = self._dtype(key)
            else:
                refused[state] = why
        if trained and (why := self._why_not_alike(self._first_key(name, trained), name, "the master")) is not None:
            refused[MASTER] = why
        read = partial(lambda keys: {state: self._entries.number(key) for state, key in keys.items()}, numbers)
        scalars: Mapping[str, float] = Deferred(read) if numbers else {}
        kind: Kind = "trainable" if trained else "frozen"
        return Parameter(name, kind, (tensor.shape,), states, scalars, refused, may_be_buffer=not trained)

    def _first_key(self, name: str, trained: bool) -> str:
        """Return the key of the master, or of a weight that isn't trained."""
        weight = self._sorted.weights[name]
        return self._sorted.masters.get(name, weight) if trained else weight

    def _why_not_alike(self, key: str, name: str, what: str) -> str | None:
        """Say why a tensor can't be a state of a parameter; None if it can."""
        held, tensor = self._metadata.tensors[key], self._tensor(name)
        if held.chunks.keys() == tensor.chunks.keys() and held.shape == tensor.shape and held.dtype in TORCH_DTYPES:
            return None
        if self._entries.layout(key).logical_shape != self.layout(name).logical_shape or held.dtype not in TORCH_DTYPES:
            found = f"{held.dtype}, shape {held.shape}"
            return f"{what} isn't element-wise: {found} of {tensor.shape} ({self.path})"
        told = f"{what} is cut in another way than its parameter ({self.path})"
        return f"{told}; save it with the parameter's placements"

    def _dtype(self, key: str) -> str:
        dtype = self._metadata.tensors[key].dtype
        if dtype not in TORCH_DTYPES:
            raise UnsupportedError(f"{self._metadata.path} has {key!r:.80} in {dtype}, which has no universal form")
        return TORCH_DTYPES[dtype]

    def _refuse_strays(self) -> None:
        """Refuse states of no parameter, on the first parameter that is trained."""
        first = next((name for name, each in self.parameters.items() if each.kind == "trainable"), None)
        if first is not None and self._sorted.strays:
            beside = {key: f"optimizer state {key!r} is of no parameter ({self.path})" for key in self._sorted.strays}
            held = dict(self.parameters)
            held[first] = replace(held[first], refused={**held[first].refused, **beside})
            self.parameters = held

    def _precision(self) -> Precision:
        """Return the precision of the run, by the weights' types."""
        dtypes = {self._tensor(name).dtype for name, each in self.parameters.items() if each.kind == "trainable"}
        dtypes = dtypes or {held.dtype for held in map(self._tensor, self.parameters) if held.dtype.is_floating_point}
        return next((name for name, dtype in PRECISIONS.items() if dtype in dtypes), "fp32")

    def _readable(self, key: str) -> Any:
        value = self._entries.value(key)
        if (kind := opaque_in(value)) is not None:
            told = f"{self.path} holds an object of class {kind} as {key!r:.80}, which could run code when loaded and is refused"
            raise DamagedCheckpointError(f"{told}; save it as plain numbers, texts, lists and dictionaries")
        return value
