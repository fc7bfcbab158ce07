"""Files of one save? Without a manifest only their content tells whether weights and optimizer states were saved together."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, Checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.checkpoint.slots import Located, Slot
from ucp_deepspeed.checkpoint.torch_files.safe_load import read_tensor, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.layout import FlatGroup
from ucp_deepspeed.layout.zero import Slice

logger = logging.getLogger("ucp_deepspeed")

MOST_PLACES, MOST_ELEMENTS = 8, 64
"""Places of a flat group in a partition, and elements at each, that are compared."""

Place = tuple[int, int]
"""A model-parallel rank, and one of its partitions."""


def places_of(checkpoint: DeepSpeedCheckpoint) -> list[Place]:
    """Return the places of all optimizer files of ZeRO, or of experts without it; none where a manifest tells of one save."""
    if checkpoint.manifest is not None:
        return []
    topology = checkpoint.topology
    parts = topology.dp if _is_cut(checkpoint) else topology.ep if topology.ep > 1 else 0
    return [(rank, part) for rank in range(topology.model_parallel) for part in range(parts)]


def _is_cut(checkpoint: DeepSpeedCheckpoint) -> bool:
    return checkpoint.files.partitioned or checkpoint.files.sliced


def _path(checkpoint: DeepSpeedCheckpoint, rank: int, part: int) -> Path:
    files = checkpoint.files
    return files.optimizer_path(rank, part) if _is_cut(checkpoint) else files.expert_optimizer(rank, part)[1]


def check_one_save(checkpoint: DeepSpeedCheckpoint, places: Iterable[Place]) -> None:
    """Compare optimizer files with the model_states files, at some places of `places_of`: the steps that both count, and some
    master weights with the weights that they become.

    Each may rightly differ: an optimizer was begun anew, or somebody changed the weights. So one of the two is a warning.

    Raises:
        DamagedCheckpointError: both differ.
    """
    for rank, partition in places:
        weights = checkpoint.files.model_states_path(rank, 0)
        try:
            if not _is_cut(checkpoint):
                optimizer, path = checkpoint.files.expert_optimizer(rank, partition)
                _tell(checkpoint, path, weights, _most_steps(optimizer.get("state", {}).values(), path), [])
                continue
            slots = [slot for slot in checkpoint.trained_slots(rank) if partition < slot.flattening.partitions]
            path = checkpoint.files.optimizer_path(rank, partition)
            if not path.name.endswith(f"zero_pp_rank_{partition}_mp_rank_{rank:02d}_optim_states.pt"):
                continue  # on machines' own disks another file stands for it
            steps = _steps(checkpoint, rank, partition)
            differing = _differing(checkpoint, rank, partition, slots)
        except (UniversalCheckpointError, OSError):
            continue  # who needs the file is told what is wrong with it
        _tell(checkpoint, path, weights, steps, differing)


def check_read(checkpoint: Checkpoint, paths: Collection[str], known: set[Place]) -> None:
    """Compare those optimizer files that were read, as `check_one_save`, and add their places to those that are ``known``."""
    if isinstance(checkpoint, DeepSpeedCheckpoint):
        read = [place for place in places_of(checkpoint) if str(_path(checkpoint, *place)) in paths]
        check_one_save(checkpoint, [place for place in read if place not in known])
        known.update(read)


def _tell(
    checkpoint: DeepSpeedCheckpoint, path: Path, weights: Path, steps: float | None, differing: Sequence[str]
) -> None:
    taken = checkpoint.run.global_steps - checkpoint.run.skipped_steps
    counts = f"its optimizer has taken {steps:g} steps, and the run {taken}" if steps not in (None, taken) else ""
    values = f"its master weights of {differing[0]} aren't the weights in {weights.name}" if differing else ""
    if counts and values:
        raise DamagedCheckpointError(
            f"{path}: {counts}; {values}: these are files of two saves, or of two runs. If both are meant to be so, "
            f'"load": "never" leaves the load to DeepSpeed'
        )
    if values:
        hint = "a load takes the master weights. Unless somebody changed the weights, it is of another run, or rank"
        logger.warning("%s: %s; %s", path, values, hint)
    elif counts:
        logger.warning("%s: %s. Unless the optimizer was begun anew, it is of another save", path, counts)


def _steps(checkpoint: DeepSpeedCheckpoint, rank: int, partition: int) -> float | None:
    """Return the most steps that a part of an optimizer has taken; None if the file doesn't tell."""
    file = checkpoint.files.optimizer_state(rank, partition)
    return _most_steps([*(file.state(index) for index in range(len(file.masters))), *file.groups], file.path)


def _most_steps(states: Iterable[Mapping[str, Any]], path: Path) -> float | None:
    steps = [state.get("step") for state in states]
    found = [scalar_of(step, path) for step in steps if isinstance(step, int | float) or _is_number(step)]
    return max(found, default=None)


def _is_number(step: object) -> bool:
    return isinstance(step, torch.Tensor) and step.numel() == 1


def _differing(checkpoint: DeepSpeedCheckpoint, rank: int, partition: int, slots: Sequence[Slot]) -> list[str]:
    """Return parameters whose masters in a partition, rounded, aren't their weights, of those that can be compared."""
    weights = checkpoint.weights(rank)
    differing = []
    for slot in slots:
        for part in _chosen(slot, partition):
            name = slot.names[part.index]
            held = weights.get(name)
            if held is None or held[0].numel() != slot.flattening.numels[part.index] or name.startswith(TIED):
                continue
            master, path = slot.tensor(partition, MASTER)
            if not (held[0].is_contiguous() and master.is_contiguous()):
                continue
            mine = _piece((master, path), part.buffer_start, part.numel)
            saved = _piece(held, part.local_start, part.numel)
            if not torch.equal(mine.to(saved.dtype).nan_to_num(), saved.nan_to_num()):
                differing.append(name)
    return differing


def _chosen(slot: Slot, partition: int) -> Iterator[Slice]:
    """Yield some short runs of elements that a partition holds, spread over its parameters; none of experts cut in parts."""
    if not isinstance(slot.flattening, FlatGroup) or slot.starts:
        return
    held = list(slot.flattening.held_by(partition))
    for part in held[:: -(-len(held) // MOST_PLACES) or 1]:
        shift = max(part.numel - MOST_ELEMENTS, 0) // 2
        yield Slice(
            part.index,
            partition,
            part.local_start + shift,
            part.buffer_start + shift,
            min(part.numel, MOST_ELEMENTS),
        )


def _piece(held: Located, start: int, numel: int) -> torch.Tensor:
    tensor, path = held
    return read_tensor(tensor.reshape(-1)[start : start + numel], path)
