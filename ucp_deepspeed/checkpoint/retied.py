"""A checkpoint for a model that ties other parameters: with further copies of tied parameters, and without some tied there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, Parameter, ParameterGroup
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment


def copies_wanted(checkpoint: Checkpoint, wanted: Collection[str]) -> dict[str, str]:
    """Map further names of tied parameters that are separate parameters in a model to the name that each has here.

    If the model lacks that name, the first of its other names takes its value and is no copy.

    Args:
        wanted: names of the model's parameters, under the checkpoint's names.
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


class RetiedCheckpoint(Checkpoint):
    """Another checkpoint with copies of some tied parameters under further names, and without others. See `Checkpoint`."""

    def __init__(self, inner: Checkpoint, copies: Mapping[str, str], without: Collection[str] = ()) -> None:
        """Args: copies: further name → name in the checkpoint. without: names of parameters to leave out."""
        self._inner, self.copies = inner, copies
        self.path, self.form, self.topology, self.run = inner.path, inner.form, inner.topology, inner.run
        self.vocabulary_size, self.versions = inner.vocabulary_size, inner.versions
        self.logical_names: Mapping[str, str] = inner.logical_names
        self.patterns: Mapping[str, Pattern] = self._with_copies(inner.patterns)
        self.refused = self._with_copies(inner.refused)
        self.lacking, self.unrecorded = inner.lacking, inner.unrecorded
        self.recorded_shapes: Mapping[str, Shape] = self._with_copies(inner.recorded_shapes)
        self.tied = {alias: owner for alias, owner in inner.tied.items() if alias not in copies}
        self.parameters: Mapping[str, Parameter] = {
            name: parameter if parameter.name == name else replace(parameter, name=name)
            for name, parameter in self._with_copies(inner.parameters).items()
            if name not in without
        }
        self.groups: tuple[ParameterGroup, ...] = tuple(
            replace(group, names=self._names_in(group.names, without)) for group in inner.groups
        )

    def _with_copies(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, **{alias: values[owner] for alias, owner in self.copies.items() if owner in values}}

    def _names_in(self, names: tuple[str, ...], without: Collection[str]) -> tuple[str, ...]:
        copies = (alias for alias, owner in self.copies.items() if owner in names)
        return (*(name for name in names if name not in without), *copies)

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        return self._inner.fragments(self.copies.get(name, name), state, rank, local_start, local_stop)

    def layout(self, name: str) -> Layout | None:
        """See `Checkpoint.layout`."""
        return self._inner.layout(self.copies.get(name, name))

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
