"""The ranks of a topology on which no engine runs yet, and what each of them would hold.

They are laid out as DeepSpeed does with its default settings: no round robin, no alignment gaps, the model's order inside each
parameter group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Literal

from ucp_deepspeed.checkpoint.checkpoint import WEIGHT, HeldShapes, Kind, Precision
from ucp_deepspeed.checkpoint.deepspeed.autoep import is_stacked
from ucp_deepspeed.checkpoint.experts import holder_of, numbers_of_experts
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.layout import FlatGroup, Flattening, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import split_evenly
from ucp_deepspeed.transfer.planning.target import TargetRank, TargetSlot

RankNumber = tuple[int, int]
"""Model-parallel and data-parallel rank."""


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
) -> Iterator[TargetRank]:
    """Yield what each rank of a topology keeps, ordered by model-parallel and then data-parallel rank.

    Args:
        local_shapes: by logical name, over the target's model-parallel ranks.
        only: leave out all other ranks.
    """
    wanted = only if only is not None else set(product(range(topology.model_parallel), range(topology.dp)))
    numbers, spread = numbers_of_experts(local_shapes), replace(topology, dp=topology.dp // topology.ep)
    stacked = stacked_experts(view)
    by_holder: dict[int | None, list[str]] = {}
    for name in local_shapes:
        by_holder.setdefault(holder_of(name, numbers, topology.ep), []).append(name)
    common = [name for name in by_holder.get(None, ()) if name not in stacked]
    for rank in sorted({rank for rank, _ in wanted}):
        shared = _buffers(view, topology, _numels(local_shapes, common, rank))
        parts = {name: numel // topology.ep for name, numel in _numels(local_shapes, list(stacked), rank).items()}
        experts: dict[int, tuple[_Buffers, _Buffers]] = {}
        for part in sorted(part for held, part in wanted if held == rank):
            position, ep_rank = divmod(part, topology.ep)
            if ep_rank not in experts:
                numels = _numels(local_shapes, by_holder.get(ep_rank, ()), rank) | parts
                experts[ep_rank] = _buffers(view, spread, numels)
            starts = {name: ep_rank * numel for name, numel in parts.items()}
            replicas = Replicas(topology.dp, part, experts=False), Replicas(spread.dp, position, experts=True)
            common_held = _held(view, shared, replicas[0])
            experts_held = _held(view, experts[ep_rank], replicas[1], starts)
            slots, weights = (a + b for a, b in zip(common_held, experts_held, strict=True))
            yield TargetRank(rank, part, slots, weights, {each: (each.count, each.number) for each in replicas})


def stacked_experts(view: UniversalView) -> dict[str, int]:
    """Return the tensors of AutoEP's layers and their numbers of experts; each expert-parallel rank holds some consecutive
    experts."""
    shapes = {name: view.logical_shape(name) for name in view.parameters}
    return {name: shape[0] for name, shape in shapes.items() if is_stacked(name, shape)}


def _numels(local_shapes: Mapping[str, HeldShapes], names: Sequence[str], rank: int) -> dict[str, int]:
    return {name: prod(shape) for name in names if (shape := local_shapes[name][rank]) is not None}


_Buffers = list[tuple[tuple[str, ...], Flattening]]


def _buffers(view: UniversalView, topology: Topology, numels: Mapping[str, int]) -> tuple[_Buffers, _Buffers]:
    """Return the buffers that ranks with these parameters partition among them: the optimizer's slots, and frozen parameters and
    buffers."""
    trained = _cutting(topology, "trainable", view.checkpoint.run.precision)
    slots = [
        (names, trained.flattening(numels, names))
        for group in slot_names(view, topology)
        if (names := tuple(name for name in group if name in numels))
    ]
    weights: _Buffers = [
        ((name,), _cutting(topology, parameter.kind).flattening(numels, (name,)))
        for name, parameter in view.parameters.items()
        if parameter.kind != "trainable" and name in numels
    ]
    return slots, weights


@dataclass(frozen=True, slots=True)
class _Cutting:
    """The way in which data-parallel ranks share a buffer: not at all, each tensor on its own, or all end to end."""

    how: Literal["whole", "sliced", "flat"]
    partitions: int = 1

    def flattening(self, numels: Mapping[str, int], names: Sequence[str]) -> Flattening:
        sizes = tuple(numels[name] for name in names)
        if self.how == "sliced":
            return SlicedGroup(sizes, self.partitions)
        return FlatGroup(sizes, self.partitions, alignment=2 if self.how == "flat" else 1)


def _cutting(topology: Topology, kind: Kind, precision: Precision = "fp32") -> _Cutting:
    if topology.zero_stage == 3 and kind != "buffer":
        return _Cutting("sliced", topology.dp)
    if kind == "trainable" and (topology.zero_stage > 0 or _takes_bf16_optimizer(topology, precision)):
        return _Cutting("flat", topology.dp)
    return _Cutting("whole")


def _takes_bf16_optimizer(topology: Topology, precision: Precision) -> bool:
    """Return whether it is a bf16 pipeline without ZeRO: it partitions its states all the same
    (``engine.py::_do_optimizer_sanity_check``)."""
    return topology.zero_stage == 0 and topology.pp > 1 and precision == "bf16"


def slot_names(view: UniversalView, topology: Topology) -> list[tuple[str, ...]]:
    """Return trained parameters, by the slot that would hold them: one per group, or without ZeRO one per parameter.

    Elastic files name no groups; then all parameters count as one group.
    """
    trained = [name for name, parameter in view.parameters.items() if parameter.kind == "trainable"]
    if _cutting(topology, "trainable", view.checkpoint.run.precision).how == "whole":
        return [(name,) for name in trained]
    group_of = {name: number for number, group in enumerate(view.groups) for name in group.names}
    groups: dict[int | None, list[str]] = {}
    for name in trained:
        groups.setdefault(group_of.get(name), []).append(name)
    return [tuple(names) for names in groups.values()]


def _held(
    view: UniversalView,
    buffers: tuple[_Buffers, _Buffers],
    replicas: Replicas,
    starts: Mapping[str, int] = MappingProxyType({}),
) -> tuple[tuple[TargetSlot, ...], tuple[TargetSlot, ...]]:
    """Return the slots and weights of one of the ranks that hold or partition these buffers."""
    group_of = {name: number for number, group in enumerate(view.groups) for name in group.names}

    def slot(names: tuple[str, ...], cut: Flattening) -> TargetSlot:
        parameter = view.parameters[names[0]]
        trained, begins = parameter.kind == "trainable", tuple(starts.get(name, 0) for name in names)
        group = group_of.get(names[0], 0) if trained else -1
        itemsize = ITEMSIZE["F32" if trained else parameter.states.get(WEIGHT, "F32")]
        found = TargetSlot(names, cut, 0, group, starts=begins, itemsize=itemsize)
        if cut.partitions > 1:
            return replace(found, partition=replicas.number)
        # DeepSpeed keeps no group of the ranks that hold an expert's buffer.
        alone = replicas.count == 1 or (replicas.experts and parameter.kind == "buffer")
        return found if alone else replace(found, replicas=replicas)

    slots, weights = (tuple(slot(*entry) for entry in kind) for kind in buffers)
    return slots, weights


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
    units = _units(names)
    found = list(dict.fromkeys(units))
    layers = [unit for unit in found if unit not in (_BEFORE, _BEHIND)]
    dealt = layers if len(layers) >= pp else found
    stages = [stage for stage, share in enumerate(split_evenly(len(dealt), pp)) for _ in range(share)]
    stage_of = {_BEFORE: 0, _BEHIND: pp - 1} | dict(zip(dealt, stages, strict=True))
    return {name: stage_of[unit] for name, unit in zip(names, units, strict=True)}


def _units(names: Sequence[str]) -> list[_Layer]:
    layers = [layer_of(name) for name in names]
    last = max((place for place, layer in enumerate(layers) if layer), default=len(names))
    units: list[_Layer] = []
    unit = _BEFORE
    for place, layer in enumerate(layers):
        unit = layer or (_BEHIND if place > last else unit)
        units.append(unit)
    return units


def layer_of(name: str) -> _Layer | None:
    """Return the layer of a name; None for a name without a number between dots."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))
