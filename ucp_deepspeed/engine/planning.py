"""From a checkpoint and a live engine to a proven plan of what this rank reads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.experts import expert_of
from ucp_deepspeed.checkpoint.view import UniversalView, held_shapes, layouts_of
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.engine.exchange import is_expert, reaches
from ucp_deepspeed.engine.filling import BufferPlan, Copies, Filling, SlotPlan, WeightPlan
from ucp_deepspeed.engine.known_layouts import known_by_plan
from ucp_deepspeed.engine.matching import Names
from ucp_deepspeed.engine.model import WEIGHT_DTYPES, EngineModel, EngineTensor
from ucp_deepspeed.engine.numbers import PartitionNumbers
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.states import KeptStates
from ucp_deepspeed.engine.training_state import usable
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import per_rank, resolve_patterns
from ucp_deepspeed.layout import Layout
from ucp_deepspeed.plan import (
    UNDIVIDED,
    BlockCopy,
    Division,
    Fragment,
    Interval,
    Shareable,
    Target,
    divide,
    overlapping_fragments,
    plan_tensor,
    read_together,
)
from ucp_deepspeed.transfer.matching import Matching, Policies, is_grown

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
        settings: for each live parameter group the hyper-parameters that it will have in place of its own; none to keep them.
        shared_read_bytes: what ranks hold alike is read once, a part by each, if it has at least so many bytes.
        numbers: what the slots take of the checkpoint's numbers.

    Raises:
        MismatchError: lists every parameter whose shape, states or scalars don't fit, or that isn't covered.
        SpecError: nothing tells the layouts that another tensor-parallel size needs, or the spec doesn't fit.
    """
    return _Planner(
        checkpoint, model, optimizer, names, matching, policies, settings, shared_read_bytes, numbers
    ).plan()


_Key = tuple[Any, ...]
"""Of a buffer: number of the slot and state, or the name of a weight."""


@dataclass(frozen=True)
class _SlotWanted:
    """A slot with the states and scalars that it will have; see `SlotPlan`."""

    slot: EngineSlot
    states: tuple[str, ...]
    scalars: Mapping[str, float]


class _Planner:
    """Plans one tensor after another, under logical names, and collects what is wrong."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: EngineModel,
        optimizer: EngineOptimizer,
        names: Names,
        matching: Matching,
        policies: Policies,
        settings: Sequence[Mapping[str, Any]],
        shared_read_bytes: int,
        numbers: PartitionNumbers,
    ) -> None:
        self.numbers = numbers
        self.settings, self.shared_read_bytes = settings, shared_read_bytes
        self._divisions: dict[_Key, tuple[Division, Any]] = {}
        self._kept: dict[tuple[int, int], KeptStates | None] = {}
        restored = frozenset(matching.restored)
        self.optimizer, self.policies, self.rank = optimizer, policies, model.rank
        self.tp, self.tensor_parallel_group = model.topology.tp, model.tensor_parallel_group
        self.local_shapes = [tensor.local_shapes for tensor in model.tensors.values()]
        self.logical = names.target
        self.starts = {name: tensor.start for name, tensor in model.tensors.items()}
        self.tensors = {
            names.target[name]: tensor for name, tensor in model.tensors.items() if names.target[name] in restored
        }
        patterns = resolve_patterns(
            [name for name, tensor in self.tensors.items() if tensor.kind != "buffer"],
            degree=max(checkpoint.topology.tp, model.topology.tp),
            spec=model.spec,
            recorded={
                names.source[name]: pattern for name, pattern in checkpoint.patterns.items() if name in names.source
            },
            inferred={names.target[name]: pattern for name, pattern in model.inferred.items()},
            exact=model.exact,
            refused={names.source[name]: why for name, why in checkpoint.refused.items() if name in names.source}
            | {names.target[name]: why for name, why in model.refused.items()},
            local_shapes=held_shapes(checkpoint, names.source),
            same_degree=checkpoint.topology.tp == model.topology.tp,
        )
        if dist.get_rank() == 0 and (unknown := per_rank(patterns)):
            logger.info(
                "no layout is known of %d parameters: each tensor-parallel rank takes its own share", len(unknown)
            )
        saved_size, live_size = checkpoint.vocabulary_size, model.vocabulary_size
        self.view = UniversalView(checkpoint, names.source, patterns, saved_size or live_size, restored)
        self.layouts: Mapping[str, Layout] = layouts_of(
            self.view.patterns,
            {name: tensor.local_shapes for name, tensor in self.tensors.items()},
            model.topology.tp,
            live_size or saved_size,
            "the model",
        )
        self.known = known_by_plan(patterns, names.target, live_size or saved_size)
        self.grown = tuple(name for name in self.tensors if policies.initialise and self._is_grown(name))
        self.reshaped = tuple(name for name in self.tensors if policies.reshape and self._is_reshaped(name))
        for name in self.reshaped:
            del self.tensors[name]
        self.unstepped: list[str] = []
        self.dropped: list[str] = []
        self.problems: list[str] = []
        self.bytes_needed = 0

    def _is_grown(self, name: str) -> bool:
        return is_grown(self.view.logical_shape(name), self.layouts[name].logical_shape)

    def _is_reshaped(self, name: str) -> bool:
        return name not in self.grown and self.view.logical_shape(name) != self.layouts[name].logical_shape

    def plan(self) -> Filling:
        for name in self.tensors:  # the shapes of all, also of what lies on other ranks
            self._tensor(name, self._weight_state(name), ())
        slots = [_SlotWanted(slot, *self._common_states(slot)) for slot in self.optimizer.slots()]
        weights = [
            tensor for tensor in self.tensors.values() if tensor.kind != "trainable" and tensor.tensor is not None
        ]
        self._divide(slots, weights)
        filled = tuple(self._slot(number, wanted) for number, wanted in enumerate(slots))
        read = tuple(self._weight(tensor) for tensor in weights)
        self.problems += self.numbers.problems
        if self.problems:
            raise MismatchError(f"{self.view.checkpoint.path} doesn't fit the model", self.problems)
        return Filling(
            filled,
            read,
            self.policies,
            (*self.grown, *self.reshaped, *self.unstepped),
            tuple(self.dropped),
            self.bytes_needed,
            self._rounding(),
            self._exchanged(slots, weights),
            self.view.checkpoint.versions,
            self.known,
        )

    def _exchanged(self, slots: Sequence[_SlotWanted], weights: Sequence[EngineTensor]) -> tuple[Any, str]:
        """The tensor-parallel ranks' process group, and what is the same on all of them: a digest of what they exchange."""
        told: list[Any] = []
        for key, (division, _) in self._divisions.items():
            if division.tensor_parallel is not None:
                number, *state = key
                held = slots[number].slot.fragments(*state) if state else ((number, None),)
                names = [name for name, _ in held if self.logical[name] in self._common]
                lengths = [(share.reader, share.stop - share.start) for share in division.tensor_parallel.shares]
                told.append((key, names, lengths))
        return self.tensor_parallel_group, hashlib.sha256(repr(told).encode()).hexdigest()

    def _rounding(self) -> torch.dtype | None:
        return WEIGHT_DTYPES[self.view.checkpoint.run.precision] if self.policies.rounded else None

    def _divide(self, slots: Sequence[_SlotWanted], weights: Sequence[EngineTensor]) -> None:
        """Divide among ranks what they all hold, where it is enough to be worth the exchange."""
        found = dict((*self._shareable_slots(slots), *self._shareable_weights(weights)))
        groups = {buffer.replicas for buffer in found.values() if buffer.replicas is not None}
        replicas = {group: _ranks(group) for group in groups}
        tensor_parallel = _ranks(self.tensor_parallel_group) if self.tensor_parallel_group is not None else (1, 0)
        divisions = divide(list(found.values()), replicas, tensor_parallel, self.shared_read_bytes)
        self._divisions = {
            key: (division, buffer.replicas) for (key, buffer), division in zip(found.items(), divisions, strict=True)
        }

    def _shareable_slots(self, slots: Sequence[_SlotWanted]) -> Iterator[tuple[_Key, Shareable]]:
        for number, wanted in enumerate(slots):
            slot, master = wanted.slot, wanted.slot.master
            if not master.is_contiguous():
                continue
            numel, itemsize, replicas = master.numel(), master.element_size(), self.optimizer.replicas(slot)
            for state in wanted.states:
                alike = self._alike(master, slot.fragments(state), state)
                yield (number, state), Shareable(numel, itemsize, replicas, alike)

    def _shareable_weights(self, weights: Sequence[EngineTensor]) -> Iterator[tuple[_Key, Shareable]]:
        for tensor in weights:
            held, fragments = tensor.held()
            if held.is_contiguous():
                alike = self._alike(held, ((tensor.name, part) for part in fragments), WEIGHT)
                yield (tensor.name,), Shareable(held.numel(), held.element_size(), tensor.replicas, alike)

    def _alike(
        self, buffer: torch.Tensor, fragments: Iterable[tuple[str, Fragment[None]]], state: str
    ) -> tuple[Interval, ...]:
        """What of a buffer tensor-parallel ranks hold too, and the checkpoint doesn't hold as often."""
        if not self._common or not reaches(self.tensor_parallel_group, buffer):
            return ()
        return tuple(
            (part.buffer_start, part.buffer_start + part.numel)
            for name, part in fragments
            if self.logical[name] in self._common
        )

    @cached_property
    def _common(self) -> frozenset[str]:
        """Logical names of what tensor-parallel ranks read for one another; see `read_together`."""
        if self.tensor_parallel_group is None:
            return frozenset()
        layouts = {
            name: self.layouts[name]
            for name, tensor in self.tensors.items()
            if tensor.tensor is not None and name not in self.grown and not _is_expert(tensor)
        }
        return read_together(layouts, self.view.layouts, self.local_shapes, self.rank, self.tp)

    def _slot(self, number: int, wanted: _SlotWanted) -> SlotPlan:
        buffers = {state: self._buffer(wanted, state, (number, state)) for state in wanted.states}
        return SlotPlan(wanted.slot, buffers, wanted.scalars)

    def _buffer(self, wanted: _SlotWanted, state: str, key: _Key) -> BufferPlan:
        """Plan what this rank reads of a slot's master or of one of its states."""
        division, replicas = self._divisions.get(key, (UNDIVIDED, None))
        copies: list[BlockCopy[FileExtent, None]] = []
        held: list[Fragment[None]] = []
        for name, fragments in self._read(wanted.slot, state, division).items():
            source = self._weight_state(name) if name in self.tensors else None
            kept = state == MASTER and (name not in self.tensors or name in self.grown)
            found: Copies = ()
            if source is not None and (source == MASTER or state == MASTER):
                found = self._tensor(name, source if state == MASTER else state, fragments)
            copies += found
            # Rows of padding, and those that a model has more, are in no copy.
            if kept or _numel(found) == sum(part.numel for part in fragments):
                held += fragments
        return BufferPlan(tuple(copies), tuple(held), division, replicas, self.tensor_parallel_group)

    def _read(self, slot: EngineSlot, state: str, division: Division) -> Mapping[str, Sequence[Fragment[None]]]:
        """By logical name, what this rank reads of a state of a slot."""
        read: dict[str, list[Fragment[None]]] = {}
        intervals = division.read(slot.flattening_of(state).buffer_numel(slot.partition))
        for name, fragment in slot.fragments(state):
            for part in fragment.within(intervals):
                start = self.starts[name] + part.local_start
                read.setdefault(self.logical[name], []).append(replace(part, local_start=start))
        assert overlapping_fragments(fragment for group in read.values() for fragment in group) is None
        return read

    def _weight_state(self, name: str) -> str:
        """State of the checkpoint that holds a weight: the master of a trained parameter, of others the weight itself."""
        return MASTER if self.view.parameters[name].kind == "trainable" else WEIGHT

    def _common_states(self, slot: EngineSlot) -> tuple[tuple[str, ...], Mapping[str, float]]:
        """The states and scalars of a slot: one optimizer entry serves all its parameters, so they must be the same."""
        names = [self.logical[name] for name in slot.names]
        trained: Sequence[Parameter] = [
            self.view.parameters[name] for name in names if name in self.tensors and self._weight_state(name) == MASTER
        ]
        if not trained or self.policies.optimizer_states != "restore":
            return (MASTER,), {}
        for parameter in trained:
            self.problems += [f"{parameter.name}: {reason}; {REFUSED_HINT}" for reason in parameter.refused.values()]
        if any(parameter.refused for parameter in trained):
            return (MASTER,), {}
        trained = self.numbers.together([self.numbers.of_parameter(slot, parameter) for parameter in trained])
        first = next(filter(_stepped, trained), trained[0])
        for parameter in trained:
            if _stepped(parameter) != _stepped(first) and self.policies.initialise:
                self.unstepped.append(parameter.name)
            elif parameter.states.keys() != first.states.keys() or not same_value(parameter.scalars, first.scalars):
                self.problems.append(
                    f"{parameter.name}: has {_states(parameter)}, and {first.name}, which the target keeps in the same buffer, "
                    f"has {_states(first)}{DIFFERING_HINT if _stepped(parameter) else UNSTEPPED_HINT}"
                )
        return self._fitting_states(slot, first, [parameter.name for parameter in trained])

    def _fitting_states(
        self, slot: EngineSlot, first: Parameter, names: Sequence[str]
    ) -> tuple[tuple[str, ...], Mapping[str, float]]:
        """The states and scalars to restore; where the live optimizer keeps others, a problem unless the policies allow it."""
        found, wanted = first.states.keys() - {MASTER}, self._states_kept(slot)
        if wanted is None or not (found or first.scalars):
            return tuple(first.states), first.scalars
        scalars = self._with_step(first, wanted)
        if self._goes_on(slot, first):
            wanted = replace(wanted, elementwise=wanted.elementwise | found)
        held, kept = found | scalars.keys(), wanted.elementwise | wanted.scalars
        missing, extra = kept - held, held - kept
        if mixed := (found & wanted.scalars) | (scalars.keys() & wanted.elementwise):
            self.problems.append(
                f"{first.name}: {sorted(mixed)}: one number on one side, and one for each element on the other; {RESET_HINT}"
            )
        if (missing and not self.policies.initialise) or (extra and not self.policies.drop):
            self.problems.append(
                f"{first.name}: the optimizer keeps {sorted(kept)}, the checkpoint holds {sorted(held)}"
                + _other_states_hint(missing, extra, wanted.from_zero)
            )
        self.unstepped += names if missing else ()
        self.dropped += names if extra else ()
        if missing - wanted.from_zero:  # a number, or a state whose first value isn't known: all begin anew
            return (MASTER,), {}
        states = (MASTER, *sorted(missing), *(state for state in first.states if state in wanted.elementwise))
        return states, {key: value for key, value in scalars.items() if key in wanted.scalars}

    def _with_step(self, parameter: Parameter, wanted: KeptStates) -> Mapping[str, float]:
        """Its scalars; where only its group counts steps, as up to DeepSpeed 0.6 in its FusedAdam, these for its own."""
        if GROUP_STEP not in wanted.scalars or GROUP_STEP in parameter.scalars:
            return parameter.scalars
        steps = self._saved_settings(parameter).get(GROUP_STEP)
        return {**parameter.scalars, **({GROUP_STEP: steps} if isinstance(steps, (int, float)) and steps > 0 else {})}

    def _goes_on(self, slot: EngineSlot, parameter: Parameter) -> bool:
        """Whether it is the optimizer that saved, as far as its groups tell, with the settings that it had: then it may have made
        states later than at its first step."""
        saved = self._saved_settings(parameter)
        taken = self.settings[slot.group].keys() if slot.group < len(self.settings) else frozenset()
        return self.optimizer.is_like(slot.group, saved) and usable(saved).keys() <= taken

    def _saved_settings(self, parameter: Parameter) -> Mapping[str, Any]:
        """Hyper-parameters of the group in which it was trained."""
        groups = (group.hyperparameters for group in self.view.groups if parameter.name in group.names)
        return next(groups, {})

    def _states_kept(self, slot: EngineSlot) -> KeptStates | None:
        """What the optimizer will keep for a slot; the same for all of a group that have as many dimensions."""
        key = slot.group, slot.master.ndim
        if key not in self._kept:
            settings = self.settings[slot.group] if slot.group < len(self.settings) else {}
            self._kept[key] = self.optimizer.kept_states(slot, settings)
        return self._kept[key]

    def _weight(self, tensor: EngineTensor) -> WeightPlan:
        """Plan a frozen parameter or a buffer."""
        name, (weight, fragments) = tensor.name, tensor.held()
        logical = self.logical[name]
        parameter = self.view.parameters[logical]
        if WEIGHT not in parameter.states and parameter.kind != "trainable":
            self.problems += [f"{logical}: {reason}" for reason in parameter.refused.values()]
        division, replicas = self._divisions.get((name,), (UNDIVIDED, None))
        intervals = division.read(weight.numel())
        parts = [part for fragment in fragments for part in fragment.within(intervals)]
        copies = self._tensor(logical, self._weight_state(logical), parts)
        kept = (Fragment(0, weight.numel(), None, 0),)
        return WeightPlan(weight, BufferPlan(copies, kept, division, replicas, self.tensor_parallel_group))

    def _tensor(self, name: str, state: str, fragments: Sequence[Fragment[None]]) -> Copies:
        # Of what this rank has no part of, only the shape counts: which states there are may lie in files that stay closed.
        if fragments and state != MASTER and state not in self.view.parameters[name].states:
            return ()  # one that policies let start at zero
        layout = self.layouts[name]
        if name in self.grown:
            layout = layout.cropped(self.view.logical_shape(name))
        try:
            # Of several copies in the checkpoint one for all, should they differ.
            rank = self.rank - self.rank % self.tp if name in self._common else self.rank
            copies = plan_tensor(self.view.source(name, state), Target(layout, rank, fragments), state)
        except ValueError as error:
            if not any(problem.startswith(f"{name}: ") for problem in self.problems):
                self.problems.append(f"{name}: {error}{self._hint(name)}")
            return ()
        if copies:
            self.bytes_needed += _numel(copies) * ITEMSIZE[self.view.parameters[name].states[state]]
        return copies

    def _hint(self, name: str) -> str:
        """What to do about another shape, or a vocabulary that source and target pad differently."""
        found, expected = self.view.logical_shape(name), self.layouts[name].logical_shape
        if found == expected:
            return ""
        padded = getattr(self.view.patterns[name], "vocabulary", False) and self.view.vocabulary_size is None
        padding = '; if the rows are padding, give "universal_checkpoint": {"vocabulary_size": …}' if padded else ""
        grown = '; "on_missing": "init" lets further rows keep the model\'s values' if is_grown(found, expected) else ""
        return padding + grown or f"; {RESHAPED_HINT}"


def _is_expert(tensor: EngineTensor) -> bool:
    """By its name too: DeepSpeed marks no buffers. Tensor-parallel ranks may hold different experts."""
    return expert_of(tensor.name) is not None or (tensor.tensor is not None and is_expert(tensor.tensor))


def _ranks(group: Any) -> tuple[int, int]:
    """How many there are in a process group, and this one's number."""
    return dist.get_world_size(group), dist.get_rank(group)


RESHAPED_HINT = "load_checkpoint(…, custom_load_fn=…) lets a function of yours make its weight of the saved one"
RESET_HINT = '"optimizer_states": "reset" starts all states afresh'
REFUSED_HINT = f'"load": "auto" restores it on the topology that it was saved on, {RESET_HINT}'
DIFFERING_HINT = (
    '; give them parameter groups of their own, or "on_differing": "first", "mean" or "max" makes one number of all '
    "but steps"
)
UNSTEPPED_HINT = '; if it never had a gradient, "on_missing": "init" gives it zero state'


def _other_states_hint(missing: Set[str], extra: Set[str], from_zero: Set[str]) -> str:
    """What to do about an optimizer that keeps other states: what both have needn't be lost, but for a number that one lacks."""
    if missing - from_zero:
        return f"; the optimizer that saved them takes them all, {RESET_HINT}"
    ways = [f'"on_missing": "init" starts {sorted(missing)} at zero'] if missing else []
    ways += [f'"on_extra": "drop" leaves {sorted(extra)} out'] if extra else []
    return f"; the optimizer that saved them takes them all, for this one {' and '.join(ways)}"


def _numel(copies: Copies) -> int:
    return sum(prod(copy.shape) for copy in copies)


def _stepped(parameter: Parameter) -> bool:
    """Whether the optimizer had made a state for it: a torch optimizer does so at the first gradient."""
    return bool(parameter.states.keys() - {MASTER} or parameter.scalars or parameter.refused)


def _states(parameter: Parameter) -> str:
    return f"states {sorted(parameter.states)}, scalars {dict(parameter.scalars)}"
