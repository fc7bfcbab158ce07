"""Pair a checkpoint with the model to load into: the same for a live engine and for ``ucp plan``.

Experts come into the model's form, ties become the model's, both sides' names become logical and are matched under the policies;
then each pair gets a pattern, and each side a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, ParameterGroup
from ucp_deepspeed.checkpoint.derived import RetiedCheckpoint, copies_wanted
from ucp_deepspeed.checkpoint.expert_forms import in_form_of
from ucp_deepspeed.checkpoint.view import (
    UniversalView,
    held_shapes,
    layouts_of,
    names_of,
    parameter_names,
    patterns_of,
)
from ucp_deepspeed.errors import ListingError, MismatchError
from ucp_deepspeed.language import logical_names, naming_specs
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.language.schemes import seen_through
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.layout.pattern import AnyPattern, Shard
from ucp_deepspeed.transfer.planning.numbers import (
    GroupSettings,
    PartitionNumbers,
    schedule_of_groups,
    settings_of_groups,
)
from ucp_deepspeed.transfer.planning.policies import (
    ANEW_WAY,
    Matching,
    Obstacles,
    Policies,
    check_any,
    check_matching,
    check_recorded,
    match,
    no_schedule,
    some_names,
    some_shape,
)
from ucp_deepspeed.transfer.planning.target import ModelDescription, ModelTensor, PlaceOfSteps

CompareTies = Callable[[Checkpoint, Mapping[str, str]], Sequence[str]]
"""Compares parameters that the model ties, under the checkpoint's names; see `differing_ties`."""


@dataclass(frozen=True)
class Names:
    """Logical names of the checkpoint's and the model's parameters and buffers, by the names that each side has for them."""

    source: Mapping[str, LogicalName]
    target: Mapping[str, LogicalName]


@dataclass(frozen=True)
class VocabularyRows:
    """The rows of a vocabulary's parameters on both sides. Rows of padding that both have are restored like others: a model may
    count them in its softmax.

    Attributes:
        saved, live: rows of the checkpoint's and of the model's unpadded vocabulary; None if not known.
        held: rows of each parameter in the checkpoint and in the model, padding included.
    """

    saved: int | None
    live: int | None
    held: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls,
        sizes: tuple[int | None, int | None],
        patterns: Mapping[str, AnyPattern],
        source: Mapping[str, Sequence[Shape]],
        target: Mapping[str, ModelTensor],
        degree: int,
    ) -> VocabularyRows:
        """Count rows. Args: source: shapes on the checkpoint's tensor-parallel ranks. degree: the model's."""
        held: dict[str, tuple[int, int]] = {}
        for name, tensor in target.items():
            pattern = patterns.get(name)
            live = _of_first_stage(tensor.local_shapes, degree)
            if isinstance(pattern, Shard) and pattern.vocabulary and live:
                with suppress(ValueError):  # shapes that contradict the pattern are told with the layouts
                    found, wanted = (pattern.logical_shape(shapes)[pattern.dim] for shapes in (source[name], live))
                    held[name] = found, wanted
        return cls(*sizes, held)

    @property
    def restored(self) -> tuple[int | None, int | None]:
        """Rows to restore, as each side counts them: with the padding that both have, unless the vocabulary has changed."""
        if self.saved is None or self.saved != self.live or not self.held:
            return self.saved, self.live
        return (max(self.saved, min(map(min, self.held.values()))),) * 2

    def told(self, without: Collection[str | None] = ()) -> Iterator[str]:
        """Tell where the sides pad differently, and what becomes of rows that one of them has."""
        rows, _ = self.restored
        if rows is None or self.saved != self.live:
            return
        groups: dict[tuple[int, int], list[str]] = {}
        for name, each in self.held.items():
            if name not in without and each != (rows, rows):
                groups.setdefault(each, []).append(name)
        for (found, wanted), names in groups.items():
            left, zero = found - rows, wanted - rows
            lost = [f"{left} of the checkpoint's are left out"] * (left > 0)
            lost += [f"{zero} of the model's become zero"] * (zero > 0)
            yield (
                f"{some_names(names)}: {found} rows in the checkpoint and {wanted} in the model, of which {self.saved} aren't "
                f"padding; {' and '.join(lost)}, so a loss that counts padding isn't what it would have been"
            )


def _of_first_stage(shapes: HeldShapes, degree: int) -> list[Shape]:
    """Return the local shapes on the tensor-parallel ranks of the first pipeline stage that holds a tensor."""
    stages = (
        [shape for shape in shapes[first : first + degree] if shape is not None]
        for first in range(0, len(shapes), degree)
    )
    return next(filter(None, stages), [])


@dataclass(frozen=True)
class Pair:
    """A checkpoint and a model, paired. Tensors and layouts are by logical name.

    Attributes:
        checkpoint: the checkpoint with the model's experts and ties.
        joined: parameters of the checkpoint that the model ties → those that stay.
        matching: which parameters and buffers are on both sides.
        tensors: the model's.
        patterns: of all parameters on both sides.
        rows: the vocabulary's.
        view: the checkpoint's, of what is on both sides.
        layouts: layouts of these in the model.
        obstacles: all that was found so far; planning adds more.
    """

    checkpoint: Checkpoint
    model: ModelDescription
    policies: Policies
    names: Names
    joined: Mapping[str, str]
    matching: Matching
    tensors: Mapping[str, ModelTensor]
    patterns: Mapping[str, AnyPattern]
    rows: VocabularyRows
    view: UniversalView
    layouts: Mapping[str, Layout]
    obstacles: Obstacles = field(repr=False)

    def settings(
        self,
        groups: Sequence[Sequence[str]],
        live_group: Callable[[int], Mapping[str, Any]],
        place_of_steps: Callable[[int], PlaceOfSteps | None],
        numbers: PartitionNumbers,
    ) -> GroupSettings:
        """Give each parameter group of the model the hyper-parameters of its parameters; see `settings_of_groups`."""
        source = {name: group for names, group in self._groups for name in names}
        held = source, self.view.parameters
        keep, scheduled = self.policies.keep_settings, self.policies.scheduled
        place: Callable[[int], PlaceOfSteps | None] = place_of_steps
        if self.policies.optimizer_states != "restore":  # steps that begin anew needn't be the same
            place = _in_states
        return settings_of_groups(*held, groups, live_group, place, numbers, keep, self.obstacles, scheduled)

    def schedule(self, groups: Sequence[Sequence[str]], live: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the scheduler's state for the model's groups; see `schedule_of_groups`."""
        group_of = {name: index for index, (names, _) in enumerate(self._groups) for name in names}
        sources = [sorted({group_of[name] for name in names if name in group_of}) for names in groups]
        state, count = self.checkpoint.run.lr_scheduler, len(self._groups)
        return schedule_of_groups(state, live, sources, count, self.policies.keep_settings, self.obstacles)

    def check_schedule(self) -> None:
        """Refuse a checkpoint without a scheduler's state, for a model that has a scheduler and restores it."""
        run = self.checkpoint.run
        if run.lr_scheduler is None:
            self.obstacles.add(None, no_schedule(self.checkpoint.path, run.global_steps, ANEW_WAY))

    @cached_property
    def _groups(self) -> list[tuple[list[str], ParameterGroup]]:
        """The checkpoint's parameter groups, each with its logical names."""
        names = self.names.source
        return [([names[name] for name in group.names if name in names], group) for group in self.checkpoint.groups]


def _in_states(index: int) -> PlaceOfSteps:
    return "state"


def pair(
    checkpoint: Checkpoint,
    model: ModelDescription,
    policies: Policies,
    obstacles: Obstacles,
    compare: CompareTies,
) -> Pair:
    """Pair a checkpoint with a model.

    Args:
        obstacles: takes what stands against the load.
        compare: tells which of the parameters that the model ties differ.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one; or nothing tells the layouts that another
            tensor-parallel size needs, or the spec doesn't fit.
        MismatchError, UnsupportedError: the experts don't fit, or layouts contradict shapes, records or the model. If there are
            other obstacles, it lists these.
    """
    checkpoint, joined = in_ties_of(in_form_of(checkpoint, model.local_shapes), model, compare, obstacles)
    names = match_names(checkpoint, model)
    source: dict[str, Parameter] = {names.source[name]: parameter for name, parameter in checkpoint.parameters.items()}
    tensors: dict[str, ModelTensor] = {names.target[name]: tensor for name, tensor in model.tensors.items()}
    matching = match(source, tensors)
    unrecorded = {name: why for name, why in checkpoint.unrecorded.items() if name in model.tensors}
    check_recorded(unrecorded, policies, obstacles)
    check_matching(source, tensors, policies, obstacles)
    if not (obstacles or policies.reshape):
        check_any(source, tensors, matching, policies, obstacles, checkpoint.path)
    restored = {name: tensors[name] for name in matching.restored}
    size = model.vocabulary_size or checkpoint.vocabulary_size
    try:
        patterns = patterns_of(
            checkpoint,
            names.source,
            [LogicalName(name) for name, tensor in restored.items() if tensor.kind != "buffer"],
            model.spec,
            model.topology.tp,
            {names.target[name]: pattern for name, pattern in model.inferred.items()},
            model.exact,
            {names.target[name]: why for name, why in model.refused.items()},
        )
        sizes, degree = (checkpoint.vocabulary_size or size, size), model.topology.tp
        rows = VocabularyRows.of(sizes, patterns, held_shapes(checkpoint, names.source), restored, degree)
        view = UniversalView(checkpoint, names.source, patterns, rows.restored[0], frozenset(restored))
        held = {name: tensor.local_shapes for name, tensor in restored.items()}
        shapes = {name: each for name, each in held.items() if some_shape(each) is not None}
        layouts = layouts_of(view.patterns, shapes, degree, rows.restored[1], "the model")
    except ListingError as error:
        if obstacles and isinstance(error, MismatchError):
            obstacles.add_error(error)
        obstacles.check(checkpoint.path)
        raise
    return Pair(checkpoint, model, policies, names, joined, matching, tensors, patterns, rows, view, layouts, obstacles)


def match_names(checkpoint: Checkpoint, model: ModelDescription) -> Names:
    """Translate the names of both sides by the same specs.

    The checkpoint's recorded names are used for the model only where no spec names anything: a layer may have another number
    there. Names that differ by wrappers alone are the same. A tied parameter that the model has under another of its names, since
    its modules stand in another order, gets that name.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one.
    """
    source, target = _translated(checkpoint, model)
    wanted = frozenset(target.values())
    held: dict[str, str] = {source[name]: name for name in checkpoint.parameters}
    of_model = {
        held[alias]: target[owner]
        for alias, owner in model.tied.items()
        if alias in held and alias not in wanted and target[owner] not in held
    }
    renamed = {
        owner: source[alias]
        for alias, owner in checkpoint.tied.items()
        if source.get(alias) in wanted and owner in source and source[owner] not in wanted
    }
    return Names(source | of_model | renamed, target)


def _translated(
    checkpoint: Checkpoint, model: ModelDescription
) -> tuple[dict[str, LogicalName], dict[str, LogicalName]]:
    """Return logical names of both sides; they include further names of tied parameters where these have other logical names."""
    specs = naming_specs(model.spec, parameter_names(checkpoint), model.named("trainable", "frozen"))
    held = list(model.tensors)
    target = logical_names(held, specs, model.logical_names)
    if all(name == logical for name, logical in target.items()):
        target = logical_names(held, specs, checkpoint.logical_names)
    source = names_of(checkpoint, specs)
    wrapped = seen_through(source.values(), [*target.values(), *(name for name in model.tied if name not in target)])
    return {name: LogicalName(wrapped.get(logical, logical)) for name, logical in source.items()}, target


def in_ties_of(
    checkpoint: Checkpoint, model: ModelDescription, compare: CompareTies, obstacles: Obstacles
) -> tuple[Checkpoint, dict[str, str]]:
    """Return the checkpoint with copies of tied parameters that the model keeps apart, and one of each that the model ties; and
    what that leaves out → what stays in its place.

    Raises:
        SpecError: see `match_names`.
    """
    if not checkpoint.tied and not model.tied:
        return checkpoint, {}
    source, target = _translated(checkpoint, model)
    wanted = set(target.values())
    copies = copies_wanted(checkpoint, {name for name, logical in source.items() if logical in wanted})
    held: dict[str, str] = {source[name]: name for name in checkpoint.parameters}
    joined = {
        held[alias]: held[target[owner]]
        for alias, owner in model.tied.items()
        if alias in held and alias not in wanted and target[owner] in held
    }
    for problem in compare(checkpoint, joined) if joined else ():
        obstacles.add_line(problem)
    return (RetiedCheckpoint(checkpoint, copies, joined) if copies or joined else checkpoint), joined
