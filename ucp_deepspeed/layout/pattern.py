"""Parameter patterns: the names that the language gives to layouts.

Each pattern answers three questions, in terms of the local shapes of the ``degree`` model-parallel ranks:

* `logical_shape`: what is the whole parameter's shape? (the paper's *Union* and *StripPad*)
* `local_shapes`: what would each rank of a target hold? (the paper's *GenUcpMetadata*)
* `layout`: which box lies where?

All raise `ValueError` when the shapes contradict the pattern; the caller knows the parameter's name and adds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import Layout, LocalTensor, Piece, Union, pieces_of


@dataclass(frozen=True, slots=True)
class Scale:
    """Modifier: each rank stores ``logical * factor ** power``, with one power for each state that it applies to.

    Attributes:
        factor: ``one_over_degree`` is what DeepSpeed's automatic tensor parallelism does to a row-parallel bias.
        powers: state name → exponent. A state that isn't named can't be moved between different degrees: it is refused.
    """

    factor: Literal["one_over_degree"] = "one_over_degree"
    powers: Mapping[str, int] = field(default_factory=lambda: {"fp32": 1, "weight": 1}, hash=False)

    def of(self, degree: int) -> Fraction:
        """``local / logical`` at power 1."""
        return Fraction(1, degree)


@dataclass(frozen=True, slots=True)
class Unique:
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

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """The whole parameter on the only rank."""
        if len(local_shapes) != 1:
            raise ValueError(f"unique parameter is held by {len(local_shapes)} ranks")
        return _same_on_each_rank(logical_shape, local_shapes, "take", None)


@dataclass(frozen=True, slots=True)
class Replicate:
    """The same values on every rank: any rank's copy serves (norms, row-parallel biases)."""

    pattern: Literal["replicate"] = "replicate"
    scale: Scale | None = None

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The shape that all ranks share."""
        return _common_shape(local_shapes, "replicated")

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The logical shape, on every rank."""
        return (logical_shape,) * degree

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """The whole parameter on every rank."""
        return _same_on_each_rank(logical_shape, local_shapes, "take", self.scale)


@dataclass(frozen=True, slots=True)
class Partial:
    """Updated on its own by every rank: the logical value is the mean (ALiBi models' embedding norms)."""

    pattern: Literal["partial"] = "partial"

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The shape that all ranks share."""
        return _common_shape(local_shapes, "partial")

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The logical shape, on every rank."""
        return (logical_shape,) * degree

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """The whole parameter on every rank, averaged when read."""
        return _same_on_each_rank(logical_shape, local_shapes, "mean", None)


@dataclass(frozen=True, slots=True)
class Shard:
    """Split along one dimension over the ranks; as several parts side by side when the tensor is fused.

    Attributes:
        dim: the dimension that is split.
        parts: relative sizes of the fused parts along ``dim``, in logical order. Each part is split over the ranks on its
            own, and a rank's local tensor is its shares of the parts, side by side (the paper's *Shard-NC*). ``(1,)`` is a
            plain shard; ``(1, 1)`` a fused gate/up pair.
        widths: share of each rank along ``dim``, in elements; by default an even split in which the first ranks hold one more
            where the degree doesn't divide. With several parts, shares are always the default ones.
        vocabulary: the logical end of ``dim`` is the vocabulary size; what lies behind it in the local tensors is padding.
        pad_to_multiple: with ``vocabulary``, a target without a live model pads the vocabulary to a multiple of this times
            the degree.
    """

    dim: int = 0
    pattern: Literal["shard"] = "shard"
    parts: tuple[int, ...] = (1,)
    widths: tuple[int, ...] | None = None
    vocabulary: bool = False
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"dim must not be negative: {self.dim}")
        if not self.parts or any(part < 1 for part in self.parts):
            raise ValueError(f"parts must be positive: {self.parts}")
        if self.pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple must be positive: {self.pad_to_multiple}")
        if self.widths is not None and any(width < 0 for width in self.widths):
            raise ValueError(f"widths must not be negative: {self.widths}")
        if self.widths is not None and self.vocabulary:
            raise ValueError("widths don't apply to a vocabulary, whose ranks hold equal shares")
        if len(self.parts) > 1 and (self.widths is not None or self.vocabulary):
            raise ValueError("widths and vocabulary don't apply to a shard with parts")

    def logical_shape(self, local_shapes: Sequence[Shape], vocabulary_size: int | None = None) -> Shape:
        """The local shapes joined along ``dim``, without vocabulary padding."""
        first = local_shapes[0]
        self._check_dim(first)
        for shape in local_shapes:
            if len(shape) != len(first) or _without(shape, self.dim) != _without(first, self.dim):
                raise ValueError(f"local shapes {list(local_shapes)} differ outside dimension {self.dim}")
        total = sum(shape[self.dim] for shape in local_shapes)
        if self.vocabulary and vocabulary_size is not None:
            if vocabulary_size > total:
                raise ValueError(f"vocabulary size {vocabulary_size} is above the {total} rows that the ranks hold")
            total = vocabulary_size
        return _with(first, self.dim, total)

    def local_shapes(self, logical_shape: Shape, degree: int) -> tuple[Shape, ...]:
        """The share of each of ``degree`` ranks."""
        self._check_dim(logical_shape)
        extent = logical_shape[self.dim]
        if self.widths is not None:
            if len(self.widths) != degree or sum(self.widths) != extent:
                raise ValueError(f"widths {self.widths} don't split {extent} over {degree} ranks")
            return tuple(_with(logical_shape, self.dim, width) for width in self.widths)
        if self.vocabulary:
            unit = self.pad_to_multiple * degree
            return (_with(logical_shape, self.dim, -(-extent // unit) * unit // degree),) * degree
        shares = [split_evenly(size, degree) for size in self._part_sizes(extent)]
        return tuple(_with(logical_shape, self.dim, sum(share[rank] for share in shares)) for rank in range(degree))

    def layout(self, logical_shape: Shape, local_shapes: Sequence[Shape]) -> Layout:
        """One piece per part and rank."""
        joined = self.logical_shape(local_shapes)
        if len(joined) != len(logical_shape) or _without(joined, self.dim) != _without(logical_shape, self.dim):
            raise ValueError(f"local shapes {list(local_shapes)} don't fit the logical shape {logical_shape}")
        if self.widths is not None and tuple(shape[self.dim] for shape in local_shapes) != self.widths:
            raise ValueError(f"local shapes {list(local_shapes)} don't have the widths {self.widths}")
        extent = logical_shape[self.dim]
        extents = [shape[self.dim] for shape in local_shapes]
        if len(self.parts) == 1:
            starts = list(accumulate(extents, initial=0))
            if starts[-1] < extent or (starts[-1] > extent and not self.vocabulary):
                raise ValueError(f"local extents {extents} don't join to {extent} along dimension {self.dim}")
            shares = [[(start, min(stop, extent) - start)] for start, stop in pairwise(starts)]
        else:
            shares = self._part_shares(extent, len(local_shapes))
            held = [sum(numel for _, numel in share) for share in shares]
            if held != extents:
                raise ValueError(f"local extents {extents} don't match parts {self.parts} of {extent}: expected {held}")
        locals_ = tuple(
            LocalTensor(shape, self._pieces(logical_shape, share))
            for shape, share in zip(local_shapes, shares, strict=True)
        )
        return Layout(logical_shape, locals_)

    def _pieces(self, logical_shape: Shape, share: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
        """Pieces of one rank: (logical start, extent) runs along ``dim``, side by side from 0."""
        pieces: list[Piece] = []
        local_start = 0
        whole = Box.whole(logical_shape)
        for start, extent in share:
            if extent > 0:
                box = Box(_with(whole.start, self.dim, start), _with(whole.stop, self.dim, start + extent))
                pieces += pieces_of(box, _with(whole.start, self.dim, local_start))
            local_start += max(extent, 0)
        return tuple(pieces)

    def _part_sizes(self, extent: int) -> list[int]:
        whole = sum(self.parts)
        if extent % whole:
            raise ValueError(f"parts {self.parts} don't divide an extent of {extent}")
        return [extent // whole * part for part in self.parts]

    def _part_shares(self, extent: int, degree: int) -> list[list[tuple[int, int]]]:
        """For each rank its (logical start, extent) run in each part."""
        shares: list[list[tuple[int, int]]] = [[] for _ in range(degree)]
        part_start = 0
        for size in self._part_sizes(extent):
            start = part_start
            for rank, width in enumerate(split_evenly(size, degree)):
                shares[rank].append((start, width))
                start += width
            part_start += size
        return shares

    def _check_dim(self, shape: Shape) -> None:
        if self.dim >= len(shape):
            raise ValueError(f"dimension {self.dim} doesn't exist in shape {shape}")


Pattern: TypeAlias = Unique | Replicate | Partial | Shard


def split_evenly(extent: int, degree: int) -> tuple[int, ...]:
    """Shares of ``degree`` ranks; the first ``extent % degree`` hold one more (as ``torch.tensor_split`` does)."""
    share, rest = divmod(extent, degree)
    return tuple(share + (rank < rest) for rank in range(degree))


def _same_on_each_rank(
    logical_shape: Shape, local_shapes: Sequence[Shape], union: Union, scale: Scale | None
) -> Layout:
    if any(shape != logical_shape for shape in local_shapes):
        raise ValueError(f"local shapes {list(local_shapes)} differ from the logical shape {logical_shape}")
    local = LocalTensor(logical_shape, pieces_of(Box.whole(logical_shape), (0,) * len(logical_shape)))
    locals_ = (local,) * len(local_shapes)
    if scale is None:
        return Layout(logical_shape, locals_, union)
    return Layout(logical_shape, locals_, union, scale.of(len(local_shapes)), scale.powers)


def _common_shape(local_shapes: Sequence[Shape], kind: str) -> Shape:
    if len(set(local_shapes)) != 1:
        raise ValueError(f"{kind} parameter has different shapes on its ranks: {list(local_shapes)}")
    return local_shapes[0]


def _without(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]


def _with(shape: Shape, dim: int, extent: int) -> Shape:
    return (*shape[:dim], extent, *shape[dim + 1 :])
