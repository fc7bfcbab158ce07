"""Names and cuts of Hugging Face models, made from logical parameters (``docs/language.md``, *Hugging Face names*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ucp_deepspeed.language.dimensions import Dimension, dimension_values, evaluate
from ucp_deepspeed.language.naming import Renaming
from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import Layout, LocalTensor, Piece

Number = Annotated[int, Field(strict=True, gt=0)] | str
"""A number, or an expression over the dimensions."""


class Tensors(BaseModel):
    """The tensors that a logical parameter becomes.

    Attributes:
        from_: logical name, as in a renaming.
        to: their names. With several the first dimension is cut.
        parts: sizes of these tensors relative to one another, within a group of rows.
        groups: number of groups of rows, one after another; each holds rows of every tensor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: str = Field(alias="from")
    to: str | Annotated[tuple[str, ...], Field(min_length=1)]
    parts: tuple[Number, ...] = (1,)
    groups: Number = 1

    @model_validator(mode="after")
    def _check(self) -> Tensors:
        if len(self.parts) != len(self.renamings):
            raise ValueError(f"{len(self.renamings)} names and {len(self.parts)} parts")
        return self

    @cached_property
    def renamings(self) -> tuple[Renaming, ...]:
        """A renaming for each tensor."""
        names = (self.to,) if isinstance(self.to, str) else self.to
        return tuple(Renaming.model_validate({"from": self.from_, "to": name}) for name in names)


class HuggingFaceNames(BaseModel):
    """The tensors of Hugging Face models of some types.

    Attributes:
        models: values of ``model_type`` in ``config.json``.
        dimensions: numbers with names; ``{config: key}`` takes one from ``config.json``.
        tensors: see `Tensors`; exactly one of them applies to each parameter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    dimensions: Mapping[str, Dimension] = {}
    tensors: Annotated[tuple[Tensors, ...], Field(min_length=1)]

    def cuts(self, name: str, shape: Shape, config: Mapping[str, Any]) -> Cut | None:
        """Return what a logical parameter becomes; None if nothing is said of it.

        Args:
            config: content of ``config.json``.

        Raises:
            ValueError: several entries apply, a dimension has no value, or the shape can't be cut so.
        """
        found = [(each, each.renamings[0].logical_name(name)) for each in self.tensors]
        applying = [each for each, other in found if other is not None]
        if not applying:
            return None
        if len(applying) > 1:
            raise ValueError(f"{len(applying)} entries apply: {', '.join(each.from_ for each in applying)}")
        (tensors,) = applying
        names = [str(each.logical_name(name)) for each in tensors.renamings]
        if len(names) == 1:
            return Cut(tuple(names), Layout.whole(shape))
        values = dimension_values(self.dimensions, config)
        parts, groups = [_value(part, values) for part in tensors.parts], _value(tensors.groups, values)
        return Cut(tuple(names), _layout(shape, parts, groups))


@dataclass(frozen=True, slots=True)
class Cut:
    """The tensors that a logical parameter becomes: name and local tensor of each, in the same order."""

    names: tuple[str, ...]
    layout: Layout


def _value(number: int | str, values: Mapping[str, int]) -> int:
    return number if isinstance(number, int) else evaluate(number, values)


def _layout(shape: Shape, parts: Sequence[int], groups: int) -> Layout:
    """Lay the rows of each part out, group by group."""
    units = sum(parts) * groups
    if not shape or shape[0] % units or min(parts) < 1:
        raise ValueError(f"shape {list(shape)} can't be cut into {groups} groups of {':'.join(map(str, parts))}")
    unit, rest = shape[0] // units, shape[1:]
    before, held = 0, []
    for part in parts:
        pieces = []
        for group in range(groups):
            first, rows = (group * sum(parts) + before) * unit, part * unit
            start = group * rows
            pieces.append(Piece(_rows(first, rows, rest), _rows(start, rows, rest)))
        held.append(LocalTensor((groups * part * unit, *rest), tuple(pieces)))
        before += part
    return Layout(shape, tuple(held))


def _rows(first: int, count: int, rest: Shape) -> Box:
    return Box((first, *(0,) * len(rest)), (first + count, *rest))
