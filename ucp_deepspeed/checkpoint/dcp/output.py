"""A DCP folder as an output: what ``torch.distributed.checkpoint.load`` reads into a plain module, or one of FSDP2.

The model is under ``model``, the optimizer under ``optim``, in both forms of ``get_optimizer_state_dict``: these differ only in
the keys of hyper-parameters, which lie in the file once.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import random_files
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT, OnUnreadable, Parameter, step_in_group
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.dcp.catalog import DcpCheckpoint
from ucp_deepspeed.checkpoint.dcp.metadata import FILES_ENDING, METADATA_NAME
from ucp_deepspeed.checkpoint.dcp.record import RECORD_KEY, Record
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.output import Output, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.slots import in_tensor
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.torch_files.writing import ArchiveFile, one_behind_another, tensor_archive, write_sums
from ucp_deepspeed.checkpoint.universal.atoms_output import describe
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import naming
from ucp_deepspeed.layout import Shape

OBJECTS_NAME = f"__0_0{FILES_ENDING}"
"""File of everything but parameters and element-wise states."""

SWITCHES: Mapping[str, Any] = {
    **dict.fromkeys(("foreach", "fused")),
    **dict.fromkeys(("maximize", "capturable", "differentiable"), False),
}
"""Hyper-parameters of torch's optimizers that other classes lack, at their defaults: ``dcp.load`` asks for each key."""

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+")
"""Parts of names that ``get_model_state_dict`` leaves out."""

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Chunk:
    """Rows of one tensor, and its key in the folder."""

    key: str
    offsets: Shape
    tensor: StoredTensor


@dataclass(frozen=True)
class DcpOutput(Output):
    """See `Output`.

    Attributes:
        file_numbytes: most bytes in a file of several chunks.
        chunk_numbytes: most bytes in a chunk of several rows.
    """

    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"
    file_numbytes: int = tunables.FILE_NUMBYTES
    chunk_numbytes: int = tunables.DCP_CHUNK_NUMBYTES

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`, and `ucp_deepspeed.checkpoint.universal.atoms_output.describe` for the errors."""
        view = view.under(_without_wrappers(view.logical_of))
        chunks = list(_chunks(view, self.chunk_numbytes))
        files, places = lay_out(chunks, self.file_numbytes)
        homes = {(name, state): "" for name, each in view.parameters.items() for state in each.states}
        index, tensors = describe(view, homes, self.drop_client_state, self.on_unreadable, self.on_differing)
        record = Record(view.checkpoint.path, index, tensors)
        finish, numbytes = partial(_finish, view, record, chunks, places), sum(each.nbytes for each in tensors.values())
        return OutputPlan(tuple(each.file for each in files), finish, numbytes, partial(write_sums, files), view)

    def notes(self, view: UniversalView) -> list[str]:
        """See `Output.notes`."""
        return random_files.left_out(view.checkpoint)


def _without_wrappers(logical_of: Mapping[str, str]) -> dict[str, str]:
    plain = {name: _WRAPPERS.sub("", logical) for name, logical in logical_of.items()}
    return plain if len(set(plain.values())) == len(set(logical_of.values())) else dict(logical_of)


def _key_of(name: str, state: str) -> str:
    return f"model.{name}" if state in (MASTER, WEIGHT) else f"optim.state.{name}.{state}"


def _chunks(view: UniversalView, numbytes: int) -> Iterator[Chunk]:
    """Yield chunks of whole rows: each rank of FSDP2 reads those that it has a part of, whole."""
    for name, parameter in view.parameters.items():
        shape = view.logical_shape(name)
        for state in parameter.states:
            whole = Region.whole(view, name, state)
            row = prod(shape[1:])
            rows = max(numbytes // max(row * ITEMSIZE[whole.dtype], 1), 1)
            extent = shape[0] if shape else 1
            for first in range(0, max(extent, 1), rows):
                count = min(rows, extent - first)
                region = replace(whole, local_start=first * row, numel=count * row)
                sizes = (count, *shape[1:]) if shape else ()
                offsets = (first, *(0 for _ in shape[1:])) if shape else ()
                yield Chunk(_key_of(name, state), offsets, StoredTensor(sizes, (region,)))


def lay_out(chunks: Sequence[Chunk], numbytes: int) -> tuple[list[ArchiveFile], list[_StorageInfo]]:
    """Place the chunks in files; return the place of each too."""
    bins: list[list[ArchiveFile]] = [[]]
    for chunk in chunks:
        archive = tensor_archive(chunk.tensor)
        if bins[-1] and sum(each.file.numbytes for each in bins[-1]) + archive.file.numbytes > numbytes:
            bins.append([])
        bins[-1].append(archive)
    files, places = [], []
    for number, archives in enumerate(bins, 1):
        file, held = one_behind_another(f"__{number}_0{FILES_ENDING}", archives)
        files.append(file)
        places += [_StorageInfo(file.file.file_name, *place) for place in held]
    return files, places


def _finish(
    view: UniversalView,
    record: Record,
    chunks: Sequence[Chunk],
    places: Sequence[_StorageInfo],
    folder: Path,
    sums: Sequence[FileSums],
) -> None:
    """Write all that is small, and the metadata last. Open the result again."""
    metadata = torchs.Metadata({}, {}, {}, torchs.StorageMeta(), "1.0.0")
    for chunk, place in zip(chunks, places, strict=True):
        _add_chunk(metadata, chunk, view, place)
    for alias, owner in view.tied.items():
        _tie(metadata, alias, owner)
    _write_objects(folder / OBJECTS_NAME, metadata, _objects(view, record))
    with naming(folder / METADATA_NAME), (folder / METADATA_NAME).open("wb") as file_:
        pickle.dump(metadata, file_)
    DcpCheckpoint(folder)


def _path_of(key: str, view: UniversalView) -> KeyPath:
    if key.startswith("model."):
        return "model", key.removeprefix("model.")
    name, _, state = key.removeprefix("optim.state.").rpartition(".")
    return "optim", "state", name, state


def _add_chunk(metadata: Any, chunk: Chunk, view: UniversalView, place: _StorageInfo) -> None:
    key, region = chunk.key, chunk.tensor.regions[0]
    held = metadata.state_dict_metadata.get(key)
    if held is None:
        properties = torchs.TensorProperties(dtype=NAMED_DTYPES[region.dtype])
        size = torch.Size(view.logical_shape(region.name))
        held = metadata.state_dict_metadata[key] = torchs.TensorStorageMetadata(properties, size, [])
        metadata.planner_data[key] = _path_of(key, view)
    offsets = torch.Size(chunk.offsets)
    metadata.storage_data[torchs.MetadataIndex(key, offsets, len(held.chunks))] = place
    held.chunks.append(torchs.ChunkStorageMetadata(offsets, torch.Size(chunk.tensor.shape)))


def _tie(metadata: Any, alias: str, owner: str) -> None:
    """Let a further name of a tied parameter have its chunks, as the model's ``state_dict`` has both."""
    key, held = f"model.{alias}", metadata.state_dict_metadata[f"model.{owner}"]
    metadata.state_dict_metadata[key], metadata.planner_data[key] = held, ("model", alias)
    for number, chunk in enumerate(held.chunks):
        place = metadata.storage_data[torchs.MetadataIndex(f"model.{owner}", chunk.offsets)]
        metadata.storage_data[torchs.MetadataIndex(key, chunk.offsets, number)] = place


def _write_objects(path: Path, metadata: Any, objects: Mapping[KeyPath, Any]) -> None:
    """Write what is small; equal values lie in the file once."""
    known: dict[bytes, _StorageInfo] = {}
    with naming(path), path.open("wb") as file:
        for key_path, value in objects.items():
            key, buffer = ".".join(map(str, key_path)), io.BytesIO()
            torch.save(value, buffer)
            content = buffer.getvalue()
            if content not in known:
                known[content] = _StorageInfo(path.name, file.tell(), len(content))
                file.write(content)
            offset = None
            metadata.state_dict_metadata[key] = torchs.BytesStorageMetadata()
            if isinstance(value, torch.Tensor):
                offset = torch.Size([0] * value.ndim)
                chunk = torchs.ChunkStorageMetadata(offset, value.shape)
                properties = torchs.TensorProperties(dtype=value.dtype)
                metadata.state_dict_metadata[key] = torchs.TensorStorageMetadata(properties, value.shape, [chunk])
            metadata.planner_data[key] = key_path
            metadata.storage_data[torchs.MetadataIndex(key, offset)] = known[content]


def _objects(view: UniversalView, record: Record) -> dict[KeyPath, Any]:
    """Return everything but chunks, by path: the optimizer's numbers and groups, scheduler, client state, and the record."""
    found: dict[KeyPath, Any] = {}
    groups = record.groups
    for number, group in enumerate(groups):
        held = [view.parameters[name] for name in group.names]
        settings = _settings(group.hyperparameters, held)
        for key, value in settings.items():
            found["optim", "param_groups", number, key] = value
            found |= {("optim", f"param_groups.{name}.{key}"): value for name in group.names}
        found["optim", "param_groups", number, "params"] = list(group.names)
        for name, scalars in _scalars(view, record, group.names, group.hyperparameters).items():
            found |= {("optim", "state", name, key): in_tensor(value) for key, value in scalars.items()}
    found |= {("model", key): value for key, value in record.values("extra_states").items()}
    run = record.run
    if run.lr_scheduler is not None:
        found |= {("lr_scheduler", key): value for key, value in run.lr_scheduler.items() if isinstance(key, str)}
    found["train_state", "step"] = run.global_steps
    found["client_state",] = record.values("client_state")
    found[RECORD_KEY,] = record.as_value()
    return found


def _settings(held: Mapping[str, Any], parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Return a group's hyper-parameters for torch's optimizers: with its switches, and without a count of steps."""
    settings = {**SWITCHES, **{str(key): value for key, value in held.items() if key not in (GROUP_STEP, "params")}}
    if any("exp_avg_sq" in each.states for each in parameters):
        settings.setdefault("amsgrad", any("max_exp_avg_sq" in each.states for each in parameters))
    return settings


def _scalars(
    view: UniversalView, record: Record, names: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return the numbers of a group's parameters. Where the group alone counts steps, or its last tensor, each gets the count."""
    found = {name: record.scalars(name) for name in names}
    counted = {scalars["step"] for scalars in found.values() if "step" in scalars}
    for name, scalars in found.items():
        parameter = replace(view.parameters[name], scalars=scalars)
        step = step_in_group(parameter, settings)
        if step is None and len(counted) == 1 and parameter.states.keys() - {MASTER}:
            (step,) = counted
        if step is not None:
            scalars.setdefault("step", step)
    return found
