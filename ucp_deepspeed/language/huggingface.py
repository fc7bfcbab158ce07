"""Names and cuts of Hugging Face models, made from logical parameters (``docs/language.md``, *Hugging Face names*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
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
        to: their names, or the name of one tensor with all parts.
        parts: sizes of the parts relative to one another, within a group of rows. Each is a tensor; or, with one name, they
            come together in it, part by part.
        groups: number of groups of rows, one after another; each holds rows of every part.
        transpose: the tensors are the transposes of matrices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: str = Field(alias="from")
    to: str | Annotated[tuple[str, ...], Field(min_length=1)]
    parts: tuple[Number, ...] = (1,)
    groups: Number = 1
    transpose: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _check(self) -> Tensors:
        names = len(self.renamings)
        if not isinstance(self.to, str) and len(self.parts) != names:
            raise ValueError(f"{names} names and {len(self.parts)} parts")
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
        if tensors.transpose and len(shape) != 2:
            raise ValueError(f"shape {list(shape)} is no matrix, which could be transposed")
        names = tuple(str(each.logical_name(name)) for each in tensors.renamings)
        if len(tensors.parts) == 1:
            return Cut(names, None, tensors.transpose)
        values = dimension_values(self.dimensions, config)
        parts, groups = [_value(part, values) for part in tensors.parts], _value(tensors.groups, values)
        return Cut(names, _layout(shape, parts, groups, isinstance(tensors.to, str)), tensors.transpose)


@dataclass(frozen=True, slots=True)
class Cut:
    """The tensors that a logical parameter becomes: their names, and where its elements lie in the local tensors of the same
    numbers, or in their transposes. Without a layout the one tensor is the parameter."""

    names: tuple[str, ...]
    layout: Layout | None
    transposed: bool = False


def _value(number: int | str, values: Mapping[str, int]) -> int:
    return number if isinstance(number, int) else evaluate(number, values)


def _layout(shape: Shape, parts: Sequence[int], groups: int, together: bool) -> Layout:
    """Lay the rows of each part out, group by group, in a tensor for each part or ``together`` in one."""
    units = sum(parts) * groups
    if not shape or shape[0] % units or min(parts) < 1:
        raise ValueError(f"shape {list(shape)} can't be cut into {groups} groups of {':'.join(map(str, parts))}")
    unit, rest = shape[0] // units, shape[1:]
    before, held = 0, []
    for part in parts:
        rows, above = part * unit, groups * before * unit if together else 0
        firsts = [(group * sum(parts) + before) * unit for group in range(groups)]
        held.append(
            [
                Piece(_rows(first, rows, rest), _rows(above + group * rows, rows, rest))
                for group, first in enumerate(firsts)
            ]
        )
        before += part
    if together:
        return Layout(shape, (LocalTensor(shape, tuple(chain.from_iterable(held))),))
    sizes = [(groups * part * unit, *rest) for part in parts]
    return Layout(shape, tuple(LocalTensor(size, tuple(pieces)) for size, pieces in zip(sizes, held, strict=True)))


def _rows(first: int, count: int, rest: Shape) -> Box:
    return Box((first, *(0,) * len(rest)), (first + count, *rest))
