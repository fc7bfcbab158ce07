"""The manifest, which the save hook adds beside DeepSpeed's files. `docs/format.md`, *Manifest*, is its specification."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, NonNegativeInt, PositiveInt, model_validator

from ucp_deepspeed.checkpoint.bounds import FileName, check_regular
from ucp_deepspeed.checkpoint.checkpoint import Kind
from ucp_deepspeed.checkpoint.encoding import has_its_sum, parse_document
from ucp_deepspeed.checkpoint.torch_files.archives import is_archive_file
from ucp_deepspeed.errors import DamagedCheckpointError, why_not_read
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern

MANIFEST_NAME = "ucp_manifest.json"
MANIFEST_VERSION = 1

MARK_NAME = "ucp_unfinished.json"
"""The mark of a save that isn't finished (`ucp_deepspeed.checkpoint.tags`); the manifest takes its place."""

STALE_MANIFEST = (
    f": if the tag was saved again without ucp_deepspeed, remove {MANIFEST_NAME}, which is of the run before"
)
"""Hint about files that a manifest doesn't describe."""


class ManifestParameter(BaseModel):
    """A parameter.

    Attributes:
        kind: whether it was trained; see `Kind`.
        logical_shape: its whole shape; None if it was unknown or not needed.
        pattern: how it was sharded; None if that was unknown or not needed.
        logical_name: the name that a spec gave it, if it isn't its own.
        local_shapes: its shape on each tensor-parallel rank of a stage that holds it, or a single shape if it is the same on all;
            None if stages differ.
        stages: the pipeline stages that hold it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Kind | None = None
    logical_shape: Shape | None = None
    pattern: Annotated[Pattern, Discriminator("pattern")] | None = None
    logical_name: str | None = None
    local_shapes: Annotated[tuple[Shape, ...], Field(min_length=1)] | None = None
    stages: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None


class Manifest(BaseModel):
    """See ``docs/format.md``.

    Attributes:
        format_version: `MANIFEST_VERSION`; a reader refuses a later one.
        topology: of the run that saved.
        optimizer: class of the engine's optimizer, for people.
        vocabulary_size: rows of the unpadded vocabulary, if the user gave it.
        parameter_groups: for each pipeline stage and each parameter group on it the names in the optimizer's order; null for an
            entry that belongs to no parameter of the model.
        group_numbers: for each stage and group of a pipeline, the number of the whole model's group: each stage counts its own.
            None for a group that trains nothing there, and if it wasn't recorded.
        layer_keys: for a pipeline, keys of its layer files → names, for parameters and buffers of tied modules, whose names
            differ from the keys.
        parameters: see `ManifestParameter`.
        has_extra_states: whether modules kept extra states, on any model-parallel rank; None if that wasn't recorded.
        same_numbers: whether the optimizer's numbers, in its states and groups, were the same on all partitions and
            tensor-parallel ranks of each pipeline stage; None if that wasn't recorded.
        differing_copies: trained parameters whose copies on pipeline stages weren't the same, in masters, states or numbers; None
            if that wasn't recorded.
        files: size in bytes of each file that the save wrote, when it was committed.
        earlier: size of each file with a name of DeepSpeed's that lay there from before, and that the save didn't write.
        contents: digests of the content of the run's files (`digest_of`); of earlier releases of the first partition's alone.
        save_id: random, the same in all files of the package's of one save; None if it wasn't recorded.
        checksums: sum of the file of checksums (`ucp_deepspeed.checkpoint.checksums`); None if the save took none.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = MANIFEST_VERSION
    topology: Topology
    optimizer: str
    vocabulary_size: PositiveInt | None = None
    parameter_groups: tuple[tuple[tuple[str | None, ...], ...], ...]
    group_numbers: tuple[tuple[NonNegativeInt | None, ...], ...] | None = None
    layer_keys: Mapping[str, str] = {}
    parameters: Mapping[str, ManifestParameter]
    has_extra_states: bool | None = None
    same_numbers: bool | None = None
    differing_copies: tuple[str, ...] | None = None
    files: Mapping[FileName, NonNegativeInt]
    earlier: Mapping[FileName, NonNegativeInt] = {}
    contents: Mapping[str, str] = {}
    save_id: str | None = None
    checksums: str | None = None

    @model_validator(mode="after")
    def _describes_every_rank(self) -> Manifest:
        if len(self.parameter_groups) != self.topology.pp:
            raise ValueError(f"parameter_groups of {len(self.parameter_groups)} stages, of {self.topology.pp}")
        counts = [len(groups) for groups in self.parameter_groups]
        if self.group_numbers is not None and [len(numbers) for numbers in self.group_numbers] != counts:
            raise ValueError("group_numbers of other groups than parameter_groups")
        for name, entry in self.parameters.items():
            if entry.local_shapes is not None and len(entry.local_shapes) not in (1, self.topology.tp):
                raise ValueError(f"local_shapes of {name} on {len(entry.local_shapes)} ranks, of {self.topology.tp}")
            if entry.stages is not None and max(entry.stages) >= self.topology.pp:
                raise ValueError(f"stages {list(entry.stages)} of {name}, of {self.topology.pp}")
        return self

    @cached_property
    def patterns(self) -> dict[str, Pattern]:
        """Patterns that were known when saving."""
        return {name: entry.pattern for name, entry in self.parameters.items() if entry.pattern is not None}

    @cached_property
    def logical_shapes(self) -> dict[str, Shape]:
        """Whole shapes, if a layout was known when saving."""
        known = self.parameters.items()
        return {name: entry.logical_shape for name, entry in known if entry.logical_shape is not None}

    @cached_property
    def local_shapes(self) -> dict[str, tuple[Shape, ...]]:
        """Shape on each tensor-parallel rank, if recorded."""
        known = ((name, entry.local_shapes) for name, entry in self.parameters.items())
        return {name: held * (self.topology.tp // len(held)) for name, held in known if held is not None}

    @cached_property
    def stages(self) -> list[dict[str, Kind]] | None:
        """Parameters of each pipeline stage with their kinds; None if that isn't recorded of all parameters, or if a rank has no
        elements of a parameter that other ranks train: it is frozen there."""
        found: list[dict[str, Kind]] = [{} for _ in range(self.topology.pp)]
        for name, entry in self.parameters.items():
            if entry.kind is None or entry.local_shapes is None or entry.stages is None:
                return None
            if 0 in map(prod, entry.local_shapes) and entry.kind == "trainable":
                return None
            for stage in entry.stages:
                found[stage][name] = entry.kind
        return found

    @property
    def trained_groups(self) -> list[list[list[str]]]:
        """Names of trained parameters, for each pipeline stage and parameter group."""
        trained = {name for name, entry in self.parameters.items() if entry.kind == "trainable"}
        return [
            [[name for name in group if name is not None and name in trained] for group in groups]
            for groups in self.parameter_groups
        ]

    @cached_property
    def logical_names(self) -> dict[str, str]:
        """Logical names that differ from the parameters' own."""
        return {name: entry.logical_name for name, entry in self.parameters.items() if entry.logical_name is not None}

    def check_file(self, path: Path) -> None:
        """Compare a file's size, and its content if recorded, with the record.

        Raises:
            DamagedCheckpointError: it differs.
        """
        if not path.is_file():
            return
        recorded, found = self.files.get(path.name), path.stat().st_size
        other = f"{path} isn't the file that {MANIFEST_NAME} describes"
        if recorded is not None and found != recorded:
            if is_archive_file(path):
                raise DamagedCheckpointError(f"{other} ({recorded} bytes then, {found} now){STALE_MANIFEST}")
            raise DamagedCheckpointError(f"{path} is truncated: expected {recorded} bytes, found {found}")
        if path.name in self.contents and digest_of(path) != self.contents[path.name]:
            raise DamagedCheckpointError(f"{other}, though of its size{STALE_MANIFEST}")


def digest_of(path: Path) -> str | None:
    """Digest an archive's directory, which has the checksums of all of its records. Return None for other files.

    Raises:
        OSError: it can't be read.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            listed = [(record.filename, record.CRC, record.file_size) for record in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        if (reason := why_not_read(path, error)) is not None:
            raise reason from error
        return None
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a tag folder; None if it was saved without the plugin.

    Raises:
        DamagedCheckpointError: it is no file, can't be parsed, or its text isn't the one that was saved.
        UnsupportedError: a later version wrote it.
    """
    path = folder / MANIFEST_NAME
    if not path.exists() and not path.is_symlink():
        return None
    try:
        check_regular(path)
        if not path.exists():
            raise DamagedCheckpointError(f"{path} is a link to {path.readlink()}, which isn't there; fetch that")
        text = path.read_bytes()
        manifest = parse_document(text, path, Manifest, "a manifest", MANIFEST_VERSION)
        if has_its_sum(text) is False:
            raise DamagedCheckpointError(f"{path} isn't as it was saved")
        return _with_kinds_of_optimizer(manifest)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"{error}; DeepSpeed's own files may be whole: remove {MANIFEST_NAME}, and they are read as it alone wrote them"
        ) from error


def _with_kinds_of_optimizer(manifest: Manifest) -> Manifest:
    """Mark all parameters of the optimizer as trained. Earlier releases used ``requires_grad``, which runs switch off and on."""
    stepped = {name for stage in manifest.parameter_groups for group in stage for name in group}
    mended = {
        name: entry.model_copy(update={"kind": "trainable"})
        for name, entry in manifest.parameters.items()
        if entry.kind == "frozen" and name in stepped and all(map(prod, entry.local_shapes or ()))
    }
    return manifest.model_copy(update={"parameters": {**manifest.parameters, **mended}}) if mended else manifest
