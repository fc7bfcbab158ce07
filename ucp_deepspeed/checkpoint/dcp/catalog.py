"""The catalog of a DCP folder: model and optimizer of FSDP2, torchtitan, or anything else that saves ``state_dict``s with DCP."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import (
    MASTER,
    WEIGHT,
    WEIGHTS_HINT,
    Parameter,
    ParameterGroup,
    RunState,
)
from ucp_deepspeed.checkpoint.dcp.chunked import ChunkedCheckpoint
from ucp_deepspeed.checkpoint.dcp.entries import MISSING_HINT, Entries
from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME, read_metadata
from ucp_deepspeed.checkpoint.dcp.record import RECORD_KEY, Record
from ucp_deepspeed.checkpoint.dcp.sorting import StoredGroup, sort_keys
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError

logger = logging.getLogger("ucp_deepspeed")

SCHEDULERS = ("lr_scheduler", "scheduler", "lr_schedulers")
"""Names that programs give to the scheduler's state, at the top of what they save or beside model and optimizer."""

STEPS = ("step", "global_step", "global_steps")
"""Names that programs give to the number of steps taken, at the top or in a ``train_state``."""


class DcpCheckpoint(ChunkedCheckpoint):
    """A folder of ``torch.distributed.checkpoint``. See `Checkpoint`.

    Each stored chunk is a box of the whole parameter, so that its topology is one rank. A parameter that an optimizer has is
    trainable, and its stored value is the master: FSDP2 keeps parameters in fp32 under mixed precision. If it is stored in
    another type, the master has that type. Everything else counts as frozen.

    Raises:
        DamagedCheckpointError: a file is missing or truncated, or the metadata can't be read.
        UnsupportedError: nothing tells which tensors are the model's, or their type has no universal form.
    """

    form = "torch.distributed.checkpoint"

    def __init__(self, path: Path) -> None:
        self.path, self.versions = path, FileVersions()
        self.versions.note(path / METADATA_NAME)
        self._metadata = read_metadata(path / METADATA_NAME)
        self._entries = Entries(self._metadata, self.versions)
        self._entries.check_files()
        self._record, self._sorted = Record.read(self._entries), sort_keys(self._entries)
        index = self._index = None if self._record is None else self._record.index
        self.patterns = {} if index is None else index.told_patterns
        self.vocabulary_size = None if index is None else index.vocabulary_size
        self.tied = {} if index is None else index.tied
        self._use_record()
        self.lacking = self._why_lacking()
        trained = self._trained()
        self.parameters = {name: self._parameter(name, name in trained) for name in self._sorted.weights}
        self._refuse_strays()
        self.groups = self._read_groups()
        self.run = self._read_run()

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`: what was saved beside model, optimizer and scheduler."""
        left_out = self.unreadable()
        return str(self._metadata.path), {key: value for key, value in self._rest.items() if key not in left_out}

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """See `Checkpoint.unreadable`."""
        found = ((key, opaque_in(value)) for key, value in self._rest.items())
        return {key: kind for key, kind in found if kind is not None}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`."""
        if self._record is not None:
            return (self._record.values("extra_states"),)
        return ({key: self._readable(each) for key, each in self._sorted.extra.items()},)

    def _use_record(self) -> None:
        """Take names from the record, if there is one: tied parameters stand under each of theirs."""
        if self._index is None:
            return
        held, weights = self._sorted, self._index.parameters.keys()
        held.weights = {name: key for name, key in held.weights.items() if name not in self.tied or name in weights}
        states = {name: set(each.states) - {MASTER, WEIGHT} for name, each in self._index.parameters.items()}
        if held.weights.keys() != weights or any(
            not each <= held.states.get(name, {}).keys() for name, each in states.items()
        ):
            told = f"{self._metadata.path}: entry {RECORD_KEY!r} tells of other parameters or states than there are"
            raise DamagedCheckpointError(f"{told}; {MISSING_HINT}")
        held.weights = {name: held.weights[name] for name in weights}  # in the model's order

    def _trained(self) -> set[str]:
        """Return the names of the parameters that the optimizer has."""
        if self._index is not None:
            return {name for name, held in self._index.parameters.items() if held.kind == "trainable"}
        if self.lacking is not None:
            return set()
        return self._sorted.states.keys() | {name for group in self._sorted.groups for name in group.names}

    def _why_lacking(self) -> MismatchError | None:
        """Return why there is no optimizer state to go on with; None if there is."""
        held, path = self._sorted, self._metadata.path
        if self._record is not None:
            return None
        if held.by_position:
            return MismatchError(
                f"{path} holds optimizer states by number and not by name, as optimizer.state_dict() has them; save what "
                f"get_optimizer_state_dict returns. The weights are whole: {WEIGHTS_HINT}"
            )
        if not held.states and not held.groups:
            return MismatchError(f"{path} holds no optimizer state, only weights: {WEIGHTS_HINT}")
        if unknown := sorted(self._named() - held.weights.keys()):
            told = f"{path} holds optimizer states of parameters without a weight"
            return MismatchError(told, unknown, f"save the whole model beside its optimizer. As it is, {WEIGHTS_HINT}")
        return None

    def _named(self) -> set[str]:
        return {*self._sorted.states, *(name for group in self._sorted.groups for name in group.names)}

    def _parameter(self, name: str, trained: bool) -> Parameter:
        found = super()._parameter(name, trained)
        if self._record is None:
            return found
        entry, scalars = self._record.index.parameters[name], self._record.scalars(name)
        return replace(found, kind=entry.kind, scalars=scalars, may_be_buffer=entry.may_be_buffer)

    def _read_groups(self) -> tuple[ParameterGroup, ...]:
        """Read the groups. Parameters of the flattened form are in one group if their hyper-parameters are the same."""
        if self._record is not None:
            return self._record.groups
        if self.lacking is not None:
            return ()
        found: list[ParameterGroup] = []
        for stored in self._sorted.groups:
            settings = self._settings(stored)
            same = next((each for each in found if same_value(each.hyperparameters, settings)), None)
            if same is None or len(stored.names) != 1:
                found.append(ParameterGroup(stored.names, settings))
            else:
                found[found.index(same)] = replace(same, names=(*same.names, *stored.names))
        return tuple(found)

    def _settings(self, group: StoredGroup) -> dict[str, Any]:
        found = {key: self._readable(each) for key, each in group.keys.items()}
        one = {key for key, value in found.items() if isinstance(value, torch.Tensor) and value.numel() == 1}
        return {key: value.item() if key in one else value for key, value in found.items()}

    @cached_property
    def _saved(self) -> dict[str, Any]:
        """Everything that was saved beside model and optimizer, as it was nested."""
        tree: dict[Any, Any] = {}
        for key in self._sorted.rest:
            *path, last = self._metadata.paths[key]
            place = tree
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise DamagedCheckpointError(
                        f"{self._metadata.path} has {key!r:.80} inside another entry; {MISSING_HINT}"
                    )
            place[last] = self._entries.value(key)
        return {str(key): _listed(value) for key, value in tree.items()}

    @cached_property
    def _scheduler_place(self) -> tuple[dict[str, Any], str] | None:
        """The mapping that holds the scheduler's state, and its key there."""
        apps = [value for value in self._saved.values() if isinstance(value, dict)]
        return next(((place, key) for place in (self._saved, *apps) for key in SCHEDULERS if key in place), None)

    @cached_property
    def _rest(self) -> dict[str, Any]:
        """The client state: all that was saved, without what is restored from it."""
        if self._record is not None:
            return self._record.values("client_state")
        place = self._scheduler_place
        if place is None or not isinstance(self.run.lr_scheduler, Mapping):
            return self._saved
        held, key = place
        kept = {name: value for name, value in held.items() if name != key}
        if held is self._saved:
            return kept
        inner = {name: kept if value is held else value for name, value in self._saved.items()}
        return {name: value for name, value in inner.items() if value != {} or self._saved[name] == {}}

    def _read_run(self) -> RunState:
        if self._record is not None:
            return self._record.run
        precision = self._precision()
        if self.lacking is None and precision != "fp32":
            logger.info("%s: parameters are stored in %s; these are the masters", self.path, precision)
        scheduler = None
        if self._scheduler_place is not None:
            held, key = self._scheduler_place
            scheduler = held[key]
            if isinstance(scheduler, list) and len(scheduler) == 1:
                (scheduler,) = scheduler
            if not isinstance(scheduler, Mapping) or opaque_in(scheduler) is not None:
                scheduler = None
        return RunState(precision, self._steps(), None, 0, scheduler, None, "")

    def _steps(self) -> int:
        """Return the number of steps taken: as the program says, or else as the optimizer does."""
        apps = [self._saved, *(value for value in self._saved.values() if isinstance(value, dict))]
        for place in apps:
            for key in STEPS:
                value = place.get(key)
                value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                    return value
        counts: Sequence[float] = [each.scalars["step"] for each in self.parameters.values() if "step" in each.scalars]
        return int(max(counts, default=0))


def _listed(value: Any) -> Any:
    """Return a nested value with lists in the place of dictionaries whose keys are the numbers from 0 on."""
    if not isinstance(value, dict):
        return value
    found = {key: _listed(each) for key, each in value.items()}
    numbered = bool(found) and all(type(key) is int for key in found) and sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))] if numbered else found
