"""Parameter patterns: the names of layouts in the language.

Each pattern gives the whole parameter's shape (``logical_shape``, the paper's *Union* and *StripPad*), the shape that each rank
of a target would hold (``local_shapes``, the paper's *GenUcpMetadata*), and the position of each box (``layout``).

All raise `ValueError` if the shapes contradict the pattern. The caller knows the parameter's name and adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise, product
from math import prod
from typing import ClassVar, Literal, TypeAlias

from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import Layout, LocalTensor, Piece, Union, pieces_of


@dataclass(frozen=True, slots=True)
class Scale:
    """Modifier: each rank stores ``logical * factor ** power``, with one power for each state that it applies to.

    Attributes:
        factor: ``one_over_degree`` suits a row-parallel bias that every rank adds before the sum over the ranks.
        powers: state name → exponent. A state that isn't named can't be moved between different degrees and is refused.
    """

    factor: Literal["one_over_degree"] = "one_over_degree"
    powers: Mapping[str, int] = field(default_factory=lambda: {"fp32": 1, "weight": 1}, hash=False)


class _Whole:
    """A parameter that each of its ranks holds in full."""

    __slots__ = ()
    kind: ClassVar[str]
    union: ClassVar[Union] = "take"
    scale: Scale | None = None

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The shape that all ranks share."""
        return _common_shape(local_shapes, self.kind)

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The logical shape, on every rank."""
        return (logical_shape,) * degree

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """The whole parameter on every rank."""
        if any(shape != logical_shape for shape in local_shapes):
            raise ValueError(f"local shapes {list(local_shapes)} differ from the logical shape {logical_shape}")
        locals_ = Layout.whole(self.logical_shape(local_shapes)).locals * len(local_shapes)
        if self.scale is None:
            return Layout(logical_shape, locals_, self.union)
        return Layout(logical_shape, locals_, self.union, Fraction(1, len(local_shapes)), self.scale.powers)


@dataclass(frozen=True, slots=True)
class Unique(_Whole):
    """Held by exactly one model-parallel rank, in full."""

    pattern: Literal["unique"] = "unique"

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The shape of the one local tensor."""
        if len(local_shapes) != 1:
            raise ValueError(f"unique parameter is held by {len(local_shapes)} ranks")
        return local_shapes[0]

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The logical shape, on one rank."""
        if degree != 1:
            raise ValueError(f"unique parameter can't be spread over {degree} ranks")
        return (logical_shape,)


@dataclass(frozen=True, slots=True)
class Replicate(_Whole):
    """Each rank has the whole parameter with the same values, so any copy serves (norms, row-parallel biases)."""

    kind = "replicated"
    pattern: Literal["replicate"] = "replicate"
    scale: Scale | None = None


@dataclass(frozen=True, slots=True)
class Partial(_Whole):
    """Updated on its own by every rank: the logical value is the mean (ALiBi models' embedding norms)."""

    kind = "partial"
    union = "mean"
    pattern: Literal["partial"] = "partial"


@dataclass(frozen=True, slots=True)
class Shard:
    """Split along one dimension over the ranks. A fused tensor is split as several parts side by side.

    Attributes:
        dim: the dimension that is split.
        parts: relative sizes of the fused parts along ``dim``, in logical order. Each part is split over the ranks on its
            own, and a rank's local tensor is its shares of the parts, side by side (the paper's *Shard-NC*). ``(1,)`` is a
            plain shard; ``(1, 1)`` a fused gate/up pair.
        heads: for each part the number of equal units that no cut goes through. A rank holds whole consecutive units of a part,
            dealt out evenly. If a part has fewer units than there are ranks, neighbouring ranks share one (fewer kv heads than
            tensor-parallel ranks).
        widths: share of each rank along ``dim``, in elements. The default is an even split; if the degree doesn't divide the
            extent, the first ranks hold one more. With several parts or with heads, shares follow from those.
        vocabulary: the logical end of ``dim`` is the vocabulary size; elements behind it in the local tensors are padding.
        pad_to_multiple: with ``vocabulary``, a target without a live model pads the vocabulary to a multiple of this times
            the degree.
    """

    dim: int = 0
    pattern: Literal["shard"] = "shard"
    parts: tuple[int, ...] = (1,)
    widths: tuple[int, ...] | None = None
    vocabulary: bool = False
    pad_to_multiple: int = 1
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        heads, parts = self.heads, len(self.parts)
        misfit = heads is not None and (len(heads) != parts or min(heads, default=0) < 1)
        one_part_only = self.widths is not None or self.vocabulary
        faults = {
            f"dim must not be negative: {self.dim}": self.dim < 0,
            f"parts must be positive: {self.parts}": min(self.parts, default=0) < 1,
            f"pad_to_multiple must be positive: {self.pad_to_multiple}": self.pad_to_multiple < 1,
            f"widths must not be negative: {self.widths}": min(self.widths or (), default=0) < 0,
            "widths don't apply to a vocabulary, whose ranks hold equal shares": self.vocabulary
            and self.widths is not None,
            "widths and vocabulary don't apply to a shard with parts": parts > 1 and one_part_only,
            f"heads must be a positive number for each of {parts} parts: {heads}": misfit,
            "widths and vocabulary don't apply to a shard with heads": heads is not None and one_part_only,
        }
        for fault, present in faults.items():
            if present:
                raise ValueError(fault)

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The local shapes joined along ``dim``, without vocabulary padding."""
        first = local_shapes[0]
        _check_dim(self.dim, first)
        for shape in local_shapes:
            if _with(shape, {self.dim: 0}) != _with(first, {self.dim: 0}):
                raise ValueError(f"local shapes {list(local_shapes)} differ outside dimension {self.dim}")
        total = self._without_copies(sum(shape[self.dim] for shape in local_shapes), len(local_shapes))
        if self.vocabulary and vocabulary_size is not None:
            if vocabulary_size > total:
                raise ValueError(f"vocabulary size {vocabulary_size} is above the {total} rows that the ranks hold")
            total = vocabulary_size
        return _with(first, {self.dim: total})

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The share of each of ``degree`` ranks."""
        _check_dim(self.dim, logical_shape)
        extent = logical_shape[self.dim]
        if self.widths is not None:
            if len(self.widths) != degree or sum(self.widths) != extent:
                raise ValueError(f"widths {self.widths} don't split {extent} over {degree} ranks")
            return tuple(_with(logical_shape, {self.dim: width}) for width in self.widths)
        if self.vocabulary:
            unit = self.pad_to_multiple * degree
            return (_with(logical_shape, {self.dim: -(-extent // unit) * unit // degree}),) * degree
        shares = self._part_shares(extent, degree)
        return tuple(_with(logical_shape, {self.dim: sum(width for _, width in share)}) for share in shares)

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """A piece per part and rank."""
        joined = self.logical_shape(local_shapes)
        if _with(joined, {self.dim: 0}) != _with(logical_shape, {self.dim: 0}):
            raise ValueError(f"local shapes {list(local_shapes)} don't fit the logical shape {logical_shape}")
        extent = logical_shape[self.dim]
        extents = [shape[self.dim] for shape in local_shapes]
        if self.widths is not None and extents != list(self.widths):
            raise ValueError(f"local shapes {list(local_shapes)} don't have the widths {self.widths}")
        if len(self.parts) == 1 and self.heads is None:
            starts = list(accumulate(extents, initial=0))
            if starts[-1] < extent or (starts[-1] > extent and not self.vocabulary):
                raise ValueError(f"local extents {extents} don't join to {extent} along dimension {self.dim}")
            shares = [[(start, min(stop, extent) - start)] for start, stop in pairwise(starts)]
        else:
            shares = self._part_shares(extent, len(local_shapes))
            held = [sum(numel for _, numel in share) for share in shares]
            if held != extents:
                heads = f" with heads {self.heads}" if self.heads is not None else ""
                raise ValueError(
                    f"local extents {extents} don't match parts {self.parts}{heads} of {extent}: expected {held}"
                )
        locals_ = tuple(
            LocalTensor(shape, self._pieces(logical_shape, share))
            for shape, share in zip(local_shapes, shares, strict=True)
        )
        return Layout(logical_shape, locals_)

    def _pieces(self, logical_shape: Shape, share: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
        """Return the pieces of one rank: (logical start, extent) runs along ``dim``, side by side from 0."""
        pieces: list[Piece] = []
        local_start = 0
        whole = Box.whole(logical_shape)
        for start, extent in share:
            if extent > 0:
                box = Box(_with(whole.start, {self.dim: start}), _with(whole.stop, {self.dim: start + extent}))
                pieces += pieces_of(box, _with(whole.start, {self.dim: local_start}))
            local_start += max(extent, 0)
        return tuple(pieces)

    def _part_shares(self, extent: int, degree: int) -> list[list[tuple[int, int]]]:
        """Return for each rank its (logical start, extent) run in each part."""
        unit, rest = divmod(extent, sum(self.parts))
        if rest:
            raise ValueError(f"parts {self.parts} don't divide an extent of {extent}")
        sizes = [unit * part for part in self.parts]
        heads = self.heads or (None,) * len(sizes)
        starts = accumulate(sizes, initial=0)
        by_part = [
            [(start + run, width) for run, width in _runs(size, count, degree)]
            for start, size, count in zip(starts, sizes, heads, strict=False)
        ]
        return [[runs[rank] for runs in by_part] for rank in range(degree)]

    def _without_copies(self, total: int, degree: int) -> int:
        """The logical extent, if all ranks together hold ``total``."""
        if self.heads is None:
            return total
        held = sum(
            part * Fraction(max(degree, count), count) for part, count in zip(self.parts, self.heads, strict=True)
        )
        extent = Fraction(total * sum(self.parts)) / held
        if extent.denominator != 1:
            wanted = f"parts {self.parts} with heads {self.heads}"
            raise ValueError(f"{total} along dimension {self.dim} over {degree} ranks fit no {wanted}")
        return int(extent)


@dataclass(frozen=True, slots=True)
class ShardGrid:
    """Split along several dimensions at once (the paper's *Shard-Hy*) over a grid of ranks, whose last axis runs fastest.

    Attributes:
        dims: the dimensions that are split, one for each axis of the grid.
        grids: number of ranks along each axis; one entry for each number of ranks that may occur, except 1.
    """

    dims: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...]
    pattern: Literal["shard_grid"] = "shard_grid"

    def __post_init__(self) -> None:
        if len(self.dims) < 2 or len(set(self.dims)) < len(self.dims) or min(self.dims) < 0:
            raise ValueError(f"dims must be two or more different dimensions: {self.dims}")
        if any(len(grid) != len(self.dims) or min(grid) < 1 for grid in self.grids):
            raise ValueError(f"each of grids must have {len(self.dims)} positive numbers: {self.grids}")
        if len({prod(grid) for grid in self.grids}) < len(self.grids):
            raise ValueError(f"two of grids {self.grids} are for the same number of ranks")

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The local shapes joined along each axis."""
        joined = map(sum, self._extents(local_shapes))
        return _with(local_shapes[0], dict(zip(self.dims, joined, strict=True)))

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The share of each of ``degree`` ranks: an even cut along each axis."""
        _check_dim(max(self.dims), logical_shape)
        shares = [
            split_evenly(logical_shape[dim], count) for dim, count in zip(self.dims, self._grid(degree), strict=True)
        ]
        return tuple(self._at(place, logical_shape, shares) for place in self._places(degree))

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """A piece per rank."""
        if self.logical_shape(local_shapes) != logical_shape:
            raise ValueError(f"local shapes {list(local_shapes)} don't join to the logical shape {logical_shape}")
        starts = [list(accumulate(along, initial=0)) for along in self._extents(local_shapes)]
        origin = (0,) * len(logical_shape)
        locals_ = []
        for place, shape in zip(self._places(len(local_shapes)), local_shapes, strict=True):
            box = Box.whole(shape).moved(origin, self._at(place, origin, starts))
            locals_.append(LocalTensor(shape, pieces_of(box, origin)))
        return Layout(logical_shape, tuple(locals_))

    def _extents(self, local_shapes: Sequence[Shape]) -> list[list[int]]:
        """Return for each axis the extents along it. They must be the same at each position on the other axes."""
        for shape in local_shapes:
            _check_dim(max(self.dims), shape)
        held = list(zip(self._places(len(local_shapes)), local_shapes, strict=True))
        found = [
            list({place[axis]: shape[dim] for place, shape in held}.values()) for axis, dim in enumerate(self.dims)
        ]
        if any(shape != self._at(place, local_shapes[0], found) for place, shape in held):
            raise ValueError(f"local shapes {list(local_shapes)} form no grid of {self._grid(len(local_shapes))}")
        return found

    def _places(self, degree: int) -> Iterator[tuple[int, ...]]:
        """Yield each rank's place in the grid."""
        return product(*map(range, self._grid(degree)))

    def _at(self, place: Sequence[int], shape: Shape, along: Sequence[Sequence[int]]) -> Shape:
        """Return a shape with the numbers along each axis that belong to a place in the grid."""
        return _with(shape, {dim: axis[position] for dim, axis, position in zip(self.dims, along, place, strict=True)})

    def _grid(self, degree: int) -> tuple[int, ...]:
        if degree == 1:
            return (1,) * len(self.dims)
        found = next((grid for grid in self.grids if prod(grid) == degree), None)
        if found is None:
            raise ValueError(f"no grid for {degree} ranks; there are {[list(grid) for grid in self.grids]}")
        return found


@dataclass(frozen=True, slots=True)
class PerRank:
    """Each rank has a tensor of its own; how the tensors make up the parameter is unknown.

    Usable if source and target have the same number of ranks. Logically the tensors lie along a new first dimension:
    ``(degree, *local shape)``.
    """

    pattern: Literal["per_rank"] = "per_rank"

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The number of ranks, followed by the shape that all of them share."""
        return (len(local_shapes), *_common_shape(local_shapes, "per-rank"))

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """Each rank's shape: the logical one without its first dimension, which is the number of ranks."""
        if logical_shape[0] != degree:
            raise ValueError(f"no layout is known, and {logical_shape[0]} shares can't become {degree}")
        return (logical_shape[1:],) * degree

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """Give each rank its own tensor."""
        if self.logical_shape(local_shapes) != logical_shape:
            raise ValueError(f"local shapes {list(local_shapes)} don't fit the logical shape {logical_shape}")
        local = (1, *logical_shape[1:])
        start = (0,) * len(local)
        shares = (Box.whole(local).moved(start, (rank, *start[1:])) for rank in range(len(local_shapes)))
        return Layout(logical_shape, tuple(LocalTensor(local, pieces_of(share, start)) for share in shares))


Pattern: TypeAlias = Unique | Replicate | Partial | Shard | ShardGrid
"""The patterns that spec files, manifests and universal checkpoints can name."""

AnyPattern: TypeAlias = Pattern | PerRank


def split_evenly(extent: int, degree: int) -> tuple[int, ...]:
    """Shares of ``degree`` ranks; the first ``extent % degree`` hold one more (as ``torch.tensor_split`` does)."""
    share, rest = divmod(extent, degree)
    return tuple(share + (rank < rest) for rank in range(degree))


def _runs(size: int, heads: int | None, degree: int) -> list[tuple[int, int]]:
    """Return for each rank its (start, extent) run in a part. If there are heads, they divide the part into equal units."""
    unit, count = (1, size) if heads is None else (size // heads, heads)
    if unit * count != size:
        raise ValueError(f"{count} heads don't divide an extent of {size}")
    if heads is None or heads >= degree:
        shares = split_evenly(count, degree)
        starts = accumulate(shares, initial=0)
        return [(start * unit, share * unit) for start, share in zip(starts, shares, strict=False)]
    if degree % heads:
        raise ValueError(f"{heads} heads can't be shared by {degree} ranks: their numbers don't divide")
    return [(rank * heads // degree * unit, unit) for rank in range(degree)]


def _common_shape(local_shapes: Sequence[Shape], kind: str) -> Shape:
    if len(set(local_shapes)) != 1:
        raise ValueError(f"{kind} parameter has different shapes on its ranks: {list(local_shapes)}")
    return local_shapes[0]


def _check_dim(dim: int, shape: Shape) -> None:
    if dim >= len(shape):
        raise ValueError(f"dimension {dim} doesn't exist in shape {shape}")


def _with(shape: Shape, extents: Mapping[int, int]) -> Shape:
    """Return a shape with other extents along some dimensions."""
    return tuple(extents.get(dim, extent) for dim, extent in enumerate(shape))
