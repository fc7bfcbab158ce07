"""A checkpoint whose parameters are cut and joined differently from its files, for experts that another form keeps otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, Parameter, ParameterGroup
from ucp_deepspeed.checkpoint.deferred import Deferred
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a parameter in the files.

    Attributes:
        name: the parameter.
        start: position of the first element.
        numel: length, in elements.
    """

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class Regrouped:
    """A parameter made of runs, end to end."""

    shape: Shape
    runs: tuple[Run, ...]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the parameters in the files that are the sources of its runs."""
        return tuple(dict.fromkeys(run.name for run in self.runs))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate((run.numel for run in self.runs), initial=0))[:-1]

    def within(self, start: int, stop: int) -> Iterator[tuple[Run, int]]:
        """Yield the parts of its runs in an interval, each with its position in the parameter."""
        for run, first in zip(self.runs, self._starts, strict=True):
            low, high = max(start, first), min(stop, first + run.numel)
            if low < high:
                yield Run(run.name, run.start + low - first, high - low), low


class RegroupedCheckpoint(Checkpoint):
    """Another checkpoint, of one model-parallel rank, with some parameters cut and joined differently. See `Checkpoint`.

    Raises:
        MismatchError: one parameter would be made of trained and other ones, or of groups with different hyper-parameters.
    """

    def __init__(self, inner: Checkpoint, made: Mapping[str, Regrouped], renamed: Mapping[str, str]) -> None:
        """Args: made: new parameters, which replace their sources. renamed: other parameters, old name → new name."""
        self._inner, self._made, self._renamed = inner, made, renamed
        self._old = {new: old for old, new in renamed.items()}
        gone = {source for regrouped in made.values() for source in regrouped.sources}
        self._kept = [name for name in inner.parameters if name not in gone]
        self.path, self.form, self.topology, self.run = inner.path, inner.form, inner.topology, inner.run
        self.vocabulary_size, self.versions = inner.vocabulary_size, inner.versions
        self.patterns: Mapping[str, Pattern] = self._of_kept(inner.patterns)
        self.refused = self._of_kept(inner.refused)
        self.lacking, self.unrecorded = inner.lacking, inner.unrecorded
        self.recorded_shapes: Mapping[str, Shape] = self._of_kept(inner.recorded_shapes)
        self.logical_names: Mapping[str, str] = self._of_kept(inner.logical_names)
        self.tied = {alias: renamed.get(name, name) for alias, name in inner.tied.items() if name not in gone}
        self.parameters: Mapping[str, Parameter] = {
            **{
                renamed.get(name, name): replace(inner.parameters[name], name=renamed.get(name, name))
                for name in self._kept
            },
            **{name: self._parameter(name, regrouped) for name, regrouped in made.items()},
        }
        self.groups = self._groups()

    def _of_kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self._renamed.get(name, name): values[name] for name in self._kept if name in values}

    def _parameter(self, name: str, regrouped: Regrouped) -> Parameter:
        first, *others = [self._inner.parameters[source] for source in regrouped.sources]
        if any(other.kind != first.kind for other in others):
            raise MismatchError(
                f"{self.path} holds experts that were trained and some that weren't, which the model has in one tensor",
                [name],
            )
        refused = {key: why for parameter in (first, *others) for key, why in parameter.refused.items()}
        if any(not same_value((other.states, other.scalars), (first.states, first.scalars)) for other in others):
            refused["step"] = (
                f"experts have different states, or took different numbers of steps ({', '.join(regrouped.sources)})"
            )
        differing = Deferred(lambda: {key: held for each in (first, *others) for key, held in each.differing.items()})
        return Parameter(name, first.kind, (regrouped.shape,), first.states, first.scalars, refused, differing)

    def _groups(self) -> tuple[ParameterGroup, ...]:
        made_of: dict[str, list[str]] = {}
        for name, regrouped in self._made.items():
            for source in regrouped.sources:
                made_of.setdefault(source, []).append(name)
        groups = [replace(group, names=self._names_in(group.names, made_of)) for group in self._inner.groups]
        settings: dict[str, Mapping[str, Any]] = {}
        for group in groups:
            differing = [
                name
                for name in group.names
                if not same_value(settings.setdefault(name, group.hyperparameters), group.hyperparameters)
            ]
            if differing:
                raise MismatchError(
                    f"{self.path} holds experts in groups with different hyper-parameters, and the model has them in one tensor",
                    differing,
                )
        return tuple(groups)

    def _names_in(self, names: Sequence[str], made_of: Mapping[str, list[str]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(new for name in names for new in made_of.get(name, [self._renamed.get(name, name)])))

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        if name not in self._made:
            yield from self._inner.fragments(self._old.get(name, name), state, rank, local_start, local_stop)
            return
        for run, position in self._made[name].within(local_start, local_stop):
            for part in self._inner.local_fragments(run.name, state, rank, run.start, run.start + run.numel):
                yield replace(part, local_start=position + part.local_start - run.start)

    def layout(self, name: str) -> Layout | None:
        """See `Checkpoint.layout`."""
        return None if name in self._made else self._inner.layout(self._old.get(name, name))

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`."""
        return self._inner.client_state(rank, partition)

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """See `Checkpoint.unreadable`."""
        return self._inner.unreadable(rank, partition)

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`."""
        return self._inner.extra_states()

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`."""
        self._inner.check_sizes()
