"""A ``torch_dist`` folder as an output: what Megatron-Core's ``dist_checkpointing.load`` reads into a GPTModel and its optimizer.

Layers are stacked, and the optimizer has the form of the distributed one with ``fully_reshardable`` states, as `keys` tells.
"""

from __future__ import annotations

import io
import json
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
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT, OnUnreadable
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME
from ucp_deepspeed.checkpoint.dcp.output import OBJECTS_NAME, Chunk, lay_out
from ucp_deepspeed.checkpoint.dcp.record import Record
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.export.weights import DTYPES
from ucp_deepspeed.checkpoint.output import Output, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.torch_dist.catalog import (
    BACKEND,
    COMMON_NAME,
    CONFIG_NAME,
    ITERATION,
    OPTIMIZER,
    SCHEDULER,
    TorchDistCheckpoint,
)
from ucp_deepspeed.checkpoint.torch_dist.groups import NO_DECAY, OF_EXPERTS, decays
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.torch_files.writing import write_sums
from ucp_deepspeed.checkpoint.universal.atoms_output import describe
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError, UnsupportedError, naming
from ucp_deepspeed.language.schemes import FUSED_NORMS, plain_names
from ucp_deepspeed.layout import Shape

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""The metadata with which a loading program is to make its sharded state dict (``load_content_metadata``)."""

IDENTIFIERS: Mapping[str, Any] = {NO_DECAY: 1.0, "lr_mult": 1.0, OF_EXPERTS: False, "is_decoupled_lr": False}
"""Settings by which Megatron-Core knows a parameter group (``optimizer/optimizer.py``, ``param_group_identifier_keys``)."""

_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.+)")

_LINEAR = re.compile(r"\.linear_\w+\.weight$")
"""Weights of layers that ask for an extra state of theirs, which is None without FP8."""

_CORE = ".layers.self_attention.core_attention._extra_state"
"""The attention's, which Transformer Engine's asks for; others don't mind."""


@dataclass(frozen=True)
class _Place:
    """The key of a weight, and its number in the stack; None if it isn't stacked."""

    key: str
    number: int | None
    count: int

    def shape(self, shape: Shape) -> Shape:
        return shape if self.number is None else (self.count, *shape)

    def chunk(self, prefix: str, first: int, tensor: StoredTensor) -> Chunk:
        offsets = (first, *(0 for _ in tensor.shape[1:])) if tensor.shape else ()
        if self.number is None:
            return Chunk(prefix + self.key, offsets, tensor)
        return Chunk(prefix + self.key, (self.number, *offsets), replace(tensor, shape=(1, *tensor.shape)))


@dataclass(frozen=True)
class TorchDistOutput(Output):
    """See `Output`, and `ucp_deepspeed.checkpoint.dcp.output.DcpOutput`."""

    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"
    file_numbytes: int = tunables.FILE_NUMBYTES
    chunk_numbytes: int = tunables.DCP_CHUNK_NUMBYTES

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`.

        Raises:
            UnsupportedError: parameters aren't those of a dense GPTModel of Megatron-Core, or layers differ.
            MismatchError: parameters have taken different numbers of steps, or groups aren't Megatron-Core's.
        """
        plain = plain_names(view.logical_of.values())
        view = view.under({name: plain[logical] for name, logical in view.logical_of.items()})
        places = _places(view)
        homes = {(name, state): "" for name, each in view.parameters.items() for state in each.states}
        index, tensors = describe(view, homes, self.drop_client_state, self.on_unreadable, self.on_differing)
        record = Record(view.checkpoint.path, index, tensors)
        common = _common(view, record)
        chunks = list(_chunks(view, places, self.chunk_numbytes))
        files, stored = lay_out(chunks, self.file_numbytes)
        finish, numbytes = partial(_finish, view, places, common, chunks, stored), 1 << 16
        return OutputPlan(tuple(each.file for each in files), finish, numbytes, partial(write_sums, files), view)

    def notes(self, view: UniversalView) -> list[str]:
        """See `Output.notes`."""
        found = ["the samples, and kinds of parameters: the form has no place for them"]
        run = view.checkpoint.run
        if run.lr_scheduler is not None and not _is_megatrons(run.lr_scheduler):
            found.append("the scheduler's state, which isn't Megatron-Core's: load without one")
        return [f"left out {each}" for each in found]


def _is_megatrons(state: Mapping[str, Any]) -> bool:
    return {"num_steps", "lr_decay_style"} <= state.keys()


def _places(view: UniversalView) -> dict[str, _Place]:
    """Return the place of each parameter by its name in the view."""
    wrong = [name for name in view.parameters if not name.startswith(("embedding.", "decoder.", "output_layer."))]
    wrong += [name for name in view.parameters if ".experts." in name or ".router." in name]
    if wrong:
        told = f"{view.checkpoint.path} isn't of a dense GPTModel of Megatron-Core"
        raise UnsupportedError(told, wrong, "write another form: --to universal or dcp")
    keys: dict[str, dict[int, str]] = {}
    found: dict[str, _Place] = {}
    for name in view.parameters:
        spelled = name
        for fused, apart in FUSED_NORMS.items():
            spelled = spelled.replace(f".{apart}", f".{fused}")
        if (match := _LAYER.fullmatch(spelled)) is None:
            found[name] = _Place(spelled, None, 1)
        else:
            keys.setdefault(match[1] + match[3], {})[int(match[2])] = name
    count = max((number + 1 for names in keys.values() for number in names), default=0)
    uneven = [key for key, names in keys.items() if len(names) != count]
    uneven += [key for key, names in keys.items() if len({view.logical_shape(each) for each in names.values()}) > 1]
    if uneven:
        told = f"{view.checkpoint.path} has layers that differ, which aren't stacked"
        raise UnsupportedError(told, uneven, "write another form: --to universal or dcp")
    return found | {name: _Place(key, number, count) for key, names in keys.items() for number, name in names.items()}


def _prefix(state: str) -> str:
    return f"optimizer.state.{'param' if state == MASTER else state}."


def _chunks(view: UniversalView, places: Mapping[str, _Place], numbytes: int) -> Iterator[Chunk]:
    """Yield chunks of whole rows: weights as the run computed with them, then masters and states."""
    for name, parameter in view.parameters.items():
        shape, first = view.logical_shape(name), MASTER if MASTER in parameter.states else WEIGHT
        rounded = DTYPES[view.checkpoint.run.precision] if first == MASTER else None
        for prefix, state, dtype in (("", first, rounded), *((_prefix(each), each, None) for each in parameter.states)):
            if state == WEIGHT and prefix:
                continue
            whole = Region.whole(view, name, state, dtype)
            row = prod(shape[1:])
            rows = max(numbytes // max(row * ITEMSIZE[whole.dtype], 1), 1)
            for start in range(0, shape[0] if shape else 1, rows):
                count = min(rows, shape[0] - start) if shape else 1
                region = replace(whole, local_start=start * row, numel=count * row)
                yield places[name].chunk(prefix, start, StoredTensor((count, *shape[1:]) if shape else (), (region,)))


def _common(view: UniversalView, record: Record) -> dict[str, Any]:
    """Return the content of ``common.pt``."""
    run, client_state = record.run, record.values("client_state")
    found = {str(key): value for key, value in client_state.items()}
    found |= {"checkpoint_version": 3.0, ITERATION: run.global_steps, "content_metadata": dict(CONTENT)}
    found[OPTIMIZER] = {
        "optimizer": {"param_groups": _groups(view, record)},
        "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"],
    }
    if run.lr_scheduler is not None and _is_megatrons(run.lr_scheduler):
        found[SCHEDULER] = dict(run.lr_scheduler)
    return found


def _groups(view: UniversalView, record: Record) -> list[dict[str, Any]]:
    """Return the groups as Megatron-Core cuts them: a group with both kinds of parameters becomes two with the same settings."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    step = _step(view, record)
    for group in record.groups:
        for decay in {decays(name, view.logical_shape(name)) for name in group.names}:
            settings = {**IDENTIFIERS, **group.hyperparameters, NO_DECAY: float(decay), GROUP_STEP: step}
            key = tuple(settings[each] for each in IDENTIFIERS)
            if key in found and not same_value(found[key], settings):
                told = f"{view.checkpoint.path} has parameter groups that Megatron-Core takes for one"
                raise MismatchError(told, list(group.names), "such groups may differ in weight decay alone")
            found[key] = settings
    return list(found.values())


def _step(view: UniversalView, record: Record) -> float:
    """Return the steps that all parameters have taken: in their states, or in the groups."""
    held = [record.scalars(name).get(GROUP_STEP, 0) for group in record.groups for name in group.names]
    held += [group.hyperparameters.get(GROUP_STEP) or 0 for group in record.groups]
    steps = sorted({step for step in held if step > 0})
    if len(steps) != 1:
        told = f"{view.checkpoint.path} has parameters that took {steps} steps, and the form keeps one number"
        raise MismatchError(f"{told}; write another form: --to universal or dcp")
    return float(steps[0])


def _finish(
    view: UniversalView,
    places: Mapping[str, _Place],
    common: Mapping[str, Any],
    chunks: Sequence[Chunk],
    stored: Sequence[_StorageInfo],
    folder: Path,
    sums: Sequence[FileSums],
) -> None:
    """Write all that is small, and ``metadata.json`` last. Open the result again."""
    metadata = torchs.Metadata({}, None, {}, torchs.StorageMeta(), "1.0.0")
    for chunk, place in zip(chunks, stored, strict=True):
        _add_chunk(metadata, chunk, view, places, place)
    _write_extra_states(folder / OBJECTS_NAME, metadata, places)
    with naming(folder / COMMON_NAME):
        torch.save(dict(common), folder / COMMON_NAME)
    with naming(folder / METADATA_NAME), (folder / METADATA_NAME).open("wb") as file_:
        pickle.dump(metadata, file_)
    backends = {
        "sharded_backend": BACKEND,
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    with naming(folder / CONFIG_NAME):
        (folder / CONFIG_NAME).write_text(json.dumps(backends), encoding="utf-8")
    TorchDistCheckpoint(folder)


def _add_chunk(
    metadata: Any, chunk: Chunk, view: UniversalView, places: Mapping[str, _Place], stored: _StorageInfo
) -> None:
    region = chunk.tensor.regions[0]
    shape = places[region.name].shape(view.logical_shape(region.name))
    properties = torchs.TensorProperties(dtype=NAMED_DTYPES[region.dtype])
    new = torchs.TensorStorageMetadata(properties, torch.Size(shape), [])
    held = metadata.state_dict_metadata.setdefault(chunk.key, new)
    offsets = torch.Size(chunk.offsets)
    metadata.storage_data[torchs.MetadataIndex(chunk.key, offsets)] = stored
    held.chunks.append(torchs.ChunkStorageMetadata(offsets, torch.Size(chunk.tensor.shape)))


def _write_extra_states(path: Path, metadata: Any, places: Mapping[str, _Place]) -> None:
    """Write one None, for all layers that ask for an extra state."""
    nothing = io.BytesIO()
    torch.save([None], nothing)
    with naming(path), path.open("wb") as file:
        file.write(nothing.getvalue())
    keys = {
        f"{key}/shard_{place.number}_{place.count}"
        for place in places.values()
        if place.number is not None and _LINEAR.search(place.key)
        for key in (f"{place.key.removesuffix('weight')}_extra_state", place.key.partition(".layers.")[0] + _CORE)
    }
    for key in sorted(keys):
        metadata.state_dict_metadata[key] = torchs.BytesStorageMetadata()
        metadata.storage_data[torchs.MetadataIndex(key)] = _StorageInfo(path.name, 0, len(nothing.getvalue()))
