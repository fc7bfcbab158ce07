"""The catalog of a DCP folder: model and optimizer of FSDP2, torchtitan, or anything else that saves ``state_dict``s with DCP."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import (
    MASTER,
    WEIGHT,
    WEIGHTS_HINT,
    Checkpoint,
    Deferred,
    FileExtent,
    Kind,
    Parameter,
    ParameterGroup,
    Precision,
    RunState,
)
from ucp_deepspeed.checkpoint.dcp.entries import MISSING_HINT, Entries
from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME, StoredTensor, read_metadata
from ucp_deepspeed.checkpoint.dcp.record import RECORD_KEY, Record
from ucp_deepspeed.checkpoint.dcp.sorting import StoredGroup, sort_keys
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import is_number_in_tensor
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS, TORCH_DTYPES
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, UnsupportedError
from ucp_deepspeed.layout import Layout, LocalTensor, Shape, Topology
from ucp_deepspeed.layout.layout import pieces_of
from ucp_deepspeed.plan import Fragment

logger = logging.getLogger("ucp_deepspeed")

SCHEDULERS = ("lr_scheduler", "scheduler", "lr_schedulers")
"""Names that programs give to the scheduler's state, at the top of what they save or beside model and optimizer."""

STEPS = ("step", "global_step", "global_steps")
"""Names that programs give to the number of steps taken, at the top or in a ``train_state``."""


class DcpCheckpoint(Checkpoint):
    """A folder of ``torch.distributed.checkpoint``. See `Checkpoint`.

    Each stored chunk is a box of the whole parameter, so that its topology is one rank. A parameter that an optimizer has is
    trainable, and its stored value is the master: FSDP2 keeps parameters in fp32 under mixed precision. If it is stored in
    another type, the master has that type. Everything else counts as frozen.

    Raises:
        DamagedCheckpointError: a file is missing or truncated, or the metadata can't be read.
        UnsupportedError: nothing tells which tensors are the model's, or their type has no universal form.
    """

    topology = Topology()
    recorded_shapes: Mapping[str, Shape] = MappingProxyType({})
    logical_names: Mapping[str, str] = MappingProxyType({})
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
        self._layout_of = lru_cache(maxsize=None)(self._find_layout)
        trained = self._trained()
        self.parameters = {name: self._parameter(name, name in trained) for name in self._sorted.weights}
        self._refuse_strays()
        self.groups = self._read_groups()
        self.run = self._read_run()

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
        return self._layout_of(self._sorted.weights[name])

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

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`."""
        self._entries.check_files()

    def _key(self, name: str, state: str) -> str:
        if state not in self.parameters[name].states:
            raise KeyError(state)
        return self._sorted.weights[name] if state in (MASTER, WEIGHT) else self._sorted.states[name][state]

    def _tensor(self, name: str) -> StoredTensor:
        return self._metadata.tensors[self._sorted.weights[name]]

    def _find_layout(self, key: str) -> Layout:
        tensor = self._metadata.tensors[key]
        try:
            held = (LocalTensor(box.shape, pieces_of(box, (0,) * len(box.shape))) for box in tensor.chunks)
            return Layout(tensor.shape, tuple(held))
        except ValueError as error:
            told = f"{self._metadata.path} doesn't list the chunks of a whole tensor for {key!r:.80}: {error}"
            raise DamagedCheckpointError(f"{told}; {MISSING_HINT}") from error

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
        tensor = self._tensor(name)
        states = {MASTER if trained else WEIGHT: self._dtype(self._sorted.weights[name])}
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
            elif (
                held.chunks.keys() == tensor.chunks.keys() and held.shape == tensor.shape and held.dtype in TORCH_DTYPES
            ):
                states[state] = self._dtype(key)
            elif (
                self._layout_of(key).logical_shape != self.layout(name).logical_shape or held.dtype not in TORCH_DTYPES
            ):
                found = f"{held.dtype}, shape {held.shape}"
                refused[state] = (
                    f"optimizer state {state!r} isn't element-wise: {found} of {tensor.shape} ({self.path})"
                )
            else:
                told = f"optimizer state {state!r} is cut in another way than its parameter ({self.path})"
                refused[state] = f"{told}; save it with the parameter's placements"
        read = partial(lambda keys: {state: self._entries.number(key) for state, key in keys.items()}, numbers)
        scalars: Mapping[str, float] = Deferred(read) if numbers else {}
        kind: Kind = "trainable" if trained else "frozen"
        untold = not trained
        if self._record is not None:
            entry = self._record.index.parameters[name]
            kind, scalars, untold = entry.kind, self._record.scalars(name), entry.may_be_buffer
        return Parameter(name, kind, (tensor.shape,), states, scalars, refused, may_be_buffer=untold)

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

    def _readable(self, key: str) -> Any:
        value = self._entries.value(key)
        if (kind := opaque_in(value)) is not None:
            told = f"{self.path} holds an object of class {kind} as {key!r:.80}, which could run code when loaded and is refused"
            raise DamagedCheckpointError(f"{told}; save it as plain numbers, texts, lists and dictionaries")
        return value

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
        dtypes = {self._tensor(name).dtype for name, each in self.parameters.items() if each.kind == "trainable"}
        dtypes = dtypes or {held.dtype for held in map(self._tensor, self.parameters) if held.dtype.is_floating_point}
        precision: Precision = next((name for name, dtype in PRECISIONS.items() if dtype in dtypes), "fp32")
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
