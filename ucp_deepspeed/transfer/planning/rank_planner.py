"""Plan what one rank of a target reads of a checkpoint, and which states and numbers its slots get. The planner is pure, and the
same for an engine that runs and for one that doesn't yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT, FileExtent, Parameter, step_in_group
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.plan import (
    UNDIVIDED,
    BlockCopy,
    Division,
    Fragment,
    Interval,
    Shareable,
    Target,
    divide,
    factor_between,
    overlapping_fragments,
    plan_tensor,
    read_together,
)
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair
from ucp_deepspeed.transfer.planning.target import KeptStates, TargetRank, TargetSlot

Copies = tuple[BlockCopy[FileExtent, None], ...]


@dataclass(frozen=True)
class PlannedBuffer:
    """The plan to fill one buffer.

    Attributes:
        copies: the copies that the rank itself reads.
        held: the parts that copies fill, or that keep the model's own values; the rest of the rank's own intervals becomes zero.
        division: the parts that other ranks read for this one.
    """

    copies: Copies
    held: tuple[Fragment[None], ...]
    division: Division = UNDIVIDED


@dataclass(frozen=True)
class PlannedSlot:
    """The plan to fill one slot.

    Attributes:
        buffers: by state; the master's is always there.
        scalars: shared by the slot's parameters.
    """

    buffers: Mapping[str, PlannedBuffer]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class PlannedRank:
    """The plan to fill one rank.

    Attributes:
        slots, weights: one for each of `TargetRank`'s.
        initialised, dropped: see `RankPlanner.outcome`; of optimizer states only the rank's.
        exchanged: what tensor-parallel ranks read for one another: for each buffer its number and state, the parameters and the
            shares. It must be the same on all of them, or they would wait for one another.
    """

    slots: tuple[PlannedSlot, ...]
    weights: tuple[PlannedBuffer, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]
    exchanged: tuple[Any, ...]

    @property
    def buffers(self) -> list[PlannedBuffer]:
        """The buffers: of the slots, then the weights."""
        return [*(buffer for slot in self.slots for buffer in slot.buffers.values()), *self.weights]

    @property
    def bytes_needed(self) -> int:
        """Bytes of the elements that the rank has to read, in the source's dtypes."""
        copies = (copy for buffer in self.buffers for copy in buffer.copies)
        return sum(prod(copy.shape) * ITEMSIZE[copy.sources[0].buffer.dtype] for copy in copies)


@dataclass(frozen=True)
class SlotStates:
    """The states and scalars that a slot gets, and the parameters some of whose states begin anew or are left out."""

    states: tuple[str, ...]
    scalars: Mapping[str, float] = field(default_factory=dict)
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetOptimizer:
    """The known facts about the optimizer that resumes.

    Attributes:
        kept_states: slot → the states that it will keep; None where that can't be told, and any fit.
        goes_on: slot and the saved hyper-parameters of its group → whether it is the optimizer that saved, with its settings
            then: that one may have made states later than at its first step.
    """

    kept_states: Callable[[TargetSlot], KeptStates | None] = lambda slot: None
    goes_on: Callable[[TargetSlot, Mapping[str, Any]], bool] = lambda slot, saved: False


class RankPlanner:
    """Plans one rank after another, under logical names, and adds to the obstacles of the pair.

    Attributes:
        restored: parameters and buffers on both sides that the checkpoint fills.
        grown: parameters with further rows than in the checkpoint.
        reshaped: parameters of another shape that keep the model's values.
    """

    def __init__(self, pair: Pair, optimizer: TargetOptimizer, kept_apart: Set[str], shared_read_numbytes: int) -> None:
        """Compare the shapes of all parameters and buffers, also of those on other ranks.

        Args:
            pair: the checkpoint and the model.
            kept_apart: names that tensor-parallel ranks don't read for one another.
            shared_read_numbytes: ranks read together what they hold alike, a part by each, if it has at least so many bytes.
        """
        self._pair, self._optimizer, self._obstacles = pair, optimizer, pair.obstacles
        self.source, self.layouts, self.policies = pair.view, pair.layouts, pair.policies
        self._topology, self._kept_apart = pair.model.topology, kept_apart
        self._shared_read_numbytes = shared_read_numbytes
        shapes = {name: (self.source.logical_shape(name), held.logical_shape) for name, held in self.layouts.items()}
        differing = {name: _is_grown(*both) for name, both in shapes.items() if both[0] != both[1]}
        self.grown = tuple(name for name, grown in differing.items() if grown and self.policies.initialise)
        self.reshaped = tuple(name for name in differing if self.policies.reshape and name not in self.grown)
        self.restored = dict.fromkeys(name for name in self.layouts if name not in self.reshaped)
        self._common = lru_cache(maxsize=None)(self._read_together)
        self._copies = lru_cache(maxsize=1 << 16)(self._plan_tensor)
        self._known_states: dict[tuple[tuple[str, ...], int], SlotStates] = {}
        for name in self.restored:
            with self._telling(name):
                factor_between(self.source.layouts[name], self._layout(name), self._weight_state(name))

    def outcome(self, slots: Iterable[SlotStates]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names that keep the model's values, in whole, in further rows, or in their optimizer states alone; and those
        in the checkpoint for which the model has no place, or no place for their optimizer states."""
        found, restores = self._pair.matching, self.policies.optimizer_states == "restore"
        begun, left = list(found.unfrozen if restores else ()), list(found.frozen if restores else ())
        begun += [*self.grown, *self.reshaped]
        for states in slots:
            begun += states.initialised
            left += states.dropped
        return tuple(dict.fromkeys((*found.initialised, *begun))), tuple(dict.fromkeys((*found.dropped, *left)))

    def check(self, rank: TargetRank, numbers: PartitionNumbers) -> list[SlotStates]:
        """Return what one rank's slots get; collect the obstacles, also of its frozen parameters and buffers."""
        wanted = [self.states_of(slot, numbers) for slot in rank.slots]
        for name, reason in numbers.problems:
            self._obstacles.add(name, reason)
        for name in (slot.names[0] for slot in rank.weights if slot.names[0] in self.restored):
            parameter = self.source.parameters[name]
            if WEIGHT not in parameter.states and parameter.kind != "trainable":
                for reason in parameter.refused.values():
                    self._obstacles.add(name, reason)
        return wanted

    def states_of(self, slot: TargetSlot, numbers: PartitionNumbers) -> SlotStates:
        """Return the states of a slot; collect the problems."""
        if numbers.has_own(slot):
            return self._common_states(slot, numbers)
        key = slot.names, slot.group
        if key not in self._known_states:
            self._known_states[key] = self._common_states(slot, numbers)
        return self._known_states[key]

    def plan(self, rank: TargetRank, numbers: PartitionNumbers) -> PlannedRank:
        """Plan all that one rank holds.

        Args:
            numbers: gives the numbers of the checkpoint that the rank's slots take.

        Raises:
            MismatchError: lists all obstacles.
        """
        wanted = self.check(rank, numbers)
        self._obstacles.check(self.source.checkpoint.path)
        buffers = [(slot, state) for slot, states in zip(rank.slots, wanted, strict=True) for state in states.states]
        buffers += [(slot, WEIGHT) for slot in rank.weights]
        divisions = self._divide(rank, buffers)
        planned = (
            self._buffer(slot, state, division, rank.model_parallel_rank)
            for (slot, state), division in zip(buffers, divisions, strict=True)
        )
        slots = tuple(
            PlannedSlot({state: next(planned) for state in states.states}, states.scalars) for states in wanted
        )
        weights = tuple(planned)
        self._obstacles.check(self.source.checkpoint.path)
        return PlannedRank(slots, weights, *self.outcome(wanted), tuple(self._exchanged(rank, buffers, divisions)))

    def _exchanged(
        self, rank: TargetRank, buffers: Sequence[tuple[TargetSlot, str]], divisions: Sequence[Division]
    ) -> list[Any]:
        common, told = self._common(rank.model_parallel_rank // self._topology.tp), []
        for number, ((slot, state), division) in enumerate(zip(buffers, divisions, strict=True)):
            if division.tensor_parallel is not None:
                names = [name for name, _ in slot.fragments(state) if name in common]
                lengths = [(share.reader, share.stop - share.start) for share in division.tensor_parallel.shares]
                told.append((number, state, names, lengths))
        return told

    def _divide(self, rank: TargetRank, buffers: Sequence[tuple[TargetSlot, str]]) -> list[Division]:
        """Divide among ranks what all of them hold, where it is enough to be worth the exchange."""
        common = self._common(rank.model_parallel_rank // self._topology.tp)
        shareable = {
            place: Shareable(slot.numel(state), slot.itemsize, slot.replicas, _alike(slot, state, common))
            for place, (slot, state) in enumerate(buffers)
            if slot.divisible
        }
        held = {buffer.replicas for buffer in shareable.values()} - {None}
        replicas = {name: ranks for name, ranks in rank.replicas.items() if name in held}
        tensor_parallel = self._topology.tp, rank.model_parallel_rank % self._topology.tp
        found = divide(list(shareable.values()), replicas, tensor_parallel, self._shared_read_numbytes)
        divisions = dict(zip(shareable, found, strict=True))
        return [divisions.get(place, UNDIVIDED) for place in range(len(buffers))]

    def _read_together(self, stage: int) -> frozenset[str]:
        """Return the parameters that a stage's tensor-parallel ranks read for one another; see `read_together`."""
        tp = self._topology.tp
        if tp == 1:
            return frozenset()
        apart = {*self._kept_apart, *self.grown}
        layouts = {name: self.layouts[name] for name in self.restored if name not in apart}
        local_shapes = [tensor.local_shapes for tensor in self._pair.tensors.values()]
        return read_together(layouts, self.source.layouts, local_shapes, stage * tp, tp)

    def _buffer(self, slot: TargetSlot, state: str, division: Division, rank: int) -> PlannedBuffer:
        """Plan what a rank reads of a slot's master, of one of its states, or of a weight."""
        copies: list[BlockCopy[FileExtent, None]] = []
        held: list[Fragment[None]] = []
        for name, fragments in self._read(slot, state, division).items():
            source = self._weight_state(name) if name in self.restored else None
            kept = state in (MASTER, WEIGHT) and (name not in self.restored or name in self.grown)
            found: Copies = ()
            if source is not None and (source == MASTER or state in (MASTER, WEIGHT)):
                found = self._found(name, source if state in (MASTER, WEIGHT) else state, rank, tuple(fragments))
            copies += found
            # Rows of padding, and further rows of a model, are in no copy.
            if kept or _numel(found) == sum(part.numel for part in fragments):
                held += fragments
        if state == WEIGHT:  # elements that aren't in the checkpoint keep the model's values
            held = [Fragment(0, slot.numel(), None, 0)]
        return PlannedBuffer(tuple(copies), tuple(held), division)

    def _read(self, slot: TargetSlot, state: str, division: Division) -> Mapping[str, Sequence[Fragment[None]]]:
        """Return by logical name what a rank itself reads of a state of a slot."""
        read: dict[str, list[Fragment[None]]] = {}
        intervals: Sequence[Interval] = division.read(slot.numel(state))
        for name, fragment in slot.fragments(state):
            for part in fragment.within(intervals):
                read.setdefault(name, []).append(part)
        assert overlapping_fragments(fragment for group in read.values() for fragment in group) is None
        return read

    def _weight_state(self, name: str) -> str:
        """Return the checkpoint's state with a weight: of a trained parameter the master, otherwise the weight itself."""
        return MASTER if self.source.parameters[name].kind == "trainable" else WEIGHT

    def _found(self, name: str, state: str, rank: int, fragments: tuple[Fragment[None], ...]) -> Copies:
        if fragments and state not in (MASTER, *self.source.parameters[name].states):
            return ()  # a state that policies let start at zero
        if name in self._common(rank // self._topology.tp):
            rank -= rank % self._topology.tp  # all ranks read one of the checkpoint's copies, should they differ
        return self._copies(name, state, rank, fragments)

    def _plan_tensor(self, name: str, state: str, rank: int, fragments: tuple[Fragment[None], ...]) -> Copies:
        with self._telling(name):
            return plan_tensor(self.source.source(name, state), Target(self._layout(name), rank, fragments), state)
        return ()

    def _layout(self, name: str) -> Layout:
        """Return the target's layout of what the checkpoint fills: without further rows."""
        layout = self.layouts[name]
        return layout.cropped(self.source.logical_shape(name)) if name in self.grown else layout

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Make an obstacle of what a plan refuses, unless the parameter has one."""
        try:
            yield
        except ValueError as error:
            if name not in self._obstacles.names:
                self._obstacles.add(name, f"{error}{self._hint(name)}")

    def _hint(self, name: str) -> str:
        """Return a hint for another shape, or for a vocabulary that source and target pad differently."""
        found, expected = self.source.logical_shape(name), self.layouts[name].logical_shape
        if found == expected:
            return ""
        padded = getattr(self.source.patterns[name], "vocabulary", False) and self.source.vocabulary_size is None
        return (PADDED_HINT * padded + GROWN_HINT * _is_grown(found, expected)) or f"; {RESHAPED_HINT}"

    def _common_states(self, slot: TargetSlot, numbers: PartitionNumbers) -> SlotStates:
        """Return the states and scalars of a slot: one optimizer entry serves all its parameters, so they must be the same."""
        trained: Sequence[Parameter] = [
            self.source.parameters[name]
            for name in slot.names
            if name in self.restored and self._weight_state(name) == MASTER
        ]
        if not trained or self.policies.optimizer_states != "restore":
            return SlotStates((MASTER,))
        for parameter in trained:
            for reason in parameter.refused.values():
                self._obstacles.add(parameter.name, f"{reason}; {REFUSED_HINT}")
        if any(parameter.refused for parameter in trained):
            return SlotStates((MASTER,))
        wanted = self._optimizer.kept_states(slot)
        trained = numbers.together([numbers.of_parameter(slot, parameter) for parameter in trained])
        if wanted is not None:
            trained = [self._counting(parameter, wanted) for parameter in trained]
        first = next(filter(_stepped, trained), trained[0])
        unstepped = []
        for parameter in trained:
            if _stepped(parameter) != _stepped(first) and self.policies.initialise:
                unstepped.append(parameter.name)
            elif parameter.states.keys() != first.states.keys() or not same_value(parameter.scalars, first.scalars):
                self._obstacles.add(
                    parameter.name,
                    f"has {_described(parameter)}, and {first.name}, which the target keeps in the same buffer, "
                    f"has {_described(first)}{_differing_hint(parameter, first)}",
                )
        found = self._fitting_states(slot, wanted, first, [parameter.name for parameter in trained])
        return replace(found, initialised=(*unstepped, *found.initialised))

    def _saved_settings(self, name: str) -> Mapping[str, Any]:
        groups = (group.hyperparameters for group in self.source.groups if name in group.names)
        return next(groups, {})

    def _counting(self, parameter: Parameter, wanted: KeptStates) -> Parameter:
        """Return a parameter with its step if the target's states count steps, also where the checkpoint's group alone does; and
        without one if the target's groups count: `settings_of_groups` gives it to these."""
        scalars = parameter.scalars
        if wanted.steps == "group":
            return replace(parameter, scalars={key: value for key, value in scalars.items() if key != GROUP_STEP})
        step = step_in_group(parameter, self._saved_settings(parameter.name))
        if step is None or GROUP_STEP not in wanted.scalars:
            return parameter
        return replace(parameter, scalars={**scalars, GROUP_STEP: step})

    def _fitting_states(
        self, slot: TargetSlot, wanted: KeptStates | None, first: Parameter, names: Sequence[str]
    ) -> SlotStates:
        """Return the states and scalars to restore, by a ``first`` parameter that stands for all in the slot. Others that the
        optimizer keeps are an obstacle, unless policies allow it."""
        found = first.states.keys() - {MASTER}
        if wanted is None or not (found or first.scalars):
            return SlotStates(tuple(first.states), first.scalars)
        scalars = first.scalars
        if self._optimizer.goes_on(slot, self._saved_settings(first.name)):
            wanted = replace(wanted, elementwise=wanted.elementwise | found)
        held, kept = found | scalars.keys(), wanted.elementwise | wanted.scalars
        missing, extra = kept - held, held - kept
        others = tuple(name for name in names if name != first.name)
        also = f", and so for {len(others)} more in its buffer" if others else ""
        if mixed := (found & wanted.scalars) | (scalars.keys() & wanted.elementwise):
            self._obstacles.add(
                first.name,
                f"{sorted(mixed)}: one number on one side, and one for each element on the other{also}; {RESET_HINT}",
                others,
            )
        if (missing and not self.policies.initialise) or (extra and not self.policies.drop):
            self._obstacles.add(
                first.name,
                f"the optimizer keeps {sorted(kept)}, the checkpoint holds {sorted(held)}{also}"
                + _other_states_hint(missing, extra, wanted.from_zero),
                others,
            )
        begun, left = tuple(names) if missing else (), tuple(names) if extra else ()
        if missing - wanted.from_zero:  # a number, or a state whose first value isn't known: all begin anew
            return SlotStates((MASTER,), {}, begun, left)
        states = (MASTER, *sorted(missing), *(state for state in first.states if state in wanted.elementwise))
        kept_scalars = {key: value for key, value in scalars.items() if key in wanted.scalars}
        return SlotStates(states, kept_scalars, begun, left)


def _is_grown(found: Shape, expected: Shape) -> bool:
    """Return whether a model has further rows and is the same otherwise: a vocabulary, or a layer's outputs, that grew."""
    return len(found) == len(expected) > 0 and found[0] < expected[0] and found[1:] == expected[1:]


PADDED_HINT = '; if the rows are padding, give "universal_checkpoint": {"vocabulary_size": …}'
GROWN_HINT = '; "on_missing": "init" lets further rows keep the model\'s values'
RESHAPED_HINT = "load_checkpoint(…, custom_load_fn=…) lets a function of yours make its weight of the saved one"
RESET_HINT = '"optimizer_states": "reset" starts all states afresh'
REFUSED_HINT = f'"load": "auto" restores it on the topology that it was saved on, {RESET_HINT}'
DIFFERING_HINT = "; give them parameter groups of their own"
NUMBERS_HINT = ', or "on_differing": "first", "last", "mean" or "max" makes one number of several'
UNSTEPPED_HINT = '; if it never had a gradient, "on_missing": "init" gives it zero state'


def _differing_hint(parameter: Parameter, first: Parameter) -> str:
    """Say what to do about two parameters of one slot with different states or numbers; no policy makes one step of two."""
    if not _stepped(parameter):
        return UNSTEPPED_HINT
    numbers = (first.scalars.keys() & parameter.scalars.keys()) - {GROUP_STEP}
    alike = all(same_value(first.scalars[key], parameter.scalars[key]) for key in numbers)
    return DIFFERING_HINT + ("" if alike else NUMBERS_HINT)


def _other_states_hint(missing: Set[str], extra: Set[str], from_zero: Set[str]) -> str:
    """Return a hint for an optimizer that keeps other states: common states needn't be lost, unless one side lacks a number."""
    if missing - from_zero:
        return f"; go on with the optimizer that saved them, or {RESET_HINT}"
    ways = [f'"on_missing": "init" starts {sorted(missing)} at zero'] if missing else []
    ways += [f'"on_extra": "drop" leaves {sorted(extra)} out'] if extra else []
    return f"; go on with the optimizer that saved them, or: {' and '.join(ways)}"


def _alike(slot: TargetSlot, state: str, common: Set[str]) -> tuple[Interval, ...]:
    """Return the intervals of a buffer with the parameters that tensor-parallel ranks read for one another."""
    if not common or not slot.exchangeable:
        return ()
    held = (part for name, part in slot.fragments(state) if name in common)
    return tuple((part.buffer_start, part.buffer_start + part.numel) for part in held)


def _numel(copies: Copies) -> int:
    return sum(prod(copy.shape) for copy in copies)


def _stepped(parameter: Parameter) -> bool:
    """Return whether the optimizer had made a state for a parameter: a torch optimizer does so at the first gradient."""
    return bool(parameter.states.keys() - {MASTER} or parameter.scalars or parameter.refused)


def _described(parameter: Parameter) -> str:
    return f"states {sorted(parameter.states)}, scalars {dict(parameter.scalars)}"
