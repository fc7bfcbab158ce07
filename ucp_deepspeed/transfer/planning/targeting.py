"""Plans for a topology on which no engine runs yet: what each of its ranks would read, and the obstacles.

Local shapes follow from the patterns alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER, Checkpoint, FileExtent, HeldShapes
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.checkpoint.expert_forms import in_form_of_other
from ucp_deepspeed.checkpoint.experts import expert_of, numbers_of_experts
from ucp_deepspeed.checkpoint.retied import with_copies
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec, per_rank
from ucp_deepspeed.layout import Layout, Shard, Topology
from ucp_deepspeed.layout.pattern import AnyPattern
from ucp_deepspeed.plan import BlockCopy
from ucp_deepspeed.transfer.copying import TransferCount
from ucp_deepspeed.transfer.planning.group_settings import UNTELLING, settings_of_groups
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.policies import (
    Policies,
    check_any,
    check_matching,
    check_recorded,
    is_grown,
    match,
)
from ucp_deepspeed.transfer.planning.rank_planner import RankPlanner, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import KeptStates, TargetRank, TargetSlot
from ucp_deepspeed.transfer.planning.target_plan import Obstacle, RankPlan, TargetPlan
from ucp_deepspeed.transfer.planning.target_ranks import RankNumber, layer_of, stacked_experts, stages_of, target_ranks
from ucp_deepspeed.transfer.stage_copies import may_differ

RESTORE_ALL = Policies()
"""Policies that allow nothing to be missing or left out."""


def plan_target(
    checkpoint: Checkpoint,
    topology: Topology,
    spec: Spec | None = None,
    vocabulary_size: int | None = None,
    model: Checkpoint | None = None,
    policies: Policies = RESTORE_ALL,
    only: Collection[RankNumber] | None = None,
) -> TargetPlan:
    """Plan the ranks of a topology; read no tensors.

    Args:
        only: leave out all other ranks, and obstacles on these alone; the cost depends on these ranks, not on how many there are.
        model: a checkpoint with the parameters of the model to load into, where the model has changed.
        policies: what the load may do beside restoring.
        spec: the spec that the user named; without it, unknown layouts are an obstacle.
        vocabulary_size: rows of the vocabulary without padding; by default what the checkpoint records.

    Raises:
        SpecError: the spec that the user named doesn't fit the parameters.
        MismatchError: the checkpoint's own local shapes contradict the patterns, or the model has other experts.
        DamagedCheckpointError: a file is missing, truncated or of another size than expected.
    """
    if model is not None:
        checkpoint = with_copies(in_form_of_other(checkpoint, model), model.parameters)
    try:
        source = UniversalView.of(checkpoint, spec, vocabulary_size, topology.tp)
        target = source if model is None else UniversalView.of(model, spec, vocabulary_size, topology.tp)
        source = source.under_names_of(target)
    except SpecError as error:
        if spec is not None:
            raise
        return TargetPlan(topology, None, False, (*_refused_by_deepspeed(topology), Obstacle(None, str(error))))
    return _Planner(source, target, topology, policies, only).plan()


def _refused_by_deepspeed(topology: Topology) -> list[Obstacle]:
    if topology.pp > 1 and topology.zero_stage > 1:
        return [
            Obstacle(None, f"DeepSpeed refuses ZeRO-{topology.zero_stage} with pipeline parallelism; use stage 0 or 1")
        ]
    return []


@dataclass
class _Planner:
    """Lays the target out, plans one rank after another, and collects the obstacles.

    Attributes:
        source: the checkpoint.
        view: the model; the same view as ``source`` where nothing has changed.
    """

    source: UniversalView
    view: UniversalView
    topology: Topology
    policies: Policies
    only: Collection[RankNumber] | None = None
    obstacles: list[Obstacle] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shapes: dict[str, HeldShapes] = {}
        self._layouts: dict[str, Layout] = {}
        self._begun: list[str] = []
        self._left: list[str] = []
        self._matching = match(self.source.parameters, self.view.parameters)
        self._restored = frozenset(self._matching.restored)

    def plan(self) -> TargetPlan:
        self.obstacles += _refused_by_deepspeed(self.topology)
        if self.policies.optimizer_states == "restore" and self.source.checkpoint.lacking is not None:
            self.obstacles.append(Obstacle(None, self.source.checkpoint.lacking.heading))
        self._check_experts()
        self._match()
        self._lay_out()
        self._remark()
        planner = self._planner()
        ranks: tuple[RankPlan, ...] = ()
        if not self.obstacles:
            self._check(planner)
        if not self.obstacles:
            targets = target_ranks(self.view, self.topology, self._shapes, self.only)
            ranks = tuple(self._rank(planner, target) for target in targets)
            self.obstacles += planner.problems
        found = tuple(self.obstacles)
        reset = self.policies.optimizer_states == "reset"
        remarks, held = tuple(self.remarks), () if found else ranks
        return TargetPlan(
            self.topology,
            self._matching,
            reset,
            found,
            remarks,
            held,
            planner.grown,
            tuple(dict.fromkeys(self._begun)),
            tuple(dict.fromkeys(self._left)),
        )

    def _planner(self) -> RankPlanner:
        restored = [name for name in self._matching.restored if name in self._layouts]
        experts = {name for name in restored if expert_of(name) is not None}
        return RankPlanner(
            self.source,
            restored,
            self._layouts,
            self.topology,
            list(self._shapes.values()),
            self.policies,
            TargetOptimizer() if self.source is self.view else TargetOptimizer(self._kept_states, self._goes_on),
            {*stacked_experts(self.view), *experts},
            tunables.SHARED_READ_NUMBYTES,
        )

    def _check(self, planner: RankPlanner) -> None:
        """Check each rank's slots, on one of the data-parallel ranks that hold the same parameters."""
        ranks = (
            product(range(self.topology.model_parallel), range(self.topology.dp)) if self.only is None else self.only
        )
        first: dict[RankNumber, RankNumber] = {}
        for rank, part in sorted(ranks):
            if rank < self.topology.model_parallel and part < self.topology.dp:
                first.setdefault((rank, part % self.topology.ep), (rank, part))
        for target in target_ranks(self.view, self.topology, self._shapes, frozenset(first.values())):
            numbers = self._numbers(target)
            if self.policies.optimizer_states != "keep":  # "keep" keeps the groups' hyper-parameters too
                self._check_groups(target, numbers)
            for states in planner.check(target, numbers):
                self._begun += states.initialised
                self._left += states.dropped
        self.obstacles = list(dict.fromkeys([*self.obstacles, *planner.problems]))

    def _check_groups(self, target: TargetRank, numbers: PartitionNumbers) -> None:
        """Check that the parameters of each group of a rank come from groups with the same hyper-parameters."""
        held = {name for slot in target.slots for name in slot.names}
        names = self.source.logical_of
        source = {names[name]: each for each in self.source.checkpoint.groups for name in each.names if name in names}
        groups = [[name for name in group.names if name in held] for group in self.view.groups]
        settings = settings_of_groups(source, groups, lambda index: {}, numbers, keep=False)
        self.obstacles += [Obstacle(*problem.split(": ", 1)) for problem in settings.problems]

    def _kept_states(self, slot: TargetSlot) -> KeptStates | None:
        """Return the states that the optimizer of the model to load into has made; None where it has made none yet."""
        found = next((self.view.parameters[name] for name in slot.names), None)
        if found is None or not (found.states.keys() - {MASTER} or found.scalars):
            return None
        elementwise, scalars = frozenset(found.states.keys() - {MASTER}), frozenset(found.scalars)
        return KeptStates(elementwise, scalars, elementwise, elementwise | scalars | found.refused.keys())

    def _goes_on(self, slot: TargetSlot, saved: Mapping[str, Any]) -> bool:
        """Return whether the group has the keys of the saved one."""
        live = self.view.groups[slot.group].hyperparameters if slot.group < len(self.view.groups) else {}
        return bool(saved) and live.keys() - UNTELLING == saved.keys() - UNTELLING

    def _numbers(self, target: TargetRank) -> PartitionNumbers:
        place = target.model_parallel_rank, target.data_parallel_rank % self.topology.ep
        names = self.source.logical_of
        return PartitionNumbers(self.source.checkpoint, names, self.topology, place, target.slots, self.policies)

    def _check_experts(self) -> None:
        """Refuse layers with experts that can't be trained on this topology, or are unsupported there."""
        numbers, topology = numbers_of_experts(self.view.parameters), self.topology
        stacked = stacked_experts(self.view)
        reasons = {
            f"EP {topology.ep} doesn't divide DP {topology.dp}": topology.dp % topology.ep > 0,
            "DeepSpeed's own mixture-of-experts layers can't be trained with ZeRO-3": bool(numbers)
            and topology.zero_stage == 3,
            "experts in a pipeline are not supported": bool(numbers or stacked) and topology.pp > 1,
            "AutoEP's experts under tensor parallelism load, but this release can't plan it": bool(stacked)
            and topology.tp > 1,
            f"EP {topology.ep}, and the model has no experts": not (numbers or stacked) and topology.ep > 1,
        }
        self.obstacles += [Obstacle(None, reason) for reason, holds in reasons.items() if holds]
        for layer, number in (numbers | stacked).items():
            if number % topology.ep:
                self._refuse(layer.rstrip("."), f"EP {topology.ep} doesn't divide its {number} experts")

    def _match(self) -> None:
        source, target, path = self.source.parameters, self.view.parameters, f"{self.source.checkpoint.path}"
        unrecorded = self.source.checkpoint.unrecorded
        if self.source is not self.view:
            unrecorded = {name: why for name, why in unrecorded.items() if name in target}
        for check in (
            partial(check_recorded, unrecorded, self.policies, path),
            partial(check_matching, source, target, self.policies, ""),
            partial(check_any, source, target, self._matching, self.policies, path),
        ):
            try:
                check()
            except MismatchError as error:
                for problem in error.problems:
                    self._refuse(*problem.split(": ", 1))
                if not error.problems and not self.obstacles:
                    self.obstacles.append(Obstacle(None, error.heading))
                self.remarks += [error.remedy] if error.remedy else []

    def _lay_out(self) -> None:
        """Work out local shapes and layouts of the target."""
        held = self._stages()
        cut = lru_cache(maxsize=None)(lambda pattern, whole: pattern.local_shapes(whole, self.topology.tp))
        for name, pattern in self.view.patterns.items():
            try:
                shares = cut(pattern, self.view.logical_shape(name))
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
        """Return the stages that would hold each parameter; for one that several of the checkpoint's stages share, the first and
        the last too."""
        pp, degree = self.topology.pp, self.view.checkpoint.topology.tp
        held = {name: {stage} for name, stage in stages_of(list(self.view.parameters), pp).items()}
        for name, parameter in self.view.parameters.items():
            if sum(shape is not None for shape in parameter.local_shapes) > degree:
                held[name] |= {0, pp - 1}
        if set(range(pp)) != set().union(*held.values()):
            layers = len({layer for name in held if (layer := layer_of(name))})
            self.obstacles.append(
                Obstacle(None, f"{pp} pipeline stages are too many for the {layers} layers that the names tell")
            )
        return held

    def _check_rows(self, name: str, pattern: AnyPattern) -> None:
        """Check global shapes: they must be equal, or have grown. A vocabulary with unknown padding can't be padded in another
        way."""
        if name not in self._restored:
            return
        found, expected = self.source.logical_shape(name), self._layouts[name].logical_shape
        if self.policies.initialise and is_grown(found, expected):
            return
        if found != expected and self.source is not self.view:
            self._refuse(name, f"expected logical shape {expected}, found {found} in the checkpoint")
        elif found != expected and isinstance(pattern, Shard):
            self._refuse(
                name,
                f"the checkpoint has {found[pattern.dim]} rows, and the target pads them to {expected[pattern.dim]}; say with "
                f'--vocabulary-size ("universal_checkpoint": {{"vocabulary_size": …}}) how many aren\'t padding',
            )

    def _refuse(self, name: str, reason: str) -> None:
        self.obstacles.append(Obstacle(name, reason))

    def _remark(self) -> None:
        """Add remarks on what was assumed."""
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
        copies, source = may_differ(self.source.checkpoint), self.source.checkpoint.topology
        if copies and (source.tp, source.pp) != (self.topology.tp, self.topology.pp):
            self.remarks.append(
                f"several stages hold copies of {_listed(list(copies))}, which a load compares: where these differ it takes that "
                f'of the stage that trained it, and if several did, "on_differing": "first" or "last" has to say which'
            )
        if unknown := per_rank(self.view.patterns):
            self.remarks.append(
                f"no layout is known of {_listed(unknown)}: each rank takes its own, which only TP {self.topology.tp} allows"
            )
        if uneven := [name for name in self._layouts if self._is_uneven(name)]:
            self.remarks.append(
                f"TP {self.topology.tp} cuts {_listed(uneven)} into unequal shares: the patterns allow it, Megatron-Core's "
                f"layers don't"
            )
        self.remarks += self._about_rows()

    def _is_uneven(self, name: str) -> bool:
        """Return whether the ranks hold unequal shares without the pattern saying which."""
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

    def _rank(self, planner: RankPlanner, target: TargetRank) -> RankPlan:
        planned = planner.plan(target, self._numbers(target))
        count = TransferCount()
        for buffer in (*(each for slot in planned.slots for each in slot.buffers.values()), *planned.weights):
            count.add(counted(buffer.copies))
        held_numels = sum(slot.numel() * self._states_held(slot) for slot in target.slots)
        return RankPlan(
            target.model_parallel_rank,
            target.data_parallel_rank,
            count.bytes_read,
            held_numels * ITEMSIZE["F32"],
            count.copies,
            frozenset(count.files),
        )

    def _states_held(self, slot: TargetSlot) -> int:
        """Return the number of states of a slot's parameters in the checkpoint, master included."""
        sources = [self.source.parameters[name] for name in slot.names if name in self._restored]
        return max((len(source.states) for source in sources), default=1)


def counted(copies: Sequence[BlockCopy[FileExtent, None]]) -> TransferCount:
    """Return what `ucp_deepspeed.transfer.run_copies` would count, without reading."""
    views = [(view.buffer, prod(copy.shape)) for copy in copies for view in copy.sources]
    return TransferCount(
        sum(numel * ITEMSIZE[extent.dtype] for extent, numel in views),
        len(copies),
        {extent.path for extent, _ in views},
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
