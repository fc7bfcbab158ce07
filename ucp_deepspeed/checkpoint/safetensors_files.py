"""safetensors files: where the header says that tensors lie, and files to write (format: the safetensors README)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.checkpoint.output import Literal, OutputFile, StoredTensor
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import DamagedCheckpointError, worded
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.remote import numbytes_of

WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""Files of Hugging Face's libraries: all weights, or which of several files has which."""


class _Entry(BaseModel):
    """A tensor in the header; offsets are in bytes from the end of the header."""

    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


_ENTRIES = TypeAdapter(dict[str, _Entry | dict[str, str]])
"""Type of the header: tensors by name, and the metadata of the file."""


class SafetensorsHeader:
    """The header of a file, with the position of each tensor. A file without one is a DamagedCheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                fits = length <= min(numbytes_of(file), tunables.DOCUMENT_NUMBYTES)
                raw = file.read(length) if fits else b""
        except OSError as error:
            raise DamagedCheckpointError(f"{path} can't be read: {error}") from error
        try:
            self._entries = _ENTRIES.validate_json(raw)
        except ValidationError as error:
            found = error.errors()[0]
            told = ": ".join((*map(str, found["loc"][-1:]), worded(found)))
            raise DamagedCheckpointError(f"{path} has no safetensors header: {told}") from error
        self.data_offset = 8 + length
        self.data_numbytes = path.stat().st_size - self.data_offset

    @property
    def keys(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(key for key, entry in self._entries.items() if isinstance(entry, _Entry))

    def shape(self, key: str) -> Shape:
        """Return the shape of a tensor, or raise DamagedCheckpointError if there is no such one."""
        entry = self._entries.get(key)
        if not isinstance(entry, _Entry):
            raise DamagedCheckpointError(f"{self.path} lacks {key}")
        return entry.shape

    def extent(self, key: str, shape: Shape) -> FileExtent:
        """Return the range of one tensor. It must have the shape in the index and lie inside the file."""
        found, entry = self.shape(key), self._entries[key]
        assert isinstance(entry, _Entry)
        if entry.dtype not in ITEMSIZE:
            raise DamagedCheckpointError(f"{self.path}: {key} has the unknown dtype {entry.dtype!r}")
        begin, end = entry.data_offsets
        numel = prod(shape)
        if found != shape:
            raise DamagedCheckpointError(f"{self.path}: {key} has shape {list(found)}; the index says {list(shape)}")
        if end - begin != numel * ITEMSIZE[entry.dtype] or not 0 <= begin <= end <= self.data_numbytes:
            raise DamagedCheckpointError(
                f"{self.path}: {key}, {entry.dtype} of shape {list(shape)}, can't lie in bytes {begin} to {end} of "
                f"{self.data_numbytes}"
            )
        return FileExtent(str(self.path), self.data_offset + begin, entry.dtype, numel)


def safetensors_file(
    file_name: str, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None
) -> OutputFile:
    """Lay out a file: the header, so long that data starts on a block, and the tensors, those of the widest elements first.

    Args:
        tensors: by key.
        metadata: texts for the header.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    placed, offset = [], 0
    for key, tensor in sorted(tensors.items(), key=lambda entry: -ITEMSIZE[entry[1].dtype]):
        place = [offset, offset + tensor.numbytes]
        entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        placed.append((tensor, offset))
        offset += tensor.numbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % tunables.BLOCK_NUMBYTES)
    header = Literal(len(text).to_bytes(8, "little") + text)
    data = [region for tensor, start in placed for region in tensor.placed(header.numbytes + start)]
    return OutputFile(file_name, header.numbytes + offset, (header, *data))
