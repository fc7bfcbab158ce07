"""A checkpoint as another model needs it: with other ties, other names, or experts cut and joined differently from its files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, Deferred, FileExtent, Parameter
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.plan import Fragment


class _DerivedCheckpoint(Checkpoint):
    """Another checkpoint with its parameters under names of a model: some under several, some left out. See `Checkpoint`."""

    def __init__(
        self, inner: Checkpoint, names: dict[str, str], made_of: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Args:
        names: name here → name in the checkpoint.
        made_of: parameters that a subclass makes → their sources in the checkpoint.
        """
        self._inner, self._names = inner, names
        self.path, self.form, self.topology, self.run = inner.path, inner.form, inner.topology, inner.run
        self.vocabulary_size, self.versions = inner.vocabulary_size, inner.versions
        self.lacking, self.unrecorded, self.excluded = inner.lacking, inner.unrecorded, inner.excluded
        self.logical_names, self.patterns = self._here(inner.logical_names), self._here(inner.patterns)
        self.refused, self.recorded_shapes = self._here(inner.refused), self._here(inner.recorded_shapes)
        self.parameters = {
            name: held if held.name == name else replace(held, name=name)
            for name, held in self._here(inner.parameters).items()
        }
        first = {old: name for name, old in reversed(names.items())}
        self.tied = {
            alias: first[owner] for alias, owner in inner.tied.items() if owner in first and alias not in names
        }
        here: dict[str, list[str]] = {}
        for name, sources in ({name: [old] for name, old in names.items()} | dict(made_of or {})).items():
            for source in sources:
                here.setdefault(source, []).append(name)
        self.groups = tuple(
            replace(group, names=tuple(dict.fromkeys(new for name in group.names for new in here.get(name, ()))))
            for group in inner.groups
        )

    def _here(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[old] for name, old in self._names.items() if old in values}

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        return self._inner.fragments(self._names[name], state, rank, local_start, local_stop)

    def layout(self, name: str) -> Layout | None:
        """See `Checkpoint.layout`."""
        return self._inner.layout(self._names[name])

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


class RetiedCheckpoint(_DerivedCheckpoint):
    """Another checkpoint with copies of some tied parameters under further names, and without others. See `Checkpoint`."""

    def __init__(self, inner: Checkpoint, copies: Mapping[str, str], without: Collection[str] = ()) -> None:
        """Args: copies: further name → name in the checkpoint. without: names of parameters to leave out."""
        super().__init__(inner, {name: name for name in inner.parameters if name not in without} | dict(copies))
        self.copies, self.logical_names = copies, inner.logical_names


def copies_wanted(checkpoint: Checkpoint, wanted: Collection[str]) -> dict[str, str]:
    """Map further names of tied parameters that are separate ones among the ``wanted`` to the name that each has here.

    If that isn't wanted, the first of its other names takes its value and is no copy.
    """
    copies: dict[str, str] = {}
    taken = {name for name in checkpoint.parameters if name in wanted}
    for alias, owner in checkpoint.tied.items():
        if alias not in wanted or alias in checkpoint.parameters or owner not in checkpoint.parameters:
            continue
        if owner in taken:
            copies[alias] = owner
        taken.add(owner)
    return copies


def with_copies(checkpoint: Checkpoint, wanted: Collection[str]) -> Checkpoint:
    """Return the checkpoint with the `copies_wanted`; the checkpoint itself if there are none."""
    copies = copies_wanted(checkpoint, wanted)
    return RetiedCheckpoint(checkpoint, copies) if copies else checkpoint


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a parameter in the files; ``start`` and ``numel`` count elements."""

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

    def within(self, start: int, stop: int) -> Iterator[tuple[Run, int]]:
        """Yield the parts of its runs in an interval, each with its position in the parameter."""
        starts = accumulate((run.numel for run in self.runs), initial=0)
        for run, first in zip(self.runs, starts, strict=False):
            low, high = max(start, first), min(stop, first + run.numel)
            if low < high:
                yield Run(run.name, run.start + low - first, high - low), low


class RegroupedCheckpoint(_DerivedCheckpoint):
    """Another checkpoint, of one model-parallel rank, with some parameters cut and joined differently. See `Checkpoint`.

    Raises:
        MismatchError: one parameter would be made of trained and other ones, or of groups with different hyper-parameters.
    """

    def __init__(self, inner: Checkpoint, made: Mapping[str, Regrouped], renamed: Mapping[str, str]) -> None:
        """Args: made: new parameters, which replace their sources. renamed: other parameters, old name → new name."""
        gone = {source for regrouped in made.values() for source in regrouped.sources}
        names = {renamed.get(name, name): name for name in inner.parameters if name not in gone}
        super().__init__(inner, names, {name: regrouped.sources for name, regrouped in made.items()})
        self._made = made
        made_here = {name: self._parameter(name, regrouped) for name, regrouped in made.items()}
        self.parameters = {**self.parameters, **made_here}
        self._check_groups()

    def _parameter(self, name: str, regrouped: Regrouped) -> Parameter:
        first, *others = [self._inner.parameters[source] for source in regrouped.sources]
        if any(other.kind != first.kind for other in others):
            told = "holds experts that were trained and some that weren't, which the model has in one tensor"
            raise MismatchError(f"{self.path} {told}", [name])
        refused = {key: why for parameter in (first, *others) for key, why in parameter.refused.items()}
        if any(not same_value((other.states, other.scalars), (first.states, first.scalars)) for other in others):
            apart = "experts have different states, or took different numbers of steps"
            refused["step"] = f"{apart} ({', '.join(regrouped.sources)})"
        differing = Deferred(lambda: {key: held for each in (first, *others) for key, held in each.differing.items()})
        return Parameter(name, first.kind, (regrouped.shape,), first.states, first.scalars, refused, differing)

    def _check_groups(self) -> None:
        """Check that what one parameter is made of has the same hyper-parameters."""
        settings: dict[str, Mapping[str, Any]] = {}
        for group in self.groups:
            differing = [
                name
                for name in group.names
                if not same_value(settings.setdefault(name, group.hyperparameters), group.hyperparameters)
            ]
            if differing:
                told = "holds experts in groups with different hyper-parameters, and the model has them in one tensor"
                raise MismatchError(f"{self.path} {told}", differing)

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        if name not in self._made:
            yield from super().fragments(name, state, rank, local_start, local_stop)
            return
        for run, position in self._made[name].within(local_start, local_stop):
            for part in self._inner.local_fragments(run.name, state, rank, run.start, run.start + run.numel):
                yield replace(part, local_start=position + part.local_start - run.start)

    def layout(self, name: str) -> Layout | None:
        """See `Checkpoint.layout`."""
        return None if name in self._made else super().layout(name)
