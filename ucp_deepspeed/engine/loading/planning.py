"""Plan what this rank of a live engine reads: the engine's own slots and tensors, bound to the pure planner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.expert_names import expert_of
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.exchange import is_expert, reaches
from ucp_deepspeed.engine.loading.filling import Filling
from ucp_deepspeed.engine.model import EngineModel, EngineTensor
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.states import scaled_states
from ucp_deepspeed.language import per_rank
from ucp_deepspeed.transfer.evidence.held_values import differing_ties
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers, usable
from ucp_deepspeed.transfer.planning.pairing import Names, Pair, pair
from ucp_deepspeed.transfer.planning.policies import Obstacles, Policies, renaming_hint
from ucp_deepspeed.transfer.planning.rank_planner import RESET_HINT, RankPlanner, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import KeptStates, TargetRank, TargetSlot

logger = logging.getLogger("ucp_deepspeed")


def policies_of(config: UniversalCheckpointConfig, restore: bool, strict: bool) -> Policies:
    """Return the policies that the config and a call of ``engine.load_checkpoint`` make together. A call without states that
    isn't strict begins a run from another model's weights: it takes what matches.

    Args:
        restore: whether the call asks for optimizer states at all, and the engine keeps any.
        strict: its ``load_module_strict``.
    """
    states = config.optimizer_states if restore else "keep"
    warm = not restore and not strict
    initialise, drop = warm or config.on_missing == "init", warm or config.on_extra == "drop"
    keep = config.hyperparameters == "keep"
    return Policies(initialise, drop, states, strict, differing=config.on_differing, keep_settings=keep)


def pair_with(checkpoint: Checkpoint, model: EngineModel, policies: Policies) -> Pair:
    """Pair a checkpoint with the live model; see `pair`. Ranks divide the comparison of parameters that the model ties."""
    compare = partial(differing_ties, share=(dist.get_rank(), dist.get_world_size()))
    found = pair(checkpoint, model, policies, Obstacles(), compare)
    if dist.get_rank() != 0:
        return found
    if not found.obstacles and found.matching.initialised and found.matching.dropped:
        names, parameters = found.names.source, found.checkpoint.parameters
        source: dict[str, Parameter] = {names[name]: parameter for name, parameter in parameters.items()}
        if hint := renaming_hint(source, found.tensors):
            logger.warning("perhaps parameters were renamed: %s", hint)
    for padding in found.rows.told():
        logger.warning("%s", padding)
    if unknown := per_rank(found.patterns):
        logger.info("no layout is known of %d parameters: each tensor-parallel rank takes its own share", len(unknown))
    return found


SCALED_HINT = (
    "with scales that go with whole tensors; DeepSpeed loads them on the topology that saved them, and elsewhere "
    f"the class has to be built with torch.float32, or {RESET_HINT}"
)


def plan_filling(
    found: Pair,
    model: EngineModel,
    optimizer: EngineOptimizer,
    settings: Sequence[Mapping[str, Any]],
    shared_read_bytes: int,
    numbers: PartitionNumbers,
) -> Filling:
    """Plan all that this rank holds, and prove it covered.

    Args:
        settings: for each live parameter group the hyper-parameters that it will have in place of its own; empty to keep them.
        shared_read_bytes: ranks read together what they hold alike, a part by each, if it has at least so many bytes.

    Raises:
        MismatchError: lists everything that doesn't fit: parameters whose names, kinds, shapes, states or scalars don't, or that
            aren't covered, parameter groups, and the scheduler's values.
    """
    scaled = scaled_states(optimizer.base)
    if scaled and found.policies.optimizer_states == "restore":
        found.obstacles.add(None, f"{type(optimizer.base).__name__} keeps {scaled}, {SCALED_HINT}")
    live: dict[str, EngineTensor] = {found.names.target[name]: tensor for name, tensor in model.tensors.items()}
    kept_apart = {  # DeepSpeed marks no experts' buffers; tensor-parallel ranks may hold different experts
        name
        for name, each in live.items()
        if each.tensor is None or expert_of(each.name) is not None or is_expert(each.tensor)
    }
    planner = RankPlanner(
        found, _optimizer_of(optimizer, settings, found.policies.scheduled), kept_apart, shared_read_bytes
    )
    restored = [live[name] for name in planner.restored]
    weights = [each for each in restored if each.kind != "trainable" and each.tensor is not None]
    rank, memories = _rank(model, found.names, target_slots(model, optimizer, found.names), weights)
    rounding = PRECISIONS[found.checkpoint.run.precision] if found.policies.rounded else None
    group, versions = model.tensor_parallel_group, found.checkpoint.versions
    return Filling(rank, memories, planner.plan(rank, numbers), found.policies, rounding, group, versions)


def target_slots(model: EngineModel, optimizer: EngineOptimizer, names: Names) -> list[EngineSlot]:
    """Return the live slots under logical names, with the part of AutoEP's experts that this rank holds."""
    return [
        replace(
            slot,
            names=tuple(names.target[name] for name in slot.names),
            starts=tuple(model.tensors[name].start for name in slot.names),
            replicas=optimizer.replicas(slot),
            itemsize=slot.master.element_size(),
            divisible=slot.master.is_contiguous(),
            exchangeable=_reaches(model, slot.master),
        )
        for slot in optimizer.slots()
    ]


def _rank(
    model: EngineModel, names: Names, slots: Sequence[EngineSlot], weights: Sequence[EngineTensor]
) -> tuple[TargetRank, tuple[torch.Tensor, ...]]:
    """Return this rank, and the memory of its frozen parameters and buffers."""
    memories, held = zip(*(tensor.held() for tensor in weights), strict=True) if weights else ((), ())
    named = tuple(
        replace(slot, names=(names.target[slot.names[0]],), exchangeable=_reaches(model, memory))
        for memory, slot in zip(memories, held, strict=True)
    )
    groups = {slot.replicas for slot in (*slots, *named)} - {None}
    replicas = {group: (dist.get_world_size(group), dist.get_rank(group)) for group in groups}
    return TargetRank(model.rank, 0, tuple(slots), named, replicas), tuple(memories)


def _reaches(model: EngineModel, memory: Any) -> bool:
    return model.tensor_parallel_group is not None and reaches(model.tensor_parallel_group, memory)


def _optimizer_of(
    optimizer: EngineOptimizer, settings: Sequence[Mapping[str, Any]], scheduled: frozenset[str]
) -> TargetOptimizer:
    """Return what the live optimizer tells of its states. It is the same for all slots of a group that have as many
    dimensions."""
    known: dict[tuple[int, int], KeptStates | None] = {}

    def taken(slot: TargetSlot) -> Mapping[str, Any]:
        return settings[slot.group] if slot.group < len(settings) else {}

    def kept_states(slot: TargetSlot) -> KeptStates | None:
        assert isinstance(slot, EngineSlot), "a live one"
        key = slot.group, slot.master.ndim
        if key not in known:
            known[key] = optimizer.kept_states(slot, taken(slot))
        return known[key]

    def goes_on(slot: TargetSlot, saved: Mapping[str, Any]) -> bool:
        return optimizer.is_like(slot.group, saved) and usable(saved).keys() - scheduled <= taken(slot).keys()

    return TargetOptimizer(kept_states, goes_on)
