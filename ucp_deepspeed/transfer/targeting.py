"""Plans for a topology on which no engine runs yet: what each of its ranks would read and hold.

The ranks are laid out as DeepSpeed does it with its default settings: no round robin, no alignment gaps, the model's order inside
each parameter group. Local shapes follow from the patterns alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Literal

from ucp_deepspeed.checkpoint.checkpoint import (
    MASTER,
    WEIGHT,
    Checkpoint,
    FileExtent,
    HeldShapes,
    Kind,
    Parameter,
    Precision,
)
from ucp_deepspeed.checkpoint.deepspeed_pipeline import TIED
from ucp_deepspeed.checkpoint.experts import holder_of, numbers_of_experts
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import FlatGroup, Flattening, Layout, Shard, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import Pattern, split_evenly
from ucp_deepspeed.plan import BlockCopy, Fragment, Target, plan_tensor
from ucp_deepspeed.transfer.copying import TransferCount
from ucp_deepspeed.transfer.matching import Matching, Policies, check_matching, is_grown, match

RankNumber = tuple[int, int]
"""Model-parallel and data-parallel rank."""

RESTORE_ALL = Policies()
"""Nothing may be missing or left out."""


@dataclass(frozen=True)
class TargetSlot:
    """Parameters that one rank keeps in one buffer: a partition of master weights, or a frozen weight or buffer of its own.

    Attributes:
        names: logical names, in buffer order.
        flattening: where their elements lie in the buffers of all partitions.
        partition: which partition the rank holds.
    """

    names: tuple[str, ...]
    flattening: Flattening
    partition: int

    def fragments(self) -> Iterator[tuple[str, Fragment[None]]]:
        """For each run of elements that the rank holds: the parameter's name, and where it lies in the buffer."""
        for part in self.flattening.held_by(self.partition):
            yield self.names[part.index], Fragment(part.local_start, part.numel, None, part.buffer_start)

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.flattening.buffer_numel(self.partition)


@dataclass(frozen=True)
class TargetRank:
    """One rank of the target.

    Attributes:
        model_parallel_rank: pipeline stage times tensor-parallel size plus tensor-parallel rank.
        data_parallel_rank: which replica of the model, or which partition of it.
        slots: trained parameters.
        weights: frozen parameters and buffers, each by itself.
    """

    model_parallel_rank: int
    data_parallel_rank: int
    slots: tuple[TargetSlot, ...]
    weights: tuple[TargetSlot, ...]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank would do.

    Attributes:
        model_parallel_rank, data_parallel_rank: see `TargetRank`.
        bytes_read: bytes to copy out of files.
        bytes_held: bytes of the master weights and optimizer states in its partitions, in fp32, padding included.
        copies: strided blocks to copy.
        files: paths of the files that the blocks lie in.
    """

    model_parallel_rank: int
    data_parallel_rank: int
    bytes_read: int
    bytes_held: int
    copies: int
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why the topology is impossible; ``name`` is the parameter concerned, or None when it is the whole model."""

    name: str | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.name is None else f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class TargetPlan:
    """The answer for one topology.

    Attributes:
        topology: the target's.
        matching: which parameters and buffers are on both sides, by logical name; None when the layouts aren't known.
        reset: whether all optimizer states start afresh.
        obstacles: why it is impossible; empty when it isn't.
        remarks: what the figures rest on, in words.
        ranks: ordered by model-parallel and then data-parallel rank; empty when the topology is impossible.
        grown: parameters with further rows than in the checkpoint.
    """

    topology: Topology
    matching: Matching | None
    reset: bool
    obstacles: tuple[Obstacle, ...]
    remarks: tuple[str, ...] = ()
    ranks: tuple[RankPlan, ...] = ()
    grown: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether a load on this topology would succeed, as far as the checkpoint tells."""
        return not self.obstacles

    @property
    def restored(self) -> tuple[str, ...]:
        """Logical names of the parameters and buffers that nothing stands against, in the model's order."""
        refused = {obstacle.name for obstacle in self.obstacles}
        return tuple(name for name in (self.matching.restored if self.matching else ()) if name not in refused)

    @property
    def initialised(self) -> tuple[str, ...]:
        """Those that keep the model's values: in whole, or in further rows, or in their optimizer states alone."""
        found = self.matching
        return (*found.initialised, *found.unfrozen, *self.grown) if found else ()

    @property
    def dropped(self) -> tuple[str, ...]:
        """Those of the checkpoint that the model has no place for, or whose optimizer states it has none for."""
        return (*self.matching.dropped, *self.matching.frozen) if self.matching else ()

    @property
    def files(self) -> frozenset[str]:
        """Paths of all files that some rank reads from."""
        return frozenset().union(*(rank.files for rank in self.ranks))


def plan_target(
    checkpoint: Checkpoint,
    topology: Topology,
    spec: Spec | None = None,
    vocabulary_size: int | None = None,
    model: Checkpoint | None = None,
    policies: Policies = RESTORE_ALL,
    only: Collection[RankNumber] | None = None,
) -> TargetPlan:
    """Plan the ranks of a topology; reads no tensors.

    Args:
        only: leave out all other ranks; costs what these hold, however many there are.
        model: a checkpoint whose parameters are those of the model to load into, where that has changed.
        policies: what the load may do beside restoring.
        spec: the one that the user named; without it, unknown layouts are an obstacle.
        vocabulary_size: rows of the vocabulary without padding; by default what the checkpoint records.

    Raises:
        SpecError: the spec that the user named doesn't fit the parameters.
        MismatchError: the checkpoint's own local shapes contradict the patterns, or its parameter order is ambiguous.
        DamagedCheckpointError: a file is missing, truncated or of another size than expected.
    """
    try:
        source = UniversalView.of(checkpoint, spec, vocabulary_size, topology.tp)
        target = source if model is None else UniversalView.of(model, spec, vocabulary_size, topology.tp)
    except SpecError as error:
        if spec is not None:
            raise
        return TargetPlan(topology, None, False, (*_refused_by_deepspeed(topology), Obstacle(None, str(error))))
    return _Planner(source, target, topology, policies, only).plan()


def target_ranks(
    view: UniversalView,
    topology: Topology,
    local_shapes: Mapping[str, HeldShapes],
    only: Collection[RankNumber] | None = None,
) -> Iterator[TargetRank]:
    """What each rank of a topology keeps, ordered by model-parallel and then data-parallel rank.

    Args:
        local_shapes: by logical name, over the target's model-parallel ranks.
        only: leave out all other ranks.
    """
    wanted = only if only is not None else set(product(range(topology.model_parallel), range(topology.dp)))
    numbers, spread = numbers_of_experts(local_shapes), replace(topology, dp=topology.dp // topology.ep)
    by_holder: dict[int | None, list[str]] = {}
    for name in local_shapes:
        by_holder.setdefault(holder_of(name, numbers, topology.ep), []).append(name)
    for rank in sorted({rank for rank, _ in wanted}):
        shared = _buffers(view, topology, _numels(local_shapes, by_holder.get(None, ()), rank))
        experts: dict[int, tuple[_Buffers, _Buffers]] = {}
        for part in sorted(part for held, part in wanted if held == rank):
            position, ep_rank = divmod(part, topology.ep)
            if ep_rank not in experts:
                numels = _numels(local_shapes, by_holder.get(ep_rank, ()), rank)
                experts[ep_rank] = _buffers(view, spread, numels)
            held = zip(_held(shared, part), _held(experts[ep_rank], position), strict=True)
            yield TargetRank(rank, part, *(one + other for one, other in held))


def _numels(local_shapes: Mapping[str, HeldShapes], names: Sequence[str], rank: int) -> dict[str, int]:
    return {name: prod(shape) for name in names if (shape := local_shapes[name][rank]) is not None}


_Buffers = list[tuple[tuple[str, ...], Flattening]]


def _buffers(view: UniversalView, topology: Topology, numels: Mapping[str, int]) -> tuple[_Buffers, _Buffers]:
    """What ranks that hold these parameters cut among them: the optimizer's slots, and frozen parameters and buffers."""
    trained = _cutting(topology, "trainable", view.checkpoint.run.precision)
    slots = [
        (names, trained.flattening(numels, names))
        for group in _slot_names(view, topology)
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
    """How data-parallel ranks share a buffer: not at all, each tensor on its own, or all end to end."""

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
    """A bf16 pipeline without ZeRO cuts its states all the same (``engine.py::_do_optimizer_sanity_check``)."""
    return topology.zero_stage == 0 and topology.pp > 1 and precision == "bf16"


def _slot_names(view: UniversalView, topology: Topology) -> list[tuple[str, ...]]:
    """Trained parameters, by the slot that would hold them: one per group, or without ZeRO one per parameter.

    Elastic files name no groups; then all count as one.
    """
    trained = [name for name, parameter in view.parameters.items() if parameter.kind == "trainable"]
    if _cutting(topology, "trainable", view.checkpoint.run.precision).how == "whole":
        return [(name,) for name in trained]
    group_of = {name: number for number, group in enumerate(view.groups) for name in group.names}
    groups: dict[int | None, list[str]] = {}
    for name in trained:
        groups.setdefault(group_of.get(name), []).append(name)
    return [tuple(names) for names in groups.values()]


def _held(buffers: tuple[_Buffers, _Buffers], part: int) -> tuple[tuple[TargetSlot, ...], tuple[TargetSlot, ...]]:
    """What one of the ranks has of them."""
    slots, weights = (
        tuple(TargetSlot(names, cut, part if cut.partitions > 1 else 0) for names, cut in kind) for kind in buffers
    )
    return slots, weights


_Layer = tuple[str, int]
"""What stands before a layer's number in the names of its parameters, and that number."""

_BEFORE, _BEHIND = ("<", 0), (">", 0)
"""In place of a layer, for what stands before the first and behind the last."""


def stages_of(names: Sequence[str], pp: int) -> dict[str, int]:
    """The pipeline stage of each parameter: as many layers on each stage, the first stages one more where they don't divide.

    A layer is known by the first number in its logical name (``decoder.layers.3.mlp.weight``). What stands before the layers is
    on the first stage, what stands behind them on the last; where there are fewer layers than stages, both count as layers. What
    stands between two layers belongs to the former.

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
    layers = [_layer_of(name) for name in names]
    last = max((place for place, layer in enumerate(layers) if layer), default=len(names))
    units: list[_Layer] = []
    unit = _BEFORE
    for place, layer in enumerate(layers):
        unit = layer or (_BEHIND if place > last else unit)
        units.append(unit)
    return units


def _layer_of(name: str) -> _Layer | None:
    """None for a name without a number between dots."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def _refused_by_deepspeed(topology: Topology) -> list[Obstacle]:
    if topology.pp > 1 and topology.zero_stage > 1:
        return [
            Obstacle(None, f"DeepSpeed refuses ZeRO-{topology.zero_stage} with pipeline parallelism; use stage 0 or 1")
        ]
    return []


@dataclass
class _Planner:
    """Lays the target out, plans one rank after another, and collects what is wrong.

    Attributes:
        source: the checkpoint.
        view: the model, which has the checkpoint's own parameters where nothing has changed.
    """

    source: UniversalView
    view: UniversalView
    topology: Topology
    policies: Policies
    only: Collection[RankNumber] | None = None
    obstacles: list[Obstacle] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, int, tuple[Fragment[None], ...]], TransferCount] = {}
        self._shapes: dict[str, HeldShapes] = {}
        self._layouts: dict[str, Layout] = {}
        self._grown: list[str] = []
        self._matching = match(self.source.parameters, self.view.parameters)
        self._restored = frozenset(self._matching.restored)

    def plan(self) -> TargetPlan:
        self.obstacles += _refused_by_deepspeed(self.topology)
        self._check_experts()
        self._match()
        self._lay_out()
        self._check_states()
        self._remark()
        targets = () if self.obstacles else target_ranks(self.view, self.topology, self._shapes, self.only)
        ranks = tuple(self._rank(target) for target in targets)
        found = tuple(self.obstacles)
        reset = self.policies.optimizer_states == "reset"
        grown, remarks = tuple(self._grown), tuple(self.remarks)
        return TargetPlan(self.topology, self._matching, reset, found, remarks, () if found else ranks, grown)

    def _check_experts(self) -> None:
        """DeepSpeed's layers want as many experts on each rank, and neither ZeRO-3 nor, here, a pipeline."""
        numbers, topology = numbers_of_experts(self.view.parameters), self.topology
        reasons = {f"EP {topology.ep} doesn't divide DP {topology.dp}": topology.dp % topology.ep > 0}
        if numbers:
            reasons |= {
                "DeepSpeed's own mixture-of-experts layers can't be trained with ZeRO-3": topology.zero_stage == 3,
                "experts in a pipeline are not supported": topology.pp > 1,
            }
        else:
            reasons |= {f"EP {topology.ep}, and the model has no experts": topology.ep > 1}
        self.obstacles += [Obstacle(None, reason) for reason, holds in reasons.items() if holds]
        for layer, number in numbers.items():
            if number % topology.ep:
                self._refuse(layer.rstrip("."), f"EP {topology.ep} doesn't divide its {number} experts")

    def _match(self) -> None:
        try:
            check_matching(self.source.parameters, self.view.parameters, self.policies, "")
        except MismatchError as error:
            for problem in error.problems:
                self._refuse(*problem.split(": ", 1))

    def _lay_out(self) -> None:
        """Local shapes and layouts of the target."""
        held = self._stages()
        for name, pattern in self.view.patterns.items():
            whole = self.view.logical_shape(name)
            try:
                shares = pattern.local_shapes(whole, self.topology.tp)
                self._shapes[name] = tuple(
                    shape if stage in held[name] else None for stage in range(self.topology.pp) for shape in shares
                )
                shapes = {name: self._shapes[name]}
                size = self.view.vocabulary_size
                self._layouts |= layouts_of(self.view.patterns, shapes, self.topology.tp, size, "the target")
            except MismatchError as error:
                self._refuse(name, error.problems[0].removeprefix(f"{name}: "))
            except ValueError as error:
                self._refuse(name, str(error))
            else:
                self._check_rows(name, pattern)

    def _stages(self) -> dict[str, set[int]]:
        """The stages that would hold each parameter: of what several of the checkpoint's stages share, the first and the last."""
        pp, degree = self.topology.pp, self.view.checkpoint.topology.tp
        held = {name: {stage} for name, stage in stages_of(list(self.view.parameters), pp).items()}
        for name, parameter in self.view.parameters.items():
            if sum(shape is not None for shape in parameter.local_shapes) > degree:
                held[name] |= {0, pp - 1}
        if set(range(pp)) != set().union(*held.values()):
            layers = len({layer for name in held if (layer := _layer_of(name))})
            self.obstacles.append(
                Obstacle(None, f"{pp} pipeline stages are too many for the {layers} layers that the names tell")
            )
        return held

    def _check_rows(self, name: str, pattern: Pattern) -> None:
        """A vocabulary whose padding isn't known can't be padded in another way; other shapes must be equal, or have grown."""
        if name not in self._restored:
            return
        found, expected = self.source.logical_shape(name), self._layouts[name].logical_shape
        if self.policies.initialise and is_grown(found, expected):
            self._grown.append(name)
        elif found != expected and self.source is not self.view:
            self._refuse(name, f"expected logical shape {expected}, found {found} in the checkpoint")
        elif found != expected and isinstance(pattern, Shard):
            self._refuse(
                name,
                f"the checkpoint has {found[pattern.dim]} rows, and the target pads them to {expected[pattern.dim]}; say with "
                f'--vocabulary-size ("universal_checkpoint": {{"vocabulary_size": …}}) how many aren\'t padding',
            )

    def _check_states(self) -> None:
        """Each state must be element-wise, and all parameters of a slot must have the same."""
        for name in sorted(self._restored):
            parameter = self.source.parameters[name]
            if parameter.kind != "trainable":
                self.obstacles += [Obstacle(name, reason) for reason in parameter.refused.values()]
        if self.policies.optimizer_states != "restore":
            return
        for names in _slot_names(self.view, self.topology):
            held = [self.source.parameters[name] for name in names if name in self._restored]
            trained = [parameter for parameter in held if parameter.kind == "trainable"]
            for parameter in trained:
                first = trained[0]
                for reason in parameter.refused.values():
                    self._refuse(parameter.name, reason)
                if parameter.states.keys() != first.states.keys() or parameter.scalars != first.scalars:
                    self._refuse(
                        parameter.name,
                        f"has {_states(parameter)}, and {first.name}, which the target keeps in the same buffer, "
                        f"has {_states(first)}",
                    )

    def _refuse(self, name: str, reason: str) -> None:
        self.obstacles.append(Obstacle(name, reason))

    def _remark(self) -> None:
        """Say what was assumed."""
        if self.topology.pp > 1:
            self.remarks.append(
                "layers are dealt out evenly over the stages; the engine's partition_method may cut elsewhere, and stages that "
                "share a tied weight each read it"
            )
        layers = [name for name in self.view.parameters if name.startswith(TIED) or name.split(".")[0].isdecimal()]
        if layers and self.topology.pp == 1:
            self.remarks.append(
                f"names such as {_listed(layers[:1])} are those of a pipeline, of one stage too: for a plain model a spec has to "
                f"give both the same"
            )
        if uneven := [name for name in self._layouts if self._is_uneven(name)]:
            self.remarks.append(
                f"TP {self.topology.tp} cuts {_listed(uneven)} into unequal shares: the patterns allow it, Megatron-Core's "
                f"layers don't"
            )
        self.remarks += self._about_rows()

    def _is_uneven(self, name: str) -> bool:
        """Whether the ranks hold unequal shares without the pattern saying which."""
        shares = {shape for shape in self._shapes[name] if shape is not None}
        return len(shares) > 1 and getattr(self.view.patterns[name], "widths", None) is None

    def _about_rows(self) -> Iterator[str]:
        refused = {obstacle.name for obstacle in self.obstacles}
        rows: dict[tuple[int, int], list[str]] = {}
        for name, pattern in self.view.patterns.items():
            if isinstance(pattern, Shard) and pattern.vocabulary and name not in refused:
                wanted = self.view.logical_shape(name)
                share = pattern.local_shapes(wanted, self.topology.tp)[0]
                rows.setdefault((wanted[pattern.dim], share[pattern.dim] * self.topology.tp), []).append(name)
        for (found, padded), names in rows.items():
            if self.view.vocabulary_size is None:
                yield f"the {found} rows of {_listed(names)} count as the vocabulary, unless --vocabulary-size says otherwise"
            elif found != padded:
                yield f"the {found} rows of {_listed(names)} are padded to {padded}; the engine may pad them in another way"

    def _rank(self, target: TargetRank) -> RankPlan:
        count = TransferCount()
        for slot in (*target.slots, *target.weights):
            held: dict[str, list[Fragment[None]]] = {}
            for name, fragment in slot.fragments():
                held.setdefault(name, []).append(fragment)
            for name, fragments in held.items():
                count.add(self._read(name, target.model_parallel_rank, tuple(fragments)))
        held_numels = sum(slot.numel * self._states_held(slot) for slot in target.slots)
        return RankPlan(
            target.model_parallel_rank,
            target.data_parallel_rank,
            count.bytes_read,
            held_numels * ITEMSIZE["F32"],
            count.copies,
            frozenset(count.files),
        )

    def _states_held(self, slot: TargetSlot) -> int:
        """Master included; as many as the slot's parameters have in the checkpoint."""
        sources = [self.source.parameters[name] for name in slot.names if name in self._restored]
        return max((len(source.states) for source in sources), default=1)

    def _read(self, name: str, rank: int, fragments: tuple[Fragment[None], ...]) -> TransferCount:
        """All states of one parameter; what data-parallel ranks have in common is planned once."""
        key = name, rank, fragments
        if key not in self._known:
            count = self._known[key] = TransferCount()
            layout = self._layouts[name]
            target = Target(
                layout.cropped(self.source.logical_shape(name)) if name in self._grown else layout, rank, fragments
            )
            for state in self._states_read(name):
                try:
                    count.add(counted(plan_tensor(self.source.source(name, state), target, state)))
                except ValueError as error:
                    if all(obstacle.name != name for obstacle in self.obstacles):
                        self._refuse(name, str(error))
        return self._known[key]

    def _states_read(self, name: str) -> Sequence[str]:
        """The weight alone where the model doesn't train the parameter, or starts its states afresh."""
        states = list(self.source.parameters[name].states) if name in self._restored else []
        both = self.view.parameters[name].kind == "trainable" and self.policies.optimizer_states == "restore"
        return states if both else [state for state in states if state in (MASTER, WEIGHT)]


def counted(copies: Sequence[BlockCopy[FileExtent, None]]) -> TransferCount:
    """What `ucp_deepspeed.transfer.run_copies` would count, without reading."""
    views = [(view.buffer, prod(copy.shape)) for copy in copies for view in copy.sources]
    return TransferCount(
        sum(numel * ITEMSIZE[extent.dtype] for extent, numel in views),
        len(copies),
        {extent.path for extent, _ in views},
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _states(parameter: Parameter) -> str:
    return f"states {sorted(parameter.states)}, scalars {dict(parameter.scalars)}"
