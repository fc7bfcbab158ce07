"""Make a proven plan of what this rank reads, from a checkpoint and a live engine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.experts import expert_of
from ucp_deepspeed.checkpoint.view import UniversalView, held_shapes, layouts_of
from ucp_deepspeed.engine.known_layouts import known_by_plan
from ucp_deepspeed.engine.loading.exchange import is_expert, reaches
from ucp_deepspeed.engine.loading.filling import BufferPlan, Filling, SlotPlan, WeightPlan
from ucp_deepspeed.engine.loading.pairing import Names
from ucp_deepspeed.engine.model import WEIGHT_DTYPES, EngineModel, EngineTensor
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import per_rank, resolve_patterns
from ucp_deepspeed.layout.pattern import AnyPattern
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers, usable
from ucp_deepspeed.transfer.planning.policies import Matching, Policies
from ucp_deepspeed.transfer.planning.rank_planner import PlannedBuffer, RankPlanner, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import KeptStates, TargetRank, TargetSlot

logger = logging.getLogger("ucp_deepspeed")


def plan_filling(
    checkpoint: Checkpoint,
    model: EngineModel,
    optimizer: EngineOptimizer,
    names: Names,
    matching: Matching,
    policies: Policies,
    settings: Sequence[Mapping[str, Any]],
    shared_read_bytes: int,
    numbers: PartitionNumbers,
) -> Filling:
    """Plan all that this rank holds, and prove it covered.

    Args:
        settings: for each live parameter group the hyper-parameters that it will have in place of its own; empty to keep them.
        shared_read_bytes: ranks read together what they hold alike, a part by each, if it has at least so many bytes.
        numbers: gives the numbers of the checkpoint that the slots take.

    Raises:
        MismatchError: lists every parameter whose shape, states or scalars don't fit, or that isn't covered.
        SpecError: nothing tells the layouts that another tensor-parallel size needs, or the spec doesn't fit.
    """
    restored = frozenset(matching.restored)
    tensors = {names.target[name]: each for name, each in model.tensors.items() if names.target[name] in restored}
    patterns = _patterns(checkpoint, model, names, tensors)
    saved_size, live_size = checkpoint.vocabulary_size, model.vocabulary_size
    view = UniversalView(checkpoint, names.source, patterns, saved_size or live_size, restored)
    shapes = {name: tensor.local_shapes for name, tensor in tensors.items()}
    layouts = layouts_of(view.patterns, shapes, model.topology.tp, live_size or saved_size, "the model")
    planner = RankPlanner(
        view,
        list(tensors),
        layouts,
        model.topology,
        [tensor.local_shapes for tensor in model.tensors.values()],
        policies,
        _optimizer_of(optimizer, settings),
        {name for name, tensor in tensors.items() if tensor.tensor is None or _is_expert(tensor)},
        shared_read_bytes,
    )
    planner.check_shapes()
    for name in planner.reshaped:
        del tensors[name]
    weights = [each for each in tensors.values() if each.kind != "trainable" and each.tensor is not None]
    rank, memories = _rank(model, names, target_slots(model, optimizer, names), weights)
    planned = planner.plan(rank, numbers)
    if planner.problems:
        raise MismatchError(f"{checkpoint.path} doesn't fit the model", [str(problem) for problem in planner.problems])

    def bound(slot: TargetSlot, buffer: PlannedBuffer) -> BufferPlan:
        """Add the process groups of the ranks that divide the buffer."""
        held = buffer.copies, buffer.held, buffer.division
        return BufferPlan(*held, slot.replicas, model.tensor_parallel_group)

    return Filling(
        tuple(
            SlotPlan(live, {state: bound(slot, each) for state, each in found.buffers.items()}, found.scalars)
            for live, slot, found in zip(optimizer.slots(), rank.slots, planned.slots, strict=True)
        ),
        tuple(
            WeightPlan(memory, bound(slot, found))
            for memory, slot, found in zip(memories, rank.weights, planned.weights, strict=True)
        ),
        policies,
        (*planner.grown, *planner.reshaped, *planned.initialised),
        planned.dropped,
        planned.bytes_needed,
        WEIGHT_DTYPES[checkpoint.run.precision] if policies.rounded else None,
        (model.tensor_parallel_group, hashlib.sha256(repr(planned.exchanged).encode()).hexdigest()),
        checkpoint.versions,
        known_by_plan(patterns, names.target, live_size or saved_size),
    )


def _patterns(
    checkpoint: Checkpoint, model: EngineModel, names: Names, tensors: Mapping[str, EngineTensor]
) -> Mapping[str, AnyPattern]:
    """Resolve how each parameter on both sides is sharded, by all that the checkpoint and the model tell."""
    patterns = resolve_patterns(
        [name for name, tensor in tensors.items() if tensor.kind != "buffer"],
        degree=max(checkpoint.topology.tp, model.topology.tp),
        spec=model.spec,
        recorded={names.source[name]: pattern for name, pattern in checkpoint.patterns.items() if name in names.source},
        inferred={names.target[name]: pattern for name, pattern in model.inferred.items()},
        exact=model.exact,
        refused={names.source[name]: why for name, why in checkpoint.refused.items() if name in names.source}
        | {names.target[name]: why for name, why in model.refused.items()},
        local_shapes=held_shapes(checkpoint, names.source),
        same_degree=checkpoint.topology.tp == model.topology.tp,
    )
    if dist.get_rank() == 0 and (unknown := per_rank(patterns)):
        logger.info("no layout is known of %d parameters: each tensor-parallel rank takes its own share", len(unknown))
    return patterns


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
) -> tuple[TargetRank, list[Any]]:
    """Return this rank, and the memory of its frozen parameters and buffers."""
    memories, held = zip(*(tensor.held() for tensor in weights), strict=True) if weights else ((), ())
    named = tuple(
        replace(slot, names=(names.target[slot.names[0]],), exchangeable=_reaches(model, memory))
        for memory, slot in zip(memories, held, strict=True)
    )
    groups = {slot.replicas for slot in (*slots, *named)} - {None}
    replicas = {group: (dist.get_world_size(group), dist.get_rank(group)) for group in groups}
    return TargetRank(model.rank, 0, tuple(slots), named, replicas), list(memories)


def _reaches(model: EngineModel, memory: Any) -> bool:
    return model.tensor_parallel_group is not None and reaches(model.tensor_parallel_group, memory)


def _optimizer_of(optimizer: EngineOptimizer, settings: Sequence[Mapping[str, Any]]) -> TargetOptimizer:
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
        return optimizer.is_like(slot.group, saved) and usable(saved).keys() <= taken(slot).keys()

    return TargetOptimizer(kept_states, goes_on)


def _is_expert(tensor: EngineTensor) -> bool:
    """Return whether a tensor is an expert's, also by its name: DeepSpeed marks no buffers. Tensor-parallel ranks may hold
    different experts."""
    return expert_of(tensor.name) is not None or (tensor.tensor is not None and is_expert(tensor.tensor))
