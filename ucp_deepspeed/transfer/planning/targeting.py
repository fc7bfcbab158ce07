"""Plans for a topology on which no engine runs yet: what each of its ranks would read, and the obstacles.

Local shapes follow from the patterns alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, Checkpoint, FileExtent, HeldShapes, step_in_group
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.checkpoint.expert_names import expert_of, numbers_of_experts
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS
from ucp_deepspeed.checkpoint.view import UniversalView, parameter_names
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import ListingError, MismatchError, SpecError
from ucp_deepspeed.language import Spec, per_rank
from ucp_deepspeed.layout import Shard, Topology
from ucp_deepspeed.layout.pattern import AnyPattern, PerRank, Unique
from ucp_deepspeed.plan import BlockCopy
from ucp_deepspeed.transfer.copying import TransferCount
from ucp_deepspeed.transfer.evidence.held_values import differing_ties
from ucp_deepspeed.transfer.planning.numbers import UNTELLING, PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair, pair
from ucp_deepspeed.transfer.planning.policies import Matching, Obstacle, Obstacles, Policies, check_recorded, some_names
from ucp_deepspeed.transfer.planning.rank_planner import RankPlanner, SlotStates, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import (
    KeptStates,
    ModelDescription,
    ModelTensor,
    PlaceOfSteps,
    TargetRank,
    TargetSlot,
)
from ucp_deepspeed.transfer.planning.target_ranks import RankNumber, layer_of, stacked_experts, stages_of, target_ranks
from ucp_deepspeed.transfer.stage_copies import may_differ


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The work of one rank in a plan.

    Attributes:
        model_parallel_rank, data_parallel_rank: see `TargetRank`.
        bytes_read: bytes to copy out of files.
        bytes_held: bytes of the master weights and optimizer states in its partitions, in fp32, padding included.
        bytes_of_weights: bytes of the module's parameters and buffers beside these: at ZeRO-3 its partitions, else whole. Without
            ZeRO in fp32 the trained ones are the masters.
        copies: strided blocks to copy.
        files: paths of the files that the blocks lie in.
    """

    model_parallel_rank: int
    data_parallel_rank: int
    bytes_read: int
    bytes_held: int
    bytes_of_weights: int
    copies: int
    files: frozenset[str]


@dataclass(frozen=True)
class TargetPlan:
    """The answer for one topology.

    Attributes:
        topology: the target's.
        matching: the parameters and buffers on both sides or on one, by logical name; None when the layouts aren't known.
        reset: whether all optimizer states start afresh.
        obstacles: why it is impossible; empty when it isn't.
        remarks: the assumptions behind the figures, in words.
        ranks: ordered by model-parallel and then data-parallel rank; empty when the topology is impossible.
        initialised: names that keep the model's values: in whole, or in further rows, or in their optimizer states alone.
        dropped: names in the checkpoint for which the model has no place, or no place for their optimizer states.
    """

    topology: Topology
    matching: Matching | None
    reset: bool
    obstacles: tuple[Obstacle, ...]
    remarks: tuple[str, ...] = ()
    ranks: tuple[RankPlan, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Return whether a load on this topology would succeed, as far as the checkpoint tells."""
        return not self.obstacles

    @property
    def restored(self) -> tuple[str, ...]:
        """Logical names of the restored parameters and buffers that have no obstacle, in the model's order."""
        refused = {name for obstacle in self.obstacles for name in (obstacle.name, *obstacle.others)}
        return tuple(name for name in (self.matching.restored if self.matching else ()) if name not in refused)

    @property
    def files(self) -> frozenset[str]:
        """Paths of all files that some rank reads from."""
        return frozenset().union(*(rank.files for rank in self.ranks))


RESTORE_ALL = Policies()
"""Policies that allow nothing to be missing or left out."""

MADE_FOR = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
"""Hyper-parameters of torch's optimizers → the state that each keeps only if it isn't zero (``torch/optim/``)."""

NOT_FROM_ZERO = frozenset(("exp_inf", "step_size"))
"""Element-wise states of torch's optimizers that don't begin at zero (``torch/optim/adamax.py`` and ``rprop.py``)."""


def plan_target(
    checkpoint: Checkpoint,
    topology: Topology,
    spec: Spec | None = None,
    vocabulary_size: int | None = None,
    model: Checkpoint | None = None,
    policies: Policies = RESTORE_ALL,
    only: Collection[RankNumber] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TargetPlan:
    """Plan the ranks of a topology; read no tensors.

    Args:
        only: leave out all other ranks, and obstacles on these alone; the cost depends on these ranks, not on how many there are.
        model: a checkpoint with the parameters of the model to load into, where the model has changed.
        policies: what the load may do beside restoring.
        progress: called with (ranks planned, ranks to plan) after each.
        spec: the spec that the user named; without it, unknown layouts are an obstacle.
        vocabulary_size: rows of the vocabulary without padding; by default what the checkpoint records.

    Raises:
        SpecError: the spec that the user named doesn't fit the parameters.
        MismatchError: the model's own local shapes contradict the patterns.
        DamagedCheckpointError: a file is missing, truncated or of another size than expected.
    """
    obstacles = Obstacles()
    if topology.pp > 1 and (stage := topology.zero_stage) > 1:
        obstacles.add(None, f"DeepSpeed refuses ZeRO-{stage} with pipeline parallelism; use stage 0 or 1")
    reset = policies.optimizer_states == "reset"
    try:
        view = UniversalView.of(model or checkpoint, spec, vocabulary_size, topology.tp)
    except SpecError as error:
        if spec is not None:
            raise
        obstacles.add_error(error)
        return TargetPlan(topology, None, reset, tuple(obstacles))
    described = describe_target(view, topology, spec, obstacles)
    try:
        found = pair(checkpoint, described, policies, obstacles, partial(differing_ties, share=None))
    except ListingError as error:
        if spec is not None and isinstance(error, SpecError):
            raise
        if not obstacles:
            obstacles.add_error(error)
        return TargetPlan(topology, None, reset, tuple(obstacles), tuple(obstacles.remedies))
    if model is None:
        check_recorded(checkpoint.unrecorded, policies, obstacles)
    return _Planner(found, view.under(found.names.target), model is None, only).plan(progress)


def describe_target(
    view: UniversalView,
    topology: Topology,
    spec: Spec | None,
    obstacles: Obstacles,
    stages: Mapping[str, Collection[int]] | None = None,
) -> ModelDescription:
    """Describe the model of a checkpoint on another topology: its tensors are cut by the patterns, and its layers dealt out.

    Args:
        obstacles: takes the tensors that can't be cut.
        stages: the pipeline stages that hold each parameter, by logical name; by default layers are dealt out evenly.
    """
    checkpoint, tensors = view.checkpoint, {}
    stages = _stages(view, topology, obstacles) if stages is None else stages
    cut = lru_cache(maxsize=None)(lambda pattern, whole: pattern.local_shapes(whole, topology.tp))
    padded = lru_cache(maxsize=None)(lambda pattern, shares: pattern.logical_shape(shares, view.vocabulary_size))
    for name, parameter in checkpoint.parameters.items():
        logical = view.logical_of[name]
        pattern, whole = view.patterns[logical], view.logical_shape(logical)
        shares: HeldShapes = (None,) * topology.tp
        try:
            shares = cut(pattern, view.padded_shape(logical) if _pads_as_held(pattern) else whole)
            rows = padded(pattern, shares)
            if rows != whole and isinstance(pattern, Shard):
                obstacles.add(
                    logical,
                    f"the checkpoint has {whole[pattern.dim]} rows, and the target pads them to {rows[pattern.dim]}; say with "
                    f'--vocabulary-size ("universal_checkpoint": {{"vocabulary_size": …}}) how many aren\'t padding',
                )
        except ValueError as error:
            obstacles.add(logical, str(error))
        held = (shape if stage in stages[logical] else None for stage in range(topology.pp) for shape in shares)
        tensors[name] = ModelTensor(name, parameter.kind, tuple(held))
    known = {name: view.patterns[view.logical_of[name]] for name in parameter_names(checkpoint)}
    return ModelDescription(
        topology=topology,
        tensors=tensors,
        inferred={name: pattern for name, pattern in known.items() if not isinstance(pattern, Unique | PerRank)},
        spec=spec,
        vocabulary_size=view.vocabulary_size,
        tied=checkpoint.tied,
        logical_names=checkpoint.logical_names,
    )


def _pads_as_held(pattern: AnyPattern) -> bool:
    """Return whether the best guess at a target's rows is the padded vocabulary that there is."""
    return isinstance(pattern, Shard) and pattern.vocabulary and pattern.pad_to_multiple == 1


def _stages(view: UniversalView, topology: Topology, obstacles: Obstacles) -> dict[str, set[int]]:
    """Return the stages that would hold each parameter; one that several stages of the checkpoint share is on both ends too."""
    pp, degree = topology.pp, view.checkpoint.topology.tp
    numbers = stages_of(list(view.parameters), pp)
    held = {name: {stage} for name, stage in numbers.items()}
    for name, parameter in view.parameters.items():
        if sum(shape is not None for shape in parameter.local_shapes) > degree:
            held[name] |= {0, pp - 1}
    if set(range(pp)) != set().union(*held.values()):
        layers, most = _layers(view), len(set(numbers.values()))
        obstacles.add(None, f"{pp} pipeline stages are too many for {layers}; take {most} or fewer")
    return held


def _layers(view: UniversalView) -> str:
    """``the 3 layers that the names tell (layers.0, …)``."""
    told = dict.fromkeys(layer for name in view.parameters if (layer := layer_of(name)))
    first = next((f" ({'.'.join(filter(None, map(str, layer)))}, …)" for layer in told), "")
    return f"the {len(told)} layers that the names tell{first}"


class _Planner:
    """Plans one rank after another; see `plan_target`. The view is the model's; ``unchanged`` if it is the checkpoint's."""

    def __init__(self, found: Pair, view: UniversalView, unchanged: bool, only: Collection[RankNumber] | None) -> None:
        self.pair, self.view, self.unchanged, self.only = found, view, unchanged, only
        self.topology, self.policies, self.obstacles = found.model.topology, found.policies, found.obstacles
        self._shapes = {name: tensor.local_shapes for name, tensor in found.tensors.items()}
        self._stepped = view.checkpoint.run.global_steps > 0 and view.checkpoint.lacking is None
        self._keeps_any = any(each.scalars or len(each.states) > 1 for each in view.parameters.values())

    def plan(self, progress: Callable[[int, int], None]) -> TargetPlan:
        lacking = self.pair.checkpoint.lacking
        if lacking is not None and self.policies.optimizer_states == "restore":
            self.obstacles.add(None, lacking.heading)
        self._check_experts()
        remarks = tuple(self._remarks())
        experts = {name for name in self.pair.tensors if expert_of(name) is not None}
        optimizer = TargetOptimizer() if self.unchanged else TargetOptimizer(self._kept_states, self._goes_on)
        planner = RankPlanner(
            self.pair, optimizer, {*stacked_experts(self.view), *experts}, tunables.SHARED_READ_NUMBYTES
        )
        states = list(self._check(planner)) if None not in self.obstacles.names else []
        ranks: tuple[RankPlan, ...] = ()
        if not self.obstacles:
            try:
                ranks = tuple(self._plan_ranks(planner, progress))
            except MismatchError:
                if not self.obstacles:
                    raise
        return TargetPlan(
            self.topology,
            self.pair.matching,
            self.policies.optimizer_states == "reset",
            tuple(self.obstacles),
            (*self.obstacles.remedies, *remarks),
            ranks,
            *planner.outcome(states),
        )

    def _targets(self, only: Collection[RankNumber] | None) -> Iterator[TargetRank]:
        return target_ranks(self.view, self.topology, self._shapes, only)

    def _plan_ranks(self, planner: RankPlanner, progress: Callable[[int, int], None]) -> Iterator[RankPlan]:
        total = self.topology.model_parallel * self.topology.dp if self.only is None else len(self.only)
        for number, target in enumerate(self._targets(self.only), 1):
            yield self._rank(planner, target)
            progress(number, total)

    def _check(self, planner: RankPlanner) -> Iterator[SlotStates]:
        """Check each rank's slots and groups, on one of the data-parallel ranks that hold the same parameters."""
        ranks = (
            product(range(self.topology.model_parallel), range(self.topology.dp)) if self.only is None else self.only
        )
        first: dict[RankNumber, RankNumber] = {}
        for rank, part in sorted(ranks):
            if rank < self.topology.model_parallel and part < self.topology.dp:
                first.setdefault((rank, part % self.topology.ep), (rank, part))
        for target in self._targets(frozenset(first.values())):
            numbers = self._numbers(target)
            if self.policies.optimizer_states != "keep":  # "keep" keeps the groups' hyper-parameters too
                self._check_groups(target, numbers)
            yield from planner.check(target, numbers)

    def _check_groups(self, target: TargetRank, numbers: PartitionNumbers) -> None:
        """Check what the parameter groups of a rank, and the scheduler, take from the checkpoint's groups."""
        held = {name for slot in target.slots for name in slot.names}
        groups = [[name for name in group.names if name in held] for group in self.view.groups]
        self.pair.settings(groups, self._live_group, self._place_of_steps, numbers)
        if (live := self.view.checkpoint.run.lr_scheduler) is not None and not self.policies.scheduled:
            self.pair.check_schedule()
            self.pair.schedule(groups, live)

    def _kept_states(self, slot: TargetSlot) -> KeptStates | None:
        """Return the states that the optimizer of the model to load into has made, or would make with the checkpoint's
        hyper-parameters; None where it may make some later."""
        found = self.view.parameters[slot.names[0]]
        elementwise, scalars = found.states.keys() - {MASTER}, frozenset(found.scalars)
        live, saved = self._live_group(slot.group), self._saved_group(slot)
        # SGD's groups without momentum keep nothing.
        keeps = self._keeps_any and (live.get("momentum", 1) or "dampening" not in live)
        if not (elementwise or scalars) and (keeps or not self._stepped):
            return None
        # DeepSpeed's own classes have the key.
        takes_over = not self.policies.keep_settings and "bias_correction" not in live
        for key, state in MADE_FOR.items() if takes_over else ():
            if key in live and key in saved and bool(live[key]) == (state in elementwise):
                elementwise = elementwise | {state} if saved[key] else elementwise - {state}
        kept = frozenset(elementwise)
        names = kept | scalars | found.refused.keys()
        return KeptStates(kept, scalars, kept - NOT_FROM_ZERO, names, self._place_of_steps(slot.group))

    def _place_of_steps(self, index: int) -> PlaceOfSteps | None:
        """Return where the optimizer of the model to load into counts the steps of a group; see `KeptStates.steps`."""
        if self.unchanged or index >= len(self.view.groups):
            return None
        group = self.view.groups[index]
        held = [self.view.parameters[name] for name in group.names if name in self.view.parameters]
        if any(step_in_group(each, group.hyperparameters) for each in held):
            return "group"
        counts = any(GROUP_STEP in each.scalars for each in held)
        return "state" if counts and not group.hyperparameters.get(GROUP_STEP) else None

    def _saved_group(self, slot: TargetSlot) -> Mapping[str, Any]:
        """Return the checkpoint's hyper-parameters of the first of the slot's parameters that it trains."""
        groups = (group for name in slot.names for group in self.pair.view.groups if name in group.names)
        group = next(groups, None)
        return {} if group is None else group.hyperparameters

    def _live_group(self, index: int) -> Mapping[str, Any]:
        return self.view.groups[index].hyperparameters if index < len(self.view.groups) else {}

    def _goes_on(self, slot: TargetSlot, saved: Mapping[str, Any]) -> bool:
        """Return whether the group has the keys of the saved one, and takes over its values."""
        taken = bool(saved) and not self.policies.keep_settings
        return taken and self._live_group(slot.group).keys() - UNTELLING == saved.keys() - UNTELLING

    def _numbers(self, target: TargetRank) -> PartitionNumbers:
        place = target.model_parallel_rank, target.data_parallel_rank % self.topology.ep
        source = self.pair.names.source
        return PartitionNumbers(self.pair.checkpoint, source, self.topology, place, target.slots, self.policies)

    def _check_experts(self) -> None:
        """Refuse layers with experts that can't be trained on this topology, or are unsupported there."""
        numbers, topology = numbers_of_experts(self.view.parameters), self.topology
        stacked = stacked_experts(self.view)
        experts = numbers | stacked
        reasons = {
            f"EP {topology.ep} doesn't divide DP {topology.dp}; take one that does": topology.dp % topology.ep,
            "DeepSpeed's own mixture-of-experts layers can't be trained with ZeRO-3; take ZeRO 0 to 2": numbers
            and topology.zero_stage == 3,
            "experts in a pipeline are not supported; take PP 1": experts and topology.pp > 1,
            "AutoEP's experts under tensor parallelism load, but this release can't plan it; try the load": stacked
            and topology.tp > 1,
            f"the model has no experts; take EP 1 instead of {topology.ep}": not experts and topology.ep > 1,
        }
        for reason, holds in reasons.items():
            if holds:
                self.obstacles.add(None, reason)
        for layer, number in experts.items():
            if number % topology.ep:
                self.obstacles.add(
                    layer.rstrip("."), f"EP {topology.ep} doesn't divide its {number} experts; take one that does"
                )

    def _remarks(self) -> Iterator[str]:
        """Yield what was assumed."""
        source, tp = self.pair.checkpoint, self.topology.tp
        if self.topology.pp > 1:
            yield (
                f"{_layers(self.view)} are dealt out evenly over the stages; the engine's partition_method may cut elsewhere, "
                f"and stages that share a tied weight each read it"
            )
        if not (self.unchanged or self._keeps_any or self._stepped):
            yield "the model was saved before its first step: nothing tells which states its optimizer keeps, and any seem to fit"
        layers = [name for name in self.view.parameters if name.startswith(TIED) or name.split(".")[0].isdecimal()]
        if layers and self.topology.pp == 1:
            yield (
                f"names such as {layers[0]} are those of a pipeline, if only of one stage; to load into a plain model, name a "
                f"spec that renames them"
            )
        copies = may_differ(source)
        if copies and (source.topology.tp, source.topology.pp) != (tp, self.topology.pp):
            yield (
                f"several stages hold copies of {some_names(list(copies))}, which a load compares: where these differ it takes "
                f'that of the stage that trained it, and if several did, "on_differing": "first" or "last" has to say which'
            )
        if self.pair.joined:
            yield f"a load compares the values of {some_names(list(self.pair.joined))}, which the model ties to others"
        live, saved = self.view.checkpoint.run.lr_scheduler, source.run.lr_scheduler
        if live and saved and live.keys() != saved.keys() and not self.policies.scheduled:
            yield "the model's scheduler isn't the saved one: a load tries whether it takes over the state"
        if unknown := per_rank(self.view.patterns):
            yield f"no layout is known of {some_names(unknown)}: each rank takes its own, which only TP {tp} allows"
        untold = [name for name, pattern in self.view.patterns.items() if getattr(pattern, "widths", None) is None]
        if uneven := [name for name in untold if len({*self._shapes[name]} - {None}) > 1]:
            yield f"TP {tp} cuts {some_names(uneven)} into unequal shares: the patterns allow it, Megatron-Core's layers don't"
        yield from self._about_rows()

    def _about_rows(self) -> Iterator[str]:
        size, same = self.view.vocabulary_size, self.topology.tp == self.view.checkpoint.topology.tp
        rows: dict[int, list[str]] = {}
        for name, (_, padded) in self.pair.rows.held.items():
            sure = size == padded or (same and _pads_as_held(self.view.patterns[name]))
            if name not in self.obstacles.names and (size is None or not sure):
                rows.setdefault(padded, []).append(name)
        for padded, names in rows.items():
            if size is None:
                yield f"the {padded} rows of {some_names(names)} count as the vocabulary, unless --vocabulary-size says otherwise"
            else:
                yield f"the {size} rows of {some_names(names)} are padded to {padded}; the engine may pad them in another way"
        yield from self.pair.rows.told(self.obstacles.names)

    def _rank(self, planner: RankPlanner, target: TargetRank) -> RankPlan:
        count = TransferCount()
        for buffer in planner.plan(target, self._numbers(target)).buffers:
            count.add(counted(buffer.copies))
        saved, held = self.pair.view.parameters, 0
        for slot in target.slots:
            states = max((len(saved[name].states) for name in slot.names if name in saved), default=1)
            held += slot.numel() * states * ITEMSIZE["F32"]
        place, weights = (target.model_parallel_rank, target.data_parallel_rank), self._bytes_of_weights(target)
        return RankPlan(*place, count.bytes_read, held, weights, count.copies, frozenset(count.files))

    def _bytes_of_weights(self, target: TargetRank) -> int:
        """Return what a module holds of its weights and buffers; see `RankPlan`."""
        stage, precision = self.topology.zero_stage, self.view.checkpoint.run.precision
        trained = sum(slot.numel() if stage == 3 else sum(slot.flattening.numels) for slot in target.slots)
        apart = precision != "fp32" or stage > 0
        others = sum(slot.numel() * slot.itemsize for slot in target.weights)
        return others + apart * trained * PRECISIONS[precision].itemsize


def counted(copies: Sequence[BlockCopy[FileExtent, None]]) -> TransferCount:
    """Return what `ucp_deepspeed.transfer.run_copies` would count, without reading."""
    views = [(view.buffer, prod(copy.shape)) for copy in copies for view in copy.sources]
    return TransferCount(
        sum(numel * ITEMSIZE[extent.dtype] for extent, numel in views),
        len(copies),
        {extent.path for extent, _ in views},
    )
