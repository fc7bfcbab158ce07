"""Copies of a parameter on several pipeline stages, and the one that is read (docs/architecture.md, *Names and pipelines*)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import prod

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, Checkpoint, Parameter
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.differing import OnDiffering, all_same
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.transfer.evidence.held_values import HeldValues
from ucp_deepspeed.transfer.planning.target import ModelTensor

COPIES_HINT = (
    'the pipeline stages that saved it go on with their own, and "on_differing": "first" or "last" takes one stage\'s '
    "(--on-differing of the commands)"
)


@dataclass(frozen=True)
class Seen:
    """The states in which the copies of one parameter differ, and the stages whose copy has a state that isn't zero."""

    differing: frozenset[str] = frozenset()
    trained: frozenset[int] = frozenset()

    def __or__(self, other: Seen) -> Seen:
        return Seen(self.differing | other.differing, self.trained | other.trained)


@dataclass(frozen=True)
class Settled:
    """Parameters whose copies differ → the stage whose copy is read; the same in words; those for which nothing tells it."""

    stages: Mapping[str, int]
    told: tuple[str, ...]
    problems: tuple[str, ...]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise a MismatchError if there are problems."""
        if self.problems:
            told = f"{checkpoint.path} holds different values of one parameter"
            raise MismatchError(told, self.problems, COPIES_HINT)


def stages_with(tensor: Parameter | ModelTensor, degree: int) -> tuple[int, ...]:
    """Return the pipeline stages that hold a tensor, each of so many tensor-parallel ranks."""
    return tuple(stage for stage, shape in enumerate(tensor.local_shapes[::degree]) if shape is not None)


def on_several_stages(tensors: Mapping[str, Parameter | ModelTensor], degree: int) -> dict[str, tuple[int, ...]]:
    """Return the trained parameters that several pipeline stages hold → these stages."""
    found = {name: stages_with(tensor, degree) for name, tensor in tensors.items() if tensor.kind == "trainable"}
    return {name: stages for name, stages in found.items() if len(stages) > 1}


def held_by_several(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return `on_several_stages` for a checkpoint; forms other than DeepSpeed's hold one copy."""
    several = isinstance(checkpoint, DeepSpeedCheckpoint) and checkpoint.topology.pp > 1
    return on_several_stages(checkpoint.parameters, checkpoint.topology.tp) if several else {}


def may_differ(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return `held_by_several` without the parameters whose copies were the same when saved, as a manifest records."""
    held = held_by_several(checkpoint)
    recorded = recorded_differing(checkpoint)
    return held if recorded is None else {name: stages for name, stages in held.items() if name in recorded}


def recorded_differing(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """Return the parameters whose copies weren't the same, as a manifest records; None where none does."""
    manifest = checkpoint.manifest if isinstance(checkpoint, DeepSpeedCheckpoint) else None
    return None if manifest is None else manifest.differing_copies


def with_copies_of(checkpoint: Checkpoint, stages: Mapping[str, int]) -> Checkpoint:
    """Return the catalog that reads other stages' copies than the first's."""
    if not stages:
        return checkpoint
    assert isinstance(checkpoint, DeepSpeedCheckpoint)
    return DeepSpeedCheckpoint(checkpoint.path, checkpoint.files, stages)


def look(
    checkpoint: Checkpoint, copies: Mapping[str, Sequence[int]], share: tuple[int, int] = (0, 1)
) -> dict[str, Seen]:
    """Read copies and compare them bit by bit.

    Args:
        copies: parameter → stages that hold it.
        share: the part of the elements to look at, and the number of parts: ranks divide them.
    """
    with HeldValues(checkpoint) as held:
        return {name: _look_at(held, name, stages, share) for name, stages in copies.items()}


def _look_at(held: HeldValues, name: str, stages: Sequence[int], share: tuple[int, int]) -> Seen:
    assert isinstance(held.checkpoint, DeepSpeedCheckpoint)
    copies, degree = {stage: held.checkpoint.parameter_on(name, stage) for stage in stages}, held.checkpoint.topology.tp
    first, *others = copies.values()
    differing: set[str] = set()
    trained: set[int] = set()
    if any(other.states != first.states for other in others):
        differing.add("states")
    if not all_same([dict(copy.scalars) for copy in copies.values()]):
        differing.add("numbers")
    if len({copy.local_shapes[stage * degree] for stage, copy in copies.items()}) > 1:
        differing.add("shape")
    for state in dict.fromkeys(state for copy in copies.values() for state in copy.states):
        holding = {stage: copy for stage, copy in copies.items() if state in copy.states}
        dtypes = [NAMED_DTYPES[copy.states[state]] for copy in holding.values()]
        for rank in range(degree):
            shapes = [copy.local_shapes[stage * degree + rank] for stage, copy in holding.items()]
            numel = min(prod(shape) for shape in shapes if shape is not None)
            bits = [held.parts(copy, state, stage * degree + rank, share, numel) for stage, copy in holding.items()]
            for parts in zip(*bits, strict=True):
                values = [part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
                if not all_same(values):
                    differing.add(state)
                if state != MASTER:
                    trained.update(compress(holding, (value.to(torch.complex128).any() for value in values)))
    return Seen(frozenset(differing), frozenset(trained))


def merge(parts: Sequence[Mapping[str, Seen]]) -> dict[str, Seen]:
    """Join the results of ranks that looked at a part each."""
    found: dict[str, Seen] = {}
    for part in parts:
        for name, seen in part.items():
            found[name] = found.get(name, Seen()) | seen
    return found


def settle(
    checkpoint: Checkpoint,
    copies: Mapping[str, Sequence[int]],
    found: Mapping[str, Seen],
    how: OnDiffering,
    states: bool = True,
) -> Settled:
    """Decide which stage's copy is read of each parameter whose copies differ.

    Args:
        found: the results of `look` for all their elements.
        how: the choice where nothing tells which copy was trained.
        states: whether optimizer states are wanted, and not only weights.
    """
    chosen: dict[str, int] = {}
    told: list[str] = []
    problems: list[str] = []
    for name, stages in copies.items():
        seen, once = found[name], has_one_master(checkpoint, name, stages)
        differing = seen.differing if states or once else seen.differing & {MASTER}
        if not differing and not (once and name in (recorded_differing(checkpoint) or ())):
            continue
        place = _place(name, stages, differing)
        trained = [stage for stage in stages if stage in seen.trained]
        if len(trained) == 1 and not (once and trained != [stages[0]]):
            chosen[name] = trained[0]
            told.append(f"{place}; read is that of stage {trained[0]}, which alone has states that aren't zero")
        elif how != "error":
            chosen[name] = stages[-1 if how == "last" else 0]
            told.append(f"{place}; read is that of stage {chosen[name]}, as on_differing {how!r} says")
        else:
            by = f"trained on {'stages' if len(trained) > 1 else 'stage'} {_listed(trained)}"
            by = by if trained else "no states tell which was trained"
            alone = f", and the weights are in the files for stage {stages[0]} alone" if once else ""
            problems.append(f"{place}; {by}{alone}")
    return Settled(chosen, tuple(told), tuple(problems))


def told_of_lost(
    checkpoint: Checkpoint, copies: Mapping[str, Sequence[int]], found: Mapping[str, Seen]
) -> tuple[str, ...]:
    """Return a text for each parameter whose copies were trained apart, if ``copies`` have one master in the files each."""
    recorded = recorded_differing(checkpoint) or ()
    return tuple(
        f"{_place(name, stages, found[name].differing)}; the weights are in the files for stage {stages[0]} alone, and read "
        f"for all"
        for name, stages in copies.items()
        if found[name].differing or name in recorded
    )


def _place(name: str, stages: Sequence[int], differing: Collection[str]) -> str:
    found = f" in {', '.join(sorted(differing))}" if differing else ""
    return f"{name}: the copies of pipeline stages {_listed(stages)} differ{found}"


def _listed(stages: Sequence[int]) -> str:
    return " and ".join(map(str, stages))


def has_one_master(checkpoint: Checkpoint, name: str, stages: Sequence[int]) -> bool:
    """Return whether all stages' masters are one tensor in the files: a weight, which DeepSpeed writes for one stage."""
    places = set()
    for stage in stages:
        rank = stage * checkpoint.topology.tp
        shape = checkpoint.parameters[name].local_shapes[rank]
        for part in checkpoint.fragments(name, MASTER, rank, 0, prod(shape or ())):
            places.add((part.local_start, part.buffer.path, part.buffer.file_offset))
    return len({place[0] for place in places}) == len(places)
