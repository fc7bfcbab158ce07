"""Values that several ranks hold: parameters of several pipeline stages, whether a run's copies are the same, and which of a
checkpoint's copies a rank takes; and the optimizer's numbers."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES, MASTER
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.checkpoint.torch_files.safe_load import INTEGERS
from ucp_deepspeed.engine.agreement import agreement, gathered_in
from ucp_deepspeed.engine.deepspeed_types import Engine, PipelineModule
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.stage0 import PlainOptimizer
from ucp_deepspeed.engine.optimizers.states import is_number
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.stage_copies import (
    Seen,
    has_one_master,
    held_by_several,
    look,
    may_differ,
    merge,
    on_several_stages,
    settle,
    told_of_lost,
    with_copies_of,
)

logger = logging.getLogger("ucp_deepspeed")


def look_at_copies(checkpoint: Checkpoint, model: EngineModel) -> dict[str, Seen]:
    """Compare the copies that may differ, and that pipeline stages don't just get back: this rank looks at its part of the
    elements."""
    copies, _ = _copies(checkpoint, model)
    return look(checkpoint, copies, (dist.get_rank(), dist.get_world_size())) if copies else {}


def _copies(checkpoint: Checkpoint, model: EngineModel) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Return parameters to compare → the stages that hold them, and this rank's stage if it gets its own copies back, since the
    same stages hold the same of these parameters on both sides."""
    copies = may_differ(checkpoint)
    degrees = [replace(topology, dp=1, zero_stage=0) for topology in (checkpoint.topology, model.topology)]
    if degrees[0] != degrees[1] or held_by_several(checkpoint) != on_several_stages(model.tensors, model.topology.tp):
        return copies, None
    copies = {name: stages for name, stages in copies.items() if has_one_master(checkpoint, name, stages)}
    return copies, model.rank // model.topology.tp


def with_copies_for(
    checkpoint: Checkpoint, model: EngineModel, policies: Policies, seen: Sequence[Mapping[str, Seen]]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the checkpoint with the copies that this rank is to have, and a text for each copy that was chosen.

    A stage that holds what it held before gets its own copies back.

    Args:
        seen: what `look_at_copies` returned on each rank; empty where the checkpoint has one stage.

    Raises:
        MismatchError: copies differ, and nothing tells which to take; lists the parameters.
    """
    (copies, own), found = _copies(checkpoint, model), merge(seen)
    if own is not None:
        held = held_by_several(checkpoint)
        mine = {name: own for name, stages in held.items() if own in stages and own != stages[0]}
        return with_copies_of(checkpoint, mine), told_of_lost(checkpoint, copies, found)
    settled = settle(checkpoint, copies, found, policies.differing, policies.optimizer_states == "restore")
    settled.check(checkpoint)
    return with_copies_of(checkpoint, settled.stages), settled.told


def differing_copies(model: EngineModel, optimizer: EngineOptimizer) -> tuple[str, ...]:
    """Return trained parameters whose copies on pipeline stages differ in masters, states, or numbers. Collective.

    Each rank sums the bits of its part of each tensor, each element times a number made of its place. However a tensor is
    partitioned, the parts' sums add up to the same.
    """
    shared = on_several_stages(model.tensors, model.topology.tp)
    if not shared:
        return ()
    with agreement(tells=True) as told_by_ranks:
        told_by_ranks.mine = (divmod(model.rank, model.topology.tp), *_own_copies(optimizer, shared))
    held: dict[tuple[str, int], tuple[Counter[Any], set[str]]] = defaultdict(lambda: (Counter(), set()))
    for (stage, tp_rank), of_rank, told_by_rank in told_by_ranks.values:
        for (name, state), part in of_rank.items():
            held[name, stage][0][tp_rank, state] += part
        for name, found in told_by_rank.items():
            held[name, stage][1].update(found)

    def of_stage(name: str, stage: int) -> tuple[dict[Any, int], set[str]]:
        totals, told = held[name, stage]
        return {key: total % (1 << 64) for key, total in totals.items()}, told

    return tuple(
        name
        for name, (first, *others) in shared.items()
        if any(of_stage(name, stage) != of_stage(name, first) for stage in others)
    )


def _own_copies(
    optimizer: EngineOptimizer, shared: Collection[str]
) -> tuple[Counter[tuple[str, str]], dict[str, set[str]]]:
    """Return the sums of this rank's parts by name and state, and the numbers by name."""
    sums: Counter[tuple[str, str]] = Counter()
    numbers: dict[str, set[str]] = defaultdict(set)
    for slot in optimizer.slots():
        mine = [name for name in slot.names if name in shared]
        if not mine:
            continue
        kept = {key: value for key, value in optimizer.state_of(slot).items() if not is_number(key, value, slot.master)}
        told = repr(sorted((str(k), _plain(v)) for k, v in optimizer.state_of(slot).items() if k not in kept))
        for name in mine:
            numbers[name].add(told)
        for state, tensor in {MASTER: slot.master, **kept}.items():
            for name, part in _sums(slot, state, tensor, shared):
                sums[name, state] += part
    return sums, numbers


def tell_of_differing(engine: Engine, differing: Sequence[str], form: str) -> None:
    """Warn once for each parameter of an engine whose copies differ; they may never be the same again.

    Args:
        differing: see `differing_copies`.
        form: form of the engine's optimizer; without ZeRO in fp32 DeepSpeed writes only weights, and only one stage's.
    """
    told = engine.__dict__.setdefault("_universal_checkpoint_differing", set())
    new = [name for name in differing if name not in told]
    told.update(new)
    if not new or dist.get_rank() != 0:
        return
    alone = form == PlainOptimizer.form
    kept = "the files hold the weights of the first of these alone" if alone else "these stages go on with their own"
    logger.warning(
        "pipeline stages hold different values of one parameter; %s, and a load on other stages takes the values of the one that "
        'trained it, or if that isn\'t one alone, what "on_differing": "first" or "last" says: %s',
        kept,
        ", ".join(new),
    )


def tell_of_others(engine: Engine, trained: Collection[str]) -> None:
    """Warn of untrained values in a tied module that differ over its stages: each stage has its own copy, and a load takes the
    first.

    It warns once for each engine: often the later stages don't use theirs. Collective over the stages that share a module.
    """
    told = engine.__dict__.setdefault("_universal_checkpoint_told", set())
    if not isinstance(engine, PipelineEngine):
        return
    module: PipelineModule = engine.module
    with agreement():  # the state dict may be the user's
        digests = {
            key: {
                name: _digest(value)
                for name, value in shared["module"].state_dict().items()
                if isinstance(value, torch.Tensor) and f"{TIED}{key}.{name}" not in trained
            }
            for key, shared in module.tied_comms.items()
            if key not in told
        }
    for key, mine in digests.items():
        told.add(key)
        shared = module.tied_comms[key]
        copies = gathered_in(shared["group"], mine)
        differing = [name for name in mine if len({copy.get(name) for copy in copies}) > 1]
        if differing and dist.get_rank() == min(shared["ranks"]):
            logger.warning(
                "pipeline stages hold different values of what isn't trained in module %r; no checkpoint holds those of later "
                "ones: a load gives them those of the first, or, where it is left to DeepSpeed, none: %s",
                key,
                ", ".join(differing),
            )


def _digest(weight: torch.Tensor) -> bytes:
    flat = weight.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(memoryview(flat.view(torch.uint8).numpy()), digest_size=16).digest()


def _sums(slot: EngineSlot, state: str, tensor: Any, wanted: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield the wanted parameters' names, with a sum for each run of a state's elements; for a state that isn't element-wise, one
    sum for all of it."""
    if not _is_in_place(slot, state, tensor):
        digest = int(hashlib.sha256(repr(tensor).encode()).hexdigest(), 16)
        yield from ((name, digest) for name in slot.names if name in wanted)
        return
    flat = tensor.detach().reshape(-1)
    for name, part in slot.fragments(state):
        if name not in wanted:
            continue
        yield name, sum_of_bits(flat[part.buffer_start : part.buffer_start + part.numel], part.local_start)


def _is_in_place(slot: EngineSlot, state: str, tensor: Any) -> bool:
    """Return whether a state has its elements where the slot says."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.element_size() in INTEGERS
        and tensor.numel() == slot.flattening_of(state).buffer_numel(slot.partition)
    )


def sum_of_bits(values: torch.Tensor, start: int) -> int:
    """Return a sum of a flat tensor's bits, modulo 2 ** 64; the sums of a tensor's parts add up to the sum of the whole.

    Args:
        start: place of the first element.
    """
    total = 0
    for begin in range(0, values.numel(), tunables.SUMMED_NUMEL):
        part = values[begin : begin + tunables.SUMMED_NUMEL]
        bits = part.contiguous().view(INTEGERS[part.element_size()]).to(torch.int64)
        place = torch.arange(start + begin, start + begin + bits.numel(), device=bits.device)
        total += int((bits * _spread(place)).sum())
    return total % (1 << 64)


def _spread(place: torch.Tensor) -> torch.Tensor:
    """Return odd numbers that look random, by the finishing steps of the SplitMix64 generator; products wrap around."""
    mixed = (place + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)) | 1


def numbers_are_same(stage: int, optimizer: EngineOptimizer) -> bool:
    """Return whether the numbers that the optimizer keeps are the same on all ranks of each pipeline stage. Collective."""
    with agreement(tells=True) as told:
        told.mine = stage, hashlib.sha256(repr(_numbers_of(optimizer)).encode()).hexdigest()
    return len(set(told.values)) == len({stage for stage, _ in told.values})


def _numbers_of(optimizer: EngineOptimizer) -> list[Any]:
    """Return each group's settings and its slots' numbers, sorted by name: ranks may order groups of experts differently."""
    groups, left_out = optimizer.base.param_groups, {"params", *IMPLEMENTATION_SWITCHES}
    found: list[tuple[str, Any, list[Any]]] = [
        (
            str(group.get("name")),
            sorted((str(key), _plain(value)) for key, value in group.items() if key not in left_out),
            [],
        )
        for group in groups
    ]
    for slot in optimizer.slots():
        state = optimizer.state_of(slot).items()
        kept = [(str(key), _plain(value)) for key, value in state if is_number(key, value, slot.master)]
        found[min(slot.group, len(groups) - 1)][2].append(sorted(kept))
    return sorted(found, key=lambda each: each[0])


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value)
