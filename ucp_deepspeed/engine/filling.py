"""From a checkpoint and a live engine to a proven plan, and its execution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, HeldShapes
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of, parameter_names
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import logical_names, naming_specs, resolve_patterns
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.plan import BlockCopy, Fragment, Target, overlapping_fragments, plan_tensor
from ucp_deepspeed.transfer import FileReader, TransferCount, run_copies

Copies = tuple[BlockCopy[FileExtent, None], ...]


@dataclass(frozen=True)
class SlotPlan:
    """How one slot is filled: copies per state, and the scalars that its parameters share."""

    slot: EngineSlot
    copies: Mapping[str, Copies]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class WeightPlan:
    """How a frozen parameter or a buffer is filled."""

    weight: torch.Tensor
    copies: Copies


@dataclass(frozen=True)
class Filling:
    """Everything that one rank fills.

    Attributes:
        slots: see `SlotPlan`.
        weights: see `WeightPlan`.
        optimizer_states: whether the base optimizer's state is replaced.
        bytes_needed: bytes of the wanted elements, in the source's dtypes.
    """

    slots: tuple[SlotPlan, ...]
    weights: tuple[WeightPlan, ...]
    optimizer_states: bool
    bytes_needed: int

    def run(self, optimizer: EngineOptimizer) -> TransferCount:
        """Fill the engine. Collective."""
        reader, count = FileReader(), TransferCount()
        with torch.no_grad():
            optimizer.begin()
            for plan in self.slots:
                _fill(plan.slot.master.data, plan.copies[MASTER], reader, count)
                if self.optimizer_states:
                    states = {
                        state: _fill(torch.empty_like(plan.slot.master.data), copies, reader, count)
                        for state, copies in plan.copies.items()
                        if state != MASTER
                    }
                    optimizer.set_state(plan.slot, states, plan.scalars)
            optimizer.refresh_weights()
            for weight in self.weights:
                count.add(run_copies(weight.copies, reader, lambda _, held=weight.weight: held))  # type: ignore[misc]
            optimizer.end()
        reader.close()
        return count


def _fill(buffer: torch.Tensor, copies: Copies, reader: FileReader, count: TransferCount) -> torch.Tensor:
    """Fill a buffer; what no copy reaches is padding and becomes zero."""
    buffer.zero_()
    count.add(run_copies(copies, reader, lambda _: buffer))
    return buffer


@dataclass(frozen=True)
class Names:
    """Logical names of the checkpoint's and the model's parameters and buffers, by the names that each side has for them."""

    source: Mapping[str, str]
    target: Mapping[str, str]


def match_names(checkpoint: Checkpoint, model: EngineModel) -> Names:
    """Translate the names of both sides by the same specs.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one.
    """
    specs = naming_specs(model.spec, parameter_names(checkpoint), model.named("trainable", "frozen"))
    recorded = checkpoint.logical_names
    return Names(
        logical_names(list(checkpoint.parameters), specs, recorded), logical_names(list(model.tensors), specs, recorded)
    )


def plan_filling(
    checkpoint: Checkpoint,
    model: EngineModel,
    optimizer: EngineOptimizer,
    names: Names,
    optimizer_states: bool,
    strict: bool,
) -> Filling:
    """Plan all that this rank holds, and prove it covered.

    Args:
        names: see `match_names`.
        optimizer_states: whether to plan more than the master weights.
        strict: whether frozen parameters and buffers must be the same on both sides.

    Raises:
        MismatchError: lists every parameter that is missing, extra, of another shape or kind, or not covered.
        SpecError: nothing tells the layouts, or the spec doesn't fit.
    """
    _check_names(checkpoint, model, names, strict)
    return _Planner(checkpoint, model, optimizer, names).plan(optimizer_states)


def _check_names(checkpoint: Checkpoint, model: EngineModel, names: Names, strict: bool) -> None:
    source = {names.source[name]: parameter for name, parameter in checkpoint.parameters.items()}
    target = {names.target[name]: tensor for name, tensor in model.tensors.items()}
    problems: list[str] = []
    for name in sorted(source.keys() | target.keys()):
        if name not in source:
            if strict or target[name].kind == "trainable":
                problems.append(
                    f"{name}: missing in the checkpoint; the model expects {_some(target[name].local_shapes)}"
                )
        elif name not in target:
            if strict or source[name].kind == "trainable":
                problems.append(
                    f"{name}: extra in the checkpoint ({source[name].kind}, {_some(source[name].local_shapes)})"
                )
        elif source[name].kind != target[name].kind:
            problems.append(f"{name}: {source[name].kind} in the checkpoint, {target[name].kind} in the model")
    if problems:
        raise MismatchError(f"{checkpoint.path} and the model have different parameters", problems)


def _some(shapes: HeldShapes) -> Shape | None:
    return next((shape for shape in shapes if shape is not None), None)


class _Planner:
    """Plans one tensor after another, under logical names, and collects what is wrong."""

    def __init__(self, checkpoint: Checkpoint, model: EngineModel, optimizer: EngineOptimizer, names: Names) -> None:
        source = set(names.source.values())
        target = {names.target[name]: tensor for name, tensor in model.tensors.items()}
        self.tensors = {name: tensor for name, tensor in target.items() if name in source}
        patterns = resolve_patterns(
            [name for name, tensor in self.tensors.items() if tensor.kind != "buffer"],
            degree=max(checkpoint.topology.tp, model.topology.tp),
            spec=model.spec,
            recorded={
                names.source[name]: pattern for name, pattern in checkpoint.patterns.items() if name in names.source
            },
            inferred={names.target[name]: pattern for name, pattern in model.inferred.items()},
        )
        self.names, self.rank, self.optimizer = names.target, model.rank, optimizer
        self.view = UniversalView(checkpoint, names.source, patterns, model.vocabulary_size)
        local_shapes = {name: tensor.local_shapes for name, tensor in self.tensors.items()}
        self.layouts: Mapping[str, Layout] = layouts_of(
            self.view.patterns, local_shapes, model.topology.tp, self.view.vocabulary_size, "the model"
        )
        self.problems: list[str] = []
        self.bytes_needed = 0

    def plan(self, optimizer_states: bool) -> Filling:
        slots = tuple(self._slot(slot, optimizer_states) for slot in self.optimizer.slots())
        weights = tuple(self._weights())
        if self.problems:
            raise MismatchError(f"{self.view.checkpoint.path} doesn't fit the model", self.problems)
        return Filling(slots, weights, optimizer_states, self.bytes_needed)

    def _slot(self, slot: EngineSlot, optimizer_states: bool) -> SlotPlan:
        states, scalars = self._common_states(slot) if optimizer_states else ((MASTER,), {})
        copies: dict[str, list[BlockCopy[FileExtent, None]]] = {state: [] for state in states}
        held: dict[str, list[Fragment[None]]] = {}
        for name, fragment in slot.fragments():
            held.setdefault(self.names[name], []).append(fragment)
        assert overlapping_fragments(fragment for group in held.values() for fragment in group) is None
        for name, fragments in held.items():
            for state in states:
                copies[state] += self._tensor(name, state, fragments)
        return SlotPlan(slot, {state: tuple(found) for state, found in copies.items()}, scalars)

    def _common_states(self, slot: EngineSlot) -> tuple[tuple[str, ...], Mapping[str, float]]:
        """The states and scalars of a slot's parameters: one optimizer entry serves all, so they must be the same."""
        parameters = [self.view.parameters[self.names[name]] for name in slot.names]
        if not parameters:
            return (MASTER,), {}
        first = parameters[0]
        for parameter in parameters[1:]:
            if parameter.states.keys() != first.states.keys() or parameter.scalars != first.scalars:
                self.problems.append(
                    f"{parameter.name}: has {_states(parameter)}, and {first.name}, which the target keeps in the same buffer, "
                    f"has {_states(first)}"
                )
        live = self.optimizer.state_of(slot)
        wanted = {key for key, value in live.items() if isinstance(value, torch.Tensor) and value.ndim > 0}
        found = first.states.keys() - {MASTER}
        if wanted and found and wanted != found:
            self.problems.append(
                f"{first.name}: optimizer keeps {sorted(wanted)}, the checkpoint holds {sorted(found)}"
            )
        return tuple(first.states), first.scalars

    def _weights(self) -> Iterator[WeightPlan]:
        for name, tensor in self.tensors.items():
            if tensor.kind != "trainable" and tensor.tensor is not None:
                weight, fragments = tensor.held()
                yield WeightPlan(weight, self._tensor(name, WEIGHT, fragments))

    def _tensor(self, name: str, state: str, fragments: Sequence[Fragment[None]]) -> Copies:
        target = Target(self.layouts[name], self.rank, fragments)
        try:
            copies = plan_tensor(self.view.source(name, state), target, state)
        except ValueError as error:
            if not any(problem.startswith(f"{name}: ") for problem in self.problems):
                self.problems.append(f"{name}: {error}{self._hint(name)}")
            return ()
        itemsize = ITEMSIZE[self.view.parameters[name].states[state]]
        self.bytes_needed += sum(fragment.numel for fragment in fragments) * itemsize
        return copies

    def _hint(self, name: str) -> str:
        """What to do about a vocabulary that source and target pad differently."""
        padded = getattr(self.view.patterns[name], "vocabulary", False) and self.view.vocabulary_size is None
        return '; if the rows are padding, give "universal_checkpoint": {"vocabulary_size": …}' if padded else ""


def _states(parameter: Parameter) -> str:
    return f"states {sorted(parameter.states)}, scalars {dict(parameter.scalars)}"
