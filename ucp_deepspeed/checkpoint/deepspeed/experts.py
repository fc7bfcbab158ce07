"""The ranks whose files hold the experts of a native checkpoint, for DeepSpeed's own layers and for AutoEP's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Kind
from ucp_deepspeed.checkpoint.deepspeed.autoep import AutoEpLayer
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.stage0_slots import Groups, stage0_slots
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import NamedShapes, Share
from ucp_deepspeed.checkpoint.expert_names import (
    ExpertRanks,
    expert_of,
    holder_of,
    names_on,
    numbers_of_experts,
    optimizer_file,
    recognise_experts,
)
from ucp_deepspeed.checkpoint.slots import Located, NumbersReader, Slot, numels_of, place_of, shapes_of
from ucp_deepspeed.checkpoint.torch_files.damage import telling_damage
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import FlatGroup, Topology


def expert_parallel_size(files: DeepSpeedFiles, topology: Topology) -> int:
    """Return the largest expert-parallel size, since layers may differ in it. 1 without experts.

    Raises:
        UnsupportedError: AutoEP's experts are in a pipeline, or beside DeepSpeed's own layers.
    """
    if files.autoep:
        others = len(files.expert_totals) * 3 > len(files.autoep.layers)
        if topology.pp > 1 or others:
            reason = "beside DeepSpeed's own mixture-of-experts layers" if others else "in a pipeline"
            raise UnsupportedError(
                f"{files.path} holds layers of DeepSpeed's AutoEP {reason}, which this release can't read"
            )
        return files.autoep.ep
    if not files.expert_totals:
        return 1
    param_shapes = files.param_shapes(0)
    if param_shapes is None:
        return 1 + max((held[0] for name in files.names if (held := optimizer_file(name))), default=0)
    groups = enumerate(tuple(group) for group in param_shapes)
    sizes = [_expert_ranks(files, topology, 0, index, names).ep for index, names in groups if numbers_of_experts(names)]
    return max(sizes, default=1)


def _data_first(files: DeepSpeedFiles) -> bool:
    return bool(files.config.get("use_data_before_expert_parallelism"))


def _expert_ranks(
    files: DeepSpeedFiles, topology: Topology, rank: int, index: int, names: tuple[str, ...]
) -> ExpertRanks:
    file = files.optimizer_state(rank, 0)
    cut = file.partition_count(index, topology.dp)
    return recognise_experts(names, files.expert_totals, cut, topology.dp, topology.tp, _data_first(files), file.path)


def shares_of_group(
    files: DeepSpeedFiles, topology: Topology, rank: int, index: int, named: NamedShapes
) -> list[Share]:
    """Return the parts of a flat group under ZeRO that the ranks hold: all the same, or each some of the experts."""
    names, shapes = tuple(named), shapes_of(named)
    autoep = not files.autoep.layers.keys().isdisjoint(names)
    if not (autoep or numbers_of_experts(names)):
        return [Share(names, topology.dp, partial(files.optimizer_state, rank))]
    if autoep:
        ranks = ExpertRanks(files.autoep.ep, topology.dp, topology.tp, topology.tp == 1, _data_first(files))
        _check_groups(files, ranks, rank, index)
    else:
        ranks = _expert_ranks(files, topology, rank, index, names)

    def share(ep_rank: int) -> Share:
        parts = [files.autoep.part(name, ep_rank, shape) for name, shape in zip(names, shapes, strict=True)]
        return Share(
            names if autoep else names_on(names, ep_rank),
            ranks.partitions,
            lambda partition: files.optimizer_state(*ranks.holder(ep_rank, partition, rank)),
            tuple(parts) if autoep else (),
        )

    return [share(ep_rank) for ep_rank in range(ranks.ep)]


def _check_groups(files: DeepSpeedFiles, ranks: ExpertRanks, rank: int, index: int) -> None:
    """Compare the ranks that share a sub-group with ZeRO-3's record, if there is one. Tensor-parallel ranks are neighbours
    (``module_inject/auto_ep_folding.py``)."""
    file = files.optimizer_state(rank, 0)
    listed = (file.sharing(index) or {}).get("partition_ranks")
    holders = [ranks.holder(rank % ranks.ep, partition, rank) for partition in range(ranks.partitions)]
    expected = [part * ranks.tp + held for held, part in holders]
    if listed is not None and list(listed) != expected:
        raise UnsupportedError(
            f"{file.path}: ranks {listed} share the experts of sub-group {index}, where a release that "
            f"this one knows would have taken {expected}"
        )


def stage0_expert_slots(
    files: DeepSpeedFiles,
    topology: Topology,
    rank: int,
    owned: Mapping[str, Located],
    groups_of: Callable[[int], Groups | None],
    kinds: Mapping[str, Kind | None],
) -> list[Slot]:
    """Return the slots of a model-parallel rank at stage 0: those without experts, and each expert-parallel rank's experts.

    Each expert-parallel rank keeps all other parameters whole. They are taken from the model-parallel rank's own file, with the
    numbers that each expert-parallel rank has. If experts aren't cut over tensor-parallel ranks, only one of these has the file
    of an expert-parallel rank's optimizer.

    Args:
        owned: weights of the model-parallel rank, each with its file.
        groups_of: expert-parallel rank → names in the optimizer's order, if they are recorded.
        kinds: see `stage0_slots`.
    """
    single = {key: located for key, located in owned.items() if files.autoep.expert_of(key)}

    def slots_in(optimizer: Mapping[str, Any], path: Path, ep_rank: int) -> list[Slot]:
        held = _held_by(files, topology, ep_rank, owned, single, path)
        return stage0_slots(optimizer, held, groups_of(ep_rank), path, kinds)

    experts: list[Slot] = []
    numbers: defaultdict[tuple[str, ...], dict[str, NumbersReader]] = defaultdict(dict)
    for ep_rank in range(topology.ep):
        (saved, path), place = files.expert_optimizer(rank, ep_rank), place_of("expert-parallel rank", ep_rank)
        for slot in slots_in(saved, path, ep_rank):
            held = {place: slot.numbers[place_of("partition", 0)]} if slot.numbers else {}
            if _of_experts(files, slot):
                own = replace(slot, numbers=held)
                experts.append(_with_parts(files, own, ep_rank, single) if files.autoep else own)
            elif optimizer_file(path.name) == (ep_rank, rank):
                numbers[slot.names] |= held
    optimizer, home = files.whole_optimizer(rank)
    others = [slot for slot in slots_in(optimizer, home, 0) if not _of_experts(files, slot)]
    return [replace(slot, numbers=numbers[slot.names] or slot.numbers) for slot in others] + experts


def _of_experts(files: DeepSpeedFiles, slot: Slot) -> bool:
    """Return whether a slot holds experts. DeepSpeed keeps them in groups of their own."""
    return any(name in files.autoep.layers or expert_of(name) is not None for name in slot.names)


def _held_by(
    files: DeepSpeedFiles,
    topology: Topology,
    ep_rank: int,
    owned: Mapping[str, Located],
    single: Mapping[str, Located],
    path: Path,
) -> dict[str, Located]:
    """Return the parameters of an expert-parallel rank's optimizer. AutoEP's experts, each in its own file, have shapes only."""
    numbers = numbers_of_experts(owned)
    held = {
        name: located
        for name, located in owned.items()
        if name not in single and holder_of(name, numbers, topology.ep) in (None, ep_rank)
    }
    for name, layer in files.autoep.layers.items():
        if f"{name}.0" not in single:
            raise DamagedCheckpointError(f"{path.parent} lacks a file with {name} of expert 0")
        first = single[f"{name}.0"][0]
        with telling_damage(path):  # no memory has so many
            held[name] = torch.empty((layer.local, *first.shape), dtype=first.dtype, device="meta"), path
    return held


def _with_parts(files: DeepSpeedFiles, slot: Slot, ep_rank: int, single: Mapping[str, Located]) -> Slot:
    """Turn a slot of local tensors into a slot of parts of whole tensors."""
    parts = [files.autoep.part(name, ep_rank, shape) for name, shape in zip(slot.names, slot.shapes, strict=True)]
    found = replace(slot, shapes=tuple(shape for shape, _ in parts), starts=tuple(start for _, start in parts))
    layer = files.autoep.layers.get(slot.names[0])
    # A plain torch optimizer's masters are the weights: each expert's is in a file of its own.
    plain = slot.kind == "frozen" or "state" in files.whole_optimizer(0)[0]
    return found if layer is None or not plain else _apart(found, layer, ep_rank, single)


def _apart(slot: Slot, layer: AutoEpLayer, ep_rank: int, single: Mapping[str, Located]) -> Slot:
    """Turn a slot into one whose partitions are its experts: each has weights in its own file, and its row of each state."""
    name, numel = slot.names[0], numels_of(slot.shapes)[0] // layer.experts

    def tensor(partition: int, state: str) -> tuple[Any, Path]:
        if state in (MASTER, WEIGHT):
            key = f"{name}.{ep_rank * layer.local + partition}"
            if key not in single:
                raise DamagedCheckpointError(f"no file holds {key}")
            return single[key]
        whole, path = slot.tensor(0, state)
        return whole.reshape(layer.local, -1)[partition], path

    return replace(slot, flattening=FlatGroup((layer.local * numel,), layer.local, alignment=1), tensor=tensor)
