"""A form of checkpoint that knows boxes and not patterns: folders of ``torch.distributed.checkpoint``, as far as tests need."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, Parameter, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.layout import Box, Layout, LocalTensor, Topology
from ucp_deepspeed.layout.layout import pieces_of
from ucp_deepspeed.plan import Fragment


@dataclass(frozen=True)
class Grid:
    """A tensor, and where it is cut along each dimension. torch asks it for the items to write."""

    tensor: torch.Tensor
    cuts: tuple[tuple[int, ...], ...]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        shape = self.tensor.shape
        bounds = [pairwise((0, *cuts, extent)) for cuts, extent in zip(self.cuts, shape, strict=True)]
        properties = TensorProperties.create_from_tensor(self.tensor)
        items = []
        for box in product(*bounds):
            start, sizes = torch.Size(low for low, _ in box), torch.Size(high - low for low, high in box)
            data = TensorWriteData(ChunkStorageMetadata(start, sizes), properties, shape)
            items.append(WriteItem(MetadataIndex(name, start), WriteItemType.SHARD, tensor_data=data))
        return items

    def chunk(self, item: WriteItem) -> torch.Tensor:
        assert item.tensor_data is not None
        start, sizes = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
        return self.tensor[tuple(slice(low, low + size) for low, size in zip(start, sizes, strict=True))].clone()


class _Planner(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: WriteItem) -> Any:
        held = self.state_dict[write_item.index.fqn]
        return held.chunk(write_item) if isinstance(held, Grid) else super().resolve_data(write_item)


def write_chunks(folder: Path, grids: Mapping[str, Grid], threads: int = 2) -> None:
    """Have torch write a folder, in one process, to as many files as threads."""
    writer = dcp.FileSystemWriter(folder, thread_count=threads)
    dcp.save(dict(grids), storage_writer=writer, planner=_Planner(), no_dist=True)


class ChunkedCheckpoint(Checkpoint):
    """The folder of `write_chunks` with tensors ``<parameter>/<state>``; each file has the tensors of torch's archives."""

    form = "chunks"
    topology = Topology()
    patterns: Mapping[str, Any] = {}
    recorded_shapes: Mapping[str, Any] = {}
    logical_names: Mapping[str, str] = {}
    vocabulary_size = None

    def __init__(self, path: Path, copies: Sequence[str] = ()) -> None:
        """Args: copies: parameters whose boxes are all listed twice."""
        self.path, self.versions = path, FileVersions()
        self.run = RunState("bf16", 3, 48, 0, None, None, "0.19.8")
        self._metadata = dcp.FileSystemReader(path).read_metadata()
        states: dict[str, dict[str, str]] = {}
        self._boxes: dict[str, list[torch.Size]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for key, held in self._metadata.state_dict_metadata.items():
            name, state = key.split("/")
            states.setdefault(name, {})[state] = TORCH_DTYPES[held.properties.dtype]
            chunks = held.chunks * (2 if name in copies else 1)
            self._boxes[name] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
            self._shapes[name] = tuple(held.size)
        self.parameters = {
            name: Parameter(name, "trainable", (self._shapes[name],), held, {"step": 3.0})
            for name, held in states.items()
        }
        self.groups = (ParameterGroup(tuple(states), {"lr": 0.1}),)

    def layout(self, name: str) -> Layout:
        boxes = [
            Box(start, tuple(low + size for low, size in zip(start, sizes, strict=True)))
            for start, sizes in self._boxes[name]
        ]
        locals_ = (LocalTensor(box.shape, pieces_of(box, (0,) * len(box.shape))) for box in boxes)
        return Layout(self._shapes[name], tuple(locals_))

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        start, sizes = self._boxes[name][rank]
        found = self._metadata.storage_data[MetadataIndex(f"{name}/{state}", torch.Size(start))]
        path, numel = self.path / found.relative_path, torch.Size(sizes).numel()
        with path.open("rb") as file:
            file.seek(found.offset)
            archive = file.read(found.length)
        extent = FileExtent(str(path), found.offset + _data(archive), self.parameters[name].states[state], numel)
        yield Fragment(local_start, local_stop - local_start, extent, local_start)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        return str(self.path), {}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        return ({},)


def _data(archive: bytes) -> int:
    """Return where the one tensor's elements begin in an archive."""
    import io

    held = zipfile.ZipFile(io.BytesIO(archive))
    (record,) = (entry for entry in held.infolist() if entry.filename.endswith("data/0"))
    lengths = archive[record.header_offset + 26 : record.header_offset + 30]
    return record.header_offset + 30 + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
