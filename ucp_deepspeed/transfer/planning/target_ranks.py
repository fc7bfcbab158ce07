"""The ranks of a topology on which no engine runs yet, and what each of them would hold.

They are laid out as DeepSpeed does, by default with its default settings: see `BufferSettings`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import WEIGHT, HeldShapes
from ucp_deepspeed.checkpoint.deepspeed.autoep import is_stacked
from ucp_deepspeed.checkpoint.expert_names import holder_of, numbers_of_experts
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.layout import FlatGroup, Flattening, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import split_evenly
from ucp_deepspeed.transfer.planning.target import TargetRank, TargetSlot

RankNumber = tuple[int, int]
"""Model-parallel and data-parallel rank."""


@dataclass(frozen=True, slots=True)
class BufferSettings:
    """Settings of an engine that say how its optimizer lays out its buffers. The defaults are DeepSpeed's.

    Attributes:
        order: logical names in the order in which the optimizer is given its parameters; empty for the model's.
        fused: without ZeRO, each parameter group is one buffer (``FP16_Optimizer``).
        flat: without ZeRO, the state is partitioned all the same (``BF16_Optimizer`` of a pipeline); None if the run's precision
            tells.
        sub_group_size: ZeRO-3's, in elements of a rank.
        round_robin: ``round_robin_gradients`` of ZeRO-1 and 2.
        alignment: each parameter but a group's first begins at a multiple of so many elements (``parameter_alignment``).
    """

    order: tuple[str, ...] = ()
    fused: bool = False
    flat: bool | None = None
    sub_group_size: int = 1_000_000_000
    round_robin: bool = False
    alignment: int = 1


DEFAULT_BUFFERS = BufferSettings()


@dataclass(frozen=True, slots=True)
class Replicas:
    """Ranks that hold the same, and one of them.

    Attributes:
        count: number of these ranks.
        number: this one's number among them.
        experts: whether they hold experts: these have groups of ranks of their own.
    """

    count: int
    number: int
    experts: bool


def target_ranks(
    view: UniversalView,
    topology: Topology,
    local_shapes: Mapping[str, HeldShapes],
    only: Collection[RankNumber] | None = None,
    settings: BufferSettings = DEFAULT_BUFFERS,
) -> Iterator[TargetRank]:
    """Yield what each rank of a topology keeps, ordered by model-parallel and then data-parallel rank.

    Args:
        local_shapes: by logical name, over the target's model-parallel ranks.
        only: leave out all other ranks.
        settings: how the engine lays out its buffers.
    """
    wanted = only if only is not None else set(product(range(topology.model_parallel), range(topology.dp)))
    numbers, spread = numbers_of_experts(local_shapes), replace(topology, dp=topology.dp // topology.ep)
    stacked = stacked_experts(view)
    by_holder: dict[int | None, list[str]] = {}
    for name in local_shapes:
        by_holder.setdefault(holder_of(name, numbers, topology.ep), []).append(name)
    common = [name for name in by_holder.get(None, ()) if name not in stacked]
    for rank in sorted({rank for rank, _ in wanted}):
        shared = _held(view, topology, settings, _numels(local_shapes, common, rank))
        parts = {name: numel // topology.ep for name, numel in _numels(local_shapes, list(stacked), rank).items()}
        experts: dict[int, list[TargetSlot]] = {}
        for part in sorted(part for held, part in wanted if held == rank):
            position, ep_rank = divmod(part, topology.ep)
            if ep_rank not in experts:
                numels = _numels(local_shapes, by_holder.get(ep_rank, ()), rank) | parts
                starts = {name: ep_rank * numel for name, numel in parts.items()}
                experts[ep_rank] = _held(view, spread, settings, numels, starts)
            replicas = Replicas(topology.dp, part, experts=False), Replicas(spread.dp, position, experts=True)
            slots = [_on(slot, replicas[0], view) for slot in shared]
            slots += [_on(slot, replicas[1], view) for slot in experts[ep_rank]]
            trained, weights = (tuple(slot for slot in slots if (slot.group < 0) == left) for left in (False, True))
            yield TargetRank(rank, part, trained, weights, {each: (each.count, each.number) for each in replicas})


def stacked_experts(view: UniversalView) -> dict[str, int]:
    """Return the tensors of AutoEP's layers and their numbers of experts; each rank holds some consecutive ones."""
    shapes = {name: view.logical_shape(name) for name in view.parameters}
    return {name: shape[0] for name, shape in shapes.items() if is_stacked(name, shape)}


def _numels(local_shapes: Mapping[str, HeldShapes], names: Sequence[str], rank: int) -> dict[str, int]:
    return {name: prod(shape) for name in names if (shape := local_shapes[name][rank]) is not None}


def _held(
    view: UniversalView,
    topology: Topology,
    settings: BufferSettings,
    numels: Mapping[str, int],
    starts: Mapping[str, int] = MappingProxyType({}),
) -> list[TargetSlot]:
    """Return what ranks with these parameters partition among them, or hold alike: slots for each parameter group, or without
    ZeRO for each parameter, and one for each frozen parameter and buffer. Elastic files name no groups; then all count as one."""
    stage, dp = topology.zero_stage, topology.dp
    # A bf16 pipeline without ZeRO partitions its states all the same (``engine.py::_do_optimizer_sanity_check``).
    flat = settings.flat if settings.flat is not None else topology.pp > 1 and view.checkpoint.run.precision == "bf16"
    shared = flat or settings.fused or stage > 0
    group_of = {name: number for number, group in enumerate(view.groups) for name in group.names}
    # An optimizer is given no parameter that has no elements on its rank (``runtime/utils.py::is_optimized_parameter``).
    kept = {name for name, numel in numels.items() if numel and view.parameters[name].kind == "trainable"}
    joined: dict[Any, list[str]] = {}
    for name in settings.order or view.parameters:
        if name in numels:
            joined.setdefault(group_of.get(name) if shared and name in kept else (name,), []).append(name)

    def slot(names: Sequence[str]) -> TargetSlot:
        parameter, sizes = view.parameters[names[0]], tuple(numels[name] for name in names)
        trained, begins = names[0] in kept, tuple(starts.get(name, 0) for name in names)
        cut: Flattening = FlatGroup(sizes, 1, alignment=1)
        if stage == 3 and parameter.kind != "buffer":
            cut = SlicedGroup(sizes, dp)
        elif trained and (flat or stage > 0):
            cut = FlatGroup(sizes, dp, _gaps(sizes, settings.alignment), alignment=2)
        group, dtype = (group_of.get(names[0], 0), "F32") if trained else (-1, parameter.states.get(WEIGHT, "F32"))
        return TargetSlot(tuple(names), cut, 0, group, starts=begins, itemsize=ITEMSIZE[dtype])

    return [slot(part) for names in joined.values() for part in _parts(names, numels, topology, settings)]


def _parts(
    names: Sequence[str], numels: Mapping[str, int], topology: Topology, settings: BufferSettings
) -> list[Sequence[str]]:
    """Return the parameters of each buffer of a group, in buffer order: at stage 3 of each sub-group
    (``stage3.py::_create_fp16_sub_groups``), else of one buffer (``stage_1_and_2.py::_round_robin_reorder``)."""
    if topology.zero_stage != 3:
        step = topology.dp if settings.round_robin and topology.zero_stage else 1
        return [[name for first in range(min(step, len(names))) for name in names[first::step]]]
    found: list[list[str]] = [[]]
    held = 0
    for name in names:
        if held >= settings.sub_group_size:
            found.append([])
            held = 0
        found[-1].append(name)
        held += -(-numels[name] // topology.dp)
    return list(found)


def _gaps(sizes: Sequence[int], alignment: int) -> tuple[int, ...]:
    """Return the alignment zeros behind each parameter of a group; behind the last there are none."""
    stop, found = 0, []
    for size in sizes[:-1]:
        stop += size
        found.append(-stop % alignment)
        stop += found[-1]
    return (*found, 0)


def _on(slot: TargetSlot, replicas: Replicas, view: UniversalView) -> TargetSlot:
    """Return a slot as one of the ranks has it."""
    if slot.flattening.partitions > 1:
        return replace(slot, partition=replicas.number)
    # DeepSpeed keeps no group of the ranks that hold an expert's buffer.
    alone = replicas.count == 1 or (replicas.experts and view.parameters[slot.names[0]].kind == "buffer")
    return slot if alone else replace(slot, replicas=replicas)


_Layer = tuple[str, int]
"""The part of a parameter's name before its layer's number, and that number."""

_BEFORE, _BEHIND = ("<", 0), (">", 0)
"""Stand-ins for a layer: for parameters before the first layer and behind the last."""


def stages_of(names: Sequence[str], pp: int) -> dict[str, int]:
    """Return the pipeline stage of each parameter: equally many layers on each stage, one more on the first stages where they
    don't divide.

    A layer is known by the first number in its logical name (``decoder.layers.3.mlp.weight``). Parameters before the layers are
    on the first stage, parameters behind them on the last. Where there are fewer layers than stages, both count as layers.
    Parameters between two layers belong to the former.

    Args:
        names: logical names, in the model's order.
    """
    told = [layer_of(name) for name in names]
    last = max((place for place, layer in enumerate(told) if layer), default=len(names))
    units = [_BEFORE]
    for place, layer in enumerate(told):
        units.append(layer or (_BEHIND if place > last else units[-1]))
    del units[0]
    found = list(dict.fromkeys(units))
    layers = [unit for unit in found if unit not in (_BEFORE, _BEHIND)]
    dealt = layers if len(layers) >= pp else found
    stages = [stage for stage, share in enumerate(split_evenly(len(dealt), pp)) for _ in range(share)]
    stage_of = {_BEFORE: 0, _BEHIND: pp - 1} | dict(zip(dealt, stages, strict=True))
    return {name: stage_of[unit] for name, unit in zip(names, units, strict=True)}


def layer_of(name: str) -> _Layer | None:
    """Return the layer of a name; None for a name without a number between dots."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))
