"""The universal format on disk: an index in JSON and atoms in safetensors. `docs/format.md` is its specification."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, NonNegativeInt, PositiveInt, model_validator

from ucp_deepspeed.checkpoint.bounds import FileName, check_inside
from ucp_deepspeed.checkpoint.checkpoint import (
    MASTER,
    WEIGHT,
    Checkpoint,
    FileExtent,
    Kind,
    LossScale,
    Parameter,
    ParameterGroup,
    Precision,
    RunState,
)
from ucp_deepspeed.checkpoint.checksums import sums_by
from ucp_deepspeed.checkpoint.encoding import decode, has_its_sum, read_document
from ucp_deepspeed.checkpoint.safetensors_files import SafetensorsHeader
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Unique
from ucp_deepspeed.plan import Fragment
from ucp_deepspeed.remote import is_url

INDEX_NAME = "ucp_index.json"
CLIENT_TENSORS_NAME = "client_state.safetensors"
FORMAT_VERSION = 2
PARTIAL_MARK = ".partial-"
"""Part of the names of hidden folders that are being written."""

REPLACED_MARK = "-replaced"
"""End of the name of a folder that another is about to replace, if that takes two renames. A run that is killed between them
leaves this folder, whole, and no other of that tag."""


class _Wire(BaseModel):
    """A part of the index. Later versions may add keys."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class IndexParameter(_Wire):
    """A parameter. ``states`` maps each element-wise state to the file with its atom, whose key is `atom_key`.

    ``may_be_buffer``: see `ucp_deepspeed.checkpoint.checkpoint.Parameter`."""

    kind: Kind
    shape: tuple[NonNegativeInt, ...]
    pattern: Annotated[Pattern, Discriminator("pattern")]
    states: Mapping[str, str]
    scalars: Mapping[str, Any]
    may_be_buffer: bool = False

    @model_validator(mode="after")
    def _has_a_weight(self) -> IndexParameter:
        needed = MASTER if self.kind == "trainable" else WEIGHT
        if needed not in self.states:
            raise ValueError(f"a {self.kind} parameter without the state {needed!r}")
        return self


class IndexGroup(_Wire):
    """A parameter group; ``hyperparameters`` is encoded (`ucp_deepspeed.checkpoint.encoding`)."""

    names: tuple[str, ...]
    hyperparameters: Any


class IndexRun(_Wire):
    """See `ucp_deepspeed.checkpoint.checkpoint.RunState`; ``lr_scheduler`` and ``loss_scale`` are encoded."""

    precision: Precision
    global_steps: NonNegativeInt
    global_samples: NonNegativeInt | None
    skipped_steps: NonNegativeInt
    lr_scheduler: Any
    loss_scale: Any
    ds_version: str


class IndexSource(_Wire):
    """The run that the atoms came from."""

    form: str
    tp: PositiveInt
    pp: PositiveInt
    dp: PositiveInt
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    ep: PositiveInt = 1


class Index(_Wire):
    """The index; see ``docs/format.md``. ``save_id`` and ``checksums`` are missing in version 1."""

    format_version: int = FORMAT_VERSION
    save_id: str | None = None
    checksums: str | None = None
    source: IndexSource
    run: IndexRun
    vocabulary_size: PositiveInt | None
    parameters: Mapping[str, IndexParameter]
    groups: tuple[IndexGroup, ...]
    client_state: Any
    extra_states: Any = {}
    tied: Mapping[str, str] = {}
    files: Mapping[FileName, NonNegativeInt]

    @property
    def told_patterns(self) -> dict[str, Pattern]:
        """Patterns by name. Without tensor parallelism *unique* says nothing of several ranks."""
        return {
            name: entry.pattern
            for name, entry in self.parameters.items()
            if self.source.tp > 1 or not isinstance(entry.pattern, Unique)
        }


def atom_key(name: str, state: str) -> str:
    """Return the name of an atom in its safetensors file."""
    return f"{name}/{state}"


def are_scalars(values: Mapping[Any, Any]) -> bool:
    """Return whether all are names with numbers, as a parameter's ``scalars`` must be."""
    return all(isinstance(key, str) and isinstance(value, int | float) for key, value in values.items())


def home_of(folder: Path) -> Path:
    """Return the folder's home: its own path, or for a folder with `REPLACED_MARK` the path that it had before."""
    name, found, _ = folder.name.removesuffix(REPLACED_MARK).rpartition(PARTIAL_MARK)
    moved = found and name.startswith(".") and folder.name.endswith(REPLACED_MARK)
    return folder.with_name(name.removeprefix(".")) if moved else folder


def is_unfinished(folder: Path) -> bool:
    """Return whether it is hidden and was being written, or removed. If it alone is left of a tag, it is whole."""
    return folder.name.startswith(".") and PARTIAL_MARK in folder.name and home_of(folder).exists()


def decoded(
    encoded: Any,
    what: str,
    path: Path,
    tensors: Mapping[str, Any] | None = None,
    sound: Callable[[dict[Any, Any]], bool] = lambda value: True,
) -> dict[Any, Any]:
    """Decode a mapping of an index, whose keys may be of any kind.

    Raises:
        DamagedCheckpointError: it is none, or not ``sound``; names the index by its path.
    """
    value = decode(encoded, tensors or {})
    if not isinstance(value, dict) or not sound(value):
        raise DamagedCheckpointError(f"{path}: {what} is {str(encoded)[:80]}")
    return value


def run_state_of(run: IndexRun, path: Path) -> RunState:
    """Decode the state of a run; see `decoded`."""
    values = {field.name: getattr(run, field.name) for field in fields(RunState)}
    if run.lr_scheduler is not None:
        values["lr_scheduler"] = decoded(run.lr_scheduler, "lr_scheduler", path)
    if run.loss_scale is not None:
        sound = lambda held: isinstance(held.get("values"), dict) and "cur_scale" in held["values"]  # noqa: E731
        scale = decoded(run.loss_scale, "loss_scale", path, sound=sound)
        values["loss_scale"] = LossScale(bool(scale.get("dynamic")), scale["values"])
    return RunState(**values)


class UniversalCheckpoint(Checkpoint):
    """A universal checkpoint; its topology is one rank; ``source`` is the run it came from. See `Checkpoint`.

    Raises:
        DamagedCheckpointError: the index can't be parsed, or a file is missing or of another size.
        UnsupportedError: a later version wrote it.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        """Args: verify: whether what is read is compared with the checksums, if there are any."""
        self.path, self.versions = path, FileVersions()
        self.versions.note(path / INDEX_NAME)
        index = self.index = read_document(path / INDEX_NAME, Index, "an index", FORMAT_VERSION)
        if index.format_version > 1 and (not has_its_sum((path / INDEX_NAME).read_bytes()) or index.checksums is None):
            raise DamagedCheckpointError(f"{path / INDEX_NAME} isn't as it was written; {REMEDY}")
        if verify:
            self.versions.sums = sums_by(path, index.checksums, index.save_id)
        self.form = f"universal {index.format_version}"
        self.topology = Topology()
        self.source = index.source
        self._check_files()
        self._extents = self._read_extents()
        self.parameters = {
            name: Parameter(
                name,
                entry.kind,
                (entry.shape,),
                {state: self._extents[name, state].dtype for state in entry.states},
                self._decoded(dict(entry.scalars), f"{name}.scalars", sound=are_scalars),
                may_be_buffer=entry.may_be_buffer,
            )
            for name, entry in index.parameters.items()
        }
        self.groups = tuple(
            ParameterGroup(group.names, self._decoded(group.hyperparameters, "hyperparameters"))
            for group in index.groups
        )
        self.run = run_state_of(index.run, path / INDEX_NAME)
        self.patterns = index.told_patterns
        self.recorded_shapes: Mapping[str, Shape] = {}  # its own files hold whole parameters
        self.logical_names = {}
        self.vocabulary_size = index.vocabulary_size
        self.tied = {alias: name for alias, name in index.tied.items() if name in self.parameters}

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        yield Fragment(local_start, local_stop - local_start, self._extents[name, state], local_start)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`."""
        state = self._decoded(self.index.client_state, "client_state", self._client_tensors)
        return str(self.path / INDEX_NAME), state

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`."""
        return (self._decoded(self.index.extra_states, "extra_states", self._client_tensors),)

    def _decoded(
        self,
        encoded: Any,
        what: str,
        tensors: Mapping[str, Any] | None = None,
        sound: Callable[[dict[Any, Any]], bool] = lambda value: True,
    ) -> dict[Any, Any]:
        return decoded(encoded, what, self.path / INDEX_NAME, tensors, sound)

    @cached_property
    def _client_tensors(self) -> Mapping[str, Any]:
        path = self.path / CLIENT_TENSORS_NAME
        if CLIENT_TENSORS_NAME not in self.index.files:
            return {}
        try:
            loaded: Mapping[str, Any] = (
                safetensors.torch.load(path.read_bytes()) if is_url(path) else safetensors.torch.load_file(path)
            )
        except safetensors.SafetensorError as error:
            raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
        return loaded

    def _check_files(self) -> None:
        for name, size in self.index.files.items():
            path = self.path / name
            check_inside(path)
            if not path.is_file():
                raise DamagedCheckpointError(f"{path} is missing; {REMEDY}")
            self.versions.note(path)
            if path.stat().st_size != size:
                raise DamagedCheckpointError(f"{path} has {path.stat().st_size} bytes; the index says {size}; {REMEDY}")
            if (sums := self.versions.sums(str(path))) is not None:
                sums.check_opened(path)

    def _read_extents(self) -> dict[tuple[str, str], FileExtent]:
        used = {file for entry in self.index.parameters.values() for file in entry.states.values()}
        files = [file for file in self.index.files if file in used - {CLIENT_TENSORS_NAME}]
        headers = {file: SafetensorsHeader(self.path / file) for file in files}
        extents: dict[tuple[str, str], FileExtent] = {}
        for name, entry in self.index.parameters.items():
            for state, file in entry.states.items():
                if file not in headers:
                    place = f"{name}/{state} in {file}"
                    raise DamagedCheckpointError(f"{self.path / INDEX_NAME} puts {place}, which it doesn't list")
                extents[name, state] = headers[file].extent(atom_key(name, state), entry.shape)
        return extents
