"""The catalog of a ``torch_dist`` folder of Megatron-Core: ``dist_checkpointing.save`` of a model and its optimizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ucp_deepspeed.checkpoint.bounds import read_bounded
from ucp_deepspeed.checkpoint.checkpoint import WEIGHT, WEIGHTS_HINT, FileExtent, Parameter, RunState
from ucp_deepspeed.checkpoint.dcp.chunked import ChunkedCheckpoint
from ucp_deepspeed.checkpoint.dcp.entries import MISSING_HINT, Entries
from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME, read_metadata
from ucp_deepspeed.checkpoint.torch_dist.buckets import Buckets
from ucp_deepspeed.checkpoint.torch_dist.groups import StoredGroup, assigned, stored_groups
from ucp_deepspeed.checkpoint.torch_dist.keys import SHARDING_HINT, sort_keys, unstacked
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file, read_tensors
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, FormatError, MismatchError
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment

COMMON_NAME = "common.pt"
CONFIG_NAME = "metadata.json"
"""File that Megatron-Core writes last, when the save is whole."""

BACKEND = "torch_dist"

OPTIMIZER, SCHEDULER, ITERATION = "optimizer", "opt_param_scheduler", "iteration"

OWNED = (OPTIMIZER, SCHEDULER, ITERATION)
"""Entries of ``common.pt`` that a resume needs."""

MEGATRONS = ("args", "rerun_state_machine")
"""Entries of the training script's own, which another engine has no use for."""


OF_FIRST_GROUP = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_0\.optimizer/shard_.*")
"""Key of the object with the parameter groups, beside buffers; those of all data-parallel groups are the same."""


def alone(value: Any) -> Any:
    """Return the value of an object, which Megatron-Core saves in a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class TorchDistCheckpoint(ChunkedCheckpoint):
    """A folder of Megatron-Core. See `Checkpoint`.

    Raises:
        DamagedCheckpointError: a file is missing or truncated, or can't be read.
        FormatError: ``metadata.json`` names another form.
        UnsupportedError: several layers are in one chunk, or a tensor's type has no universal form.
    """

    form = "megatron-core torch_dist"
    patterns: Mapping[str, Pattern] = MappingProxyType({})
    vocabulary_size = None

    def __init__(self, path: Path) -> None:
        self.path, self.versions = path, FileVersions()
        for name in (METADATA_NAME, COMMON_NAME, CONFIG_NAME):
            self.versions.note(path / name)
        _check_config(path)
        self._metadata = unstacked(read_metadata(path / METADATA_NAME))
        self._entries = Entries(self._metadata, self.versions)
        self._entries.check_files()
        self._common = open_torch_file(path / COMMON_NAME, owned=OWNED)
        self._sorted = self._keys = sort_keys(self._metadata)
        self._buckets: Buckets | None = None
        self.lacking = self._why_lacking()
        trained = self._trained()
        self._check_masters(trained & self._sorted.weights.keys())
        parameters = {name: self._parameter(name, name in trained) for name in self._sorted.weights}
        shapes = {name: each.local_shapes[0] or () for name, each in parameters.items() if each.kind == "trainable"}
        self.groups, self._steps = assigned(self._stored_groups(), shapes, path / COMMON_NAME) if shapes else ((), {})
        self.parameters = {name: self._counted(each) for name, each in parameters.items()}
        self._refuse_strays()
        self.run = self._read_run()

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`: the entries of ``common.pt`` that nothing else restores."""
        left_out = self.unreadable()
        return str(self.path / COMMON_NAME), {key: value for key, value in self._rest.items() if key not in left_out}

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """See `Checkpoint.unreadable`."""
        found = ((key, opaque_in(value)) for key, value in self._rest.items())
        return {key: kind for key, kind in found if kind is not None}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`. Those that hold objects of classes are left out: Transformer Engine's buffers."""
        found = {name: self._entries.value(key) for name, key in self._sorted.extra.items()}
        found = {name: alone(value) for name, value in found.items()}
        return ({name: value for name, value in found.items() if value is not None and opaque_in(value) is None},)

    @cached_property
    def _rest(self) -> dict[str, Any]:
        path = self.path / COMMON_NAME
        held = {str(key): value for key, value in self._common.items() if key not in (OPTIMIZER, SCHEDULER, *MEGATRONS)}
        return {key: read_tensors(value, path) for key, value in held.items()}

    def _why_lacking(self) -> MismatchError | None:
        """Return why there is no optimizer state to go on with; None if there is."""
        held, path = self._keys, self._metadata.path
        if held.buckets:
            try:
                self._buckets = Buckets(self._entries, held.weights)
            except MismatchError as error:
                return error
            return None
        if not held.states and not held.masters:
            return MismatchError(f"{path} holds no optimizer state, only weights: {WEIGHTS_HINT}")
        if OPTIMIZER not in self._common:
            told = f"{self.path / COMMON_NAME} holds no optimizer, whose states {path} has"
            return MismatchError(f"{told}: {WEIGHTS_HINT}")
        return None

    def _trained(self) -> Set[str]:
        """Return the names of the parameters that the optimizer has."""
        if self.lacking is not None:
            return frozenset()
        return (
            self._sorted.states.keys() | self._sorted.masters.keys() if self._buckets is None else self._buckets.names
        )

    def _parameter(self, name: str, trained: bool) -> Parameter:
        found = super()._parameter(name, trained)
        return found if self._buckets is None or not trained else replace(found, states=self._buckets.states(name))

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        if self._buckets is None or state == WEIGHT:
            yield from super().fragments(name, state, rank, local_start, local_stop)
            return
        box = tuple(self._tensor(name).chunks)[rank]
        yield from self._buckets.fragments(name, state, box, local_start, local_stop)

    def _check_masters(self, trained: Set[str]) -> None:
        """Check that each trained parameter has its master, which is the weight only where that is in fp32."""
        if not self._sorted.masters:
            return
        without = sorted(
            name for name in trained - self._sorted.masters.keys() if self._tensor(name).dtype != torch.float32
        )
        if without:
            told = (
                f"{self._metadata.path} has no master of {without[0]}, which others have, and {len(without) - 1} more"
            )
            raise DamagedCheckpointError(f"{told}; {MISSING_HINT}")

    def _stored_groups(self) -> list[StoredGroup]:
        if self._buckets is None:
            return stored_groups(self._common[OPTIMIZER], self.path / COMMON_NAME)
        held = [self._readable(key) for key in self._keys.buckets if OF_FIRST_GROUP.fullmatch(key)]
        return [group for value in held for group in stored_groups(alone(value), self._metadata.path)]

    def _counted(self, parameter: Parameter) -> Parameter:
        """Return a parameter with the steps that it has taken."""
        step = self._steps.get(parameter.name)
        return parameter if step is None else replace(parameter, scalars={"step": step})

    def _why_not_alike(self, key: str, name: str, what: str) -> str | None:
        held, tensor = self._metadata.tensors[key], self._tensor(name)
        if held.shape != tensor.shape:
            told = f"{what} has shape {held.shape}, and its parameter {tensor.shape} ({self.path})"
            return f"{told}: it is sharded in a way of older versions; load it with one, and {SHARDING_HINT}"
        return super()._why_not_alike(key, name, what)

    def _read_run(self) -> RunState:
        path, iteration = self.path / COMMON_NAME, self._common.get(ITERATION)
        scheduler = self._common.get(SCHEDULER)
        scheduler = read_tensors(scheduler, path) if isinstance(scheduler, Mapping) else None
        steps = int(max(self._steps.values(), default=0))
        if isinstance(iteration, int) and not isinstance(iteration, bool) and iteration >= 0:
            steps = iteration
        return RunState(self._precision(), steps, None, 0, scheduler, None, "")


def is_torch_dist(folder: Path) -> bool:
    """Return whether a folder with DCP's metadata is one of Megatron-Core, by the names of its files."""
    return (folder / COMMON_NAME).is_file() or (folder / CONFIG_NAME).is_file()


def _check_config(folder: Path) -> None:
    """Check ``metadata.json``.

    Raises:
        DamagedCheckpointError: it isn't there, so that the save wasn't finished, or can't be parsed.
        FormatError: it names another form.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        told = f"{path} is missing, which Megatron-Core writes last: the save was never finished"
        raise DamagedCheckpointError(f"{told}; {MISSING_HINT}")
    try:
        held = json.loads(read_bounded(path))
        backend = held["sharded_backend"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} can't be parsed: {error}; {REMEDY}") from error
    if backend != BACKEND:
        told = f"{path} names the form {backend!r:.80}, which this release can't read"
        raise FormatError(f"{told}: load it with Megatron-Core, and save it with {BACKEND}")
