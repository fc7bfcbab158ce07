"""The catalog of a folder that ``save_pretrained`` of Hugging Face's libraries wrote: whole weights, and no optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.bounds import check_plain, check_regular, read_bounded
from ucp_deepspeed.checkpoint.checkpoint import (
    WEIGHT,
    WEIGHTS_HINT,
    Checkpoint,
    FileExtent,
    Parameter,
    ParameterGroup,
    Precision,
    RunState,
)
from ucp_deepspeed.checkpoint.safetensors_files import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, SafetensorsHeader
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES, PRECISIONS
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, worded
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment


def is_huggingface(folder: Path) -> bool:
    """Return whether a folder has weights under the names that ``save_pretrained`` gives."""
    return (folder / WEIGHTS_INDEX_NAME).is_file() or (folder / WEIGHTS_NAME).is_file()


def is_file_of(name: str) -> bool:
    """Return whether a file's name is one that ``save_pretrained`` gives to weights, or their index."""
    return name == WEIGHTS_INDEX_NAME or (name.startswith("model") and name.endswith(".safetensors"))


class _Index(BaseModel):
    """The index of several files: the file of each tensor."""

    weight_map: dict[str, str]


class HuggingFaceCheckpoint(Checkpoint):
    """See `Checkpoint`. Nothing tells which tensors were trained, and which are buffers: the target decides.

    Opening reads the headers of the files.

    Raises:
        DamagedCheckpointError: a file is missing or truncated, or doesn't hold what the index says.
    """

    form = "hugging face"
    topology = Topology()
    groups: tuple[ParameterGroup, ...] = ()
    patterns: Mapping[str, Pattern] = MappingProxyType({})
    recorded_shapes: Mapping[str, Shape] = MappingProxyType({})
    logical_names: Mapping[str, str] = MappingProxyType({})
    vocabulary_size = None

    def __init__(self, path: Path) -> None:
        self.path, self.versions = path, FileVersions()
        self._files = self._read_index()
        headers = {name: self._header(name) for name in dict.fromkeys(self._files.values())}
        self._extents: dict[str, FileExtent] = {}
        self.parameters: dict[str, Parameter] = {}
        for name, file in self._files.items():
            shape = headers[file].shape(name)
            self._extents[name] = extent = headers[file].extent(name, shape)
            self.parameters[name] = Parameter(name, "frozen", (shape,), {WEIGHT: extent.dtype}, {}, may_be_buffer=True)
        self.run = RunState(self._precision(), 0, None, 0, None, None, "")

    def _read_index(self) -> Mapping[str, str]:
        """Return the file of each tensor. Beside a single file an index is passed over, as transformers does."""
        path = self.path / WEIGHTS_INDEX_NAME
        if (self.path / WEIGHTS_NAME).is_file() or not path.is_file():
            return dict.fromkeys(self._header(WEIGHTS_NAME).keys, WEIGHTS_NAME)
        self.versions.note(path)
        check_regular(path)
        try:
            found = _Index.model_validate_json(read_bounded(path, tunables.DOCUMENT_NUMBYTES)).weight_map
        except ValidationError as error:
            raise DamagedCheckpointError(f"{path} is no index: {worded(error.errors()[0])}; {REMEDY}") from error
        for name in found.values():
            try:
                check_plain(name)
            except ValueError as error:
                raise DamagedCheckpointError(f"{path} names a file outside of its folder: {error}") from error
        return found

    def _header(self, name: str) -> SafetensorsHeader:
        """Open a file; it must hold the tensors that the index puts there, and no others."""
        path = self.path / name
        self.versions.note(path)
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing, and {WEIGHTS_INDEX_NAME} names it; {REMEDY}")
        check_regular(path)
        header = SafetensorsHeader(path)
        files = vars(self).get("_files")
        listed = header.keys if files is None else {key for key, file in files.items() if file == name}
        if further := sorted(header.keys - listed):
            raise DamagedCheckpointError(
                f"{path} holds {further[0]}, which {WEIGHTS_INDEX_NAME} doesn't put there; {REMEDY}"
            )
        return header

    def _precision(self) -> Precision:
        types = {NAMED_DTYPES[extent.dtype] for extent in self._extents.values()}
        return next((name for name, dtype in PRECISIONS.items() if dtype in types), "fp32")

    @cached_property
    def lacking(self) -> MismatchError:  # type: ignore[override]
        """See `Checkpoint`."""
        told = f"{self.path} is a folder of Hugging Face's libraries, with weights alone"
        return MismatchError(f"{told}: {WEIGHTS_HINT}")

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        if state != WEIGHT:
            raise KeyError(state)
        yield Fragment(local_start, local_stop - local_start, self._extents[name], local_start)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`: there is none."""
        return str(self.path), {}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`: there are none."""
        return ({},)

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`: opening has read each header, and compared the places of tensors with the sizes."""
