"""Layouts: the positions of boxes of the logical tensor in the local tensors of model-parallel ranks.

A `Layout` is the one description of a parameter's sharding; reading (local → logical) and filling (logical → local) both
follow from it. The paper's *Union* is the reading direction, its *GenUcpMetadata* the filling one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from ucp_deepspeed.layout.box import Box, Shape

Union = Literal["take", "mean"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of ``logical_box`` lie, in the same order, in ``local_box`` of one rank's local tensor.

    Raises:
        ValueError: the boxes differ in shape.
    """

    logical_box: Box
    local_box: Box

    def __post_init__(self) -> None:
        if self.logical_box.shape != self.local_box.shape:
            raise ValueError(f"logical box {self.logical_box} and local box {self.local_box} differ in shape")


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """The local tensor of one model-parallel rank: its shape and the pieces in it. Elements outside all pieces are padding.

    A rank of a pipeline stage without the parameter holds `NOTHING`.

    Raises:
        ValueError: a piece leaves the tensor, or two pieces share local elements.
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        whole = Box.whole(self.shape)
        for piece in self.pieces:
            if not whole.contains(piece.local_box):
                raise ValueError(f"piece {piece.local_box} leaves the local tensor of shape {self.shape}")
        if overlap := overlapping(piece.local_box for piece in self.pieces):
            raise ValueError(f"pieces overlap in the local tensor: {overlap[0]} and {overlap[1]}")


@dataclass(frozen=True, slots=True)
class Layout:
    """A parameter over all model-parallel ranks.

    Attributes:
        logical_shape: shape of the whole, unpadded parameter.
        locals: one local tensor per model-parallel rank.
        union: ``take``: ranks that hold the same logical box hold the same values, so that any one serves; ``mean``: the values
            differ and the logical value is their mean (the paper's *params_to_average*).
        scale: ``local = logical * scale`` for the states named in ``scale_powers``, raised to the power given there.

    Raises:
        ValueError: the pieces of all ranks don't cover each logical element, or two logical boxes overlap without being equal.
    """

    logical_shape: Shape
    locals: tuple[LocalTensor, ...]
    union: Union = "take"
    scale: Fraction = Fraction(1)
    scale_powers: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        boxes = self.holders()
        if overlap := overlapping(boxes):
            raise ValueError(f"logical boxes overlap without being equal: {overlap[0]} and {overlap[1]}")
        whole = Box.whole(self.logical_shape)
        outside = [box for box in boxes if not whole.contains(box)]
        covered = sum(box.numel for box in boxes)
        if outside or covered != whole.numel:
            raise ValueError(
                f"pieces cover {covered} of the {whole.numel} elements of logical shape {self.logical_shape}"
                + (f"; outside: {outside[0]}" if outside else "")
            )

    @classmethod
    def whole(cls, shape: Shape) -> Layout:
        """A parameter that one rank holds entirely."""
        return cls(shape, (LocalTensor(shape, pieces_of(Box.whole(shape), (0,) * len(shape))),))

    @classmethod
    def around(cls, shape: Shape, box: Box) -> Layout:
        """Make a layout: rank 0 holds a box and nothing else; each further rank holds one of the boxes around it."""
        boxes = [box]
        for dim, extent in enumerate(shape):
            for low, high in ((0, box.start[dim]), (box.stop[dim], extent)):
                start, stop = (*box.start[:dim], low), (*box.stop[:dim], high)
                boxes.append(Box((*start, *(0,) * len(shape[dim + 1 :])), (*stop, *shape[dim + 1 :])))
        held = [(part.shape, pieces_of(part, (0,) * len(shape))) for part in boxes]
        return cls(shape, tuple(LocalTensor(*part) for part in held))

    @property
    def degree(self) -> int:
        """Number of model-parallel ranks."""
        return len(self.locals)

    def holders(self) -> dict[Box, list[tuple[int, Piece]]]:
        """Map each distinct logical box to the ranks that hold it, with their pieces, in rank order."""
        found: dict[Box, list[tuple[int, Piece]]] = {}
        for rank, local in enumerate(self.locals):
            for piece in local.pieces:
                found.setdefault(piece.logical_box, []).append((rank, piece))
        return found

    def mergeable_dims(self) -> frozenset[int]:
        """Return the dimensions ``d`` that can be merged with ``d + 1`` into one, on every rank, keeping row-major order.

        They can be merged if no piece cuts dimension ``d + 1``. Merging turns the common case, unsharded or sharded along
        dimension 0, into one-dimensional intervals, so that a plan holds one copy per contiguous run.
        """
        dims = len(self.logical_shape)
        return frozenset(
            dim
            for dim in range(dims - 1)
            if all(
                local.shape[dim + 1] == self.logical_shape[dim + 1]
                and all(piece.local_box.shape[dim + 1] == self.logical_shape[dim + 1] for piece in local.pieces)
                for local in self.locals
                if local != NOTHING
            )
        )

    def merged(self, dims: frozenset[int]) -> Layout:
        """Return the same layout with each dimension in ``dims`` merged with its successor.

        Raises:
            ValueError: a dimension isn't in `mergeable_dims`.
        """
        if not dims:
            return self
        if not dims <= self.mergeable_dims():
            raise ValueError(f"dimensions {sorted(dims - self.mergeable_dims())} of {self.logical_shape} are cut")
        whole, held = self.logical_shape, []
        for local in self.locals:
            pieces = (
                Piece(_merge_box(piece.logical_box, whole, dims), _merge_box(piece.local_box, local.shape, dims))
                for piece in local.pieces
            )
            held.append(LocalTensor(_merged(local.shape, local.shape, dims), tuple(pieces)))
        return replace(self, logical_shape=_merged(whole, whole, dims), locals=tuple(held))

    def cropped(self, logical_shape: Shape) -> Layout:
        """Return the same ranks and local tensors, with pieces cut to the first ``logical_shape`` elements along each dimension.

        Raises:
            ValueError: the shape reaches beyond this layout's.
        """
        whole = Box.whole(logical_shape)
        if len(logical_shape) != len(self.logical_shape) or not Box.whole(self.logical_shape).contains(whole):
            raise ValueError(f"{logical_shape} reaches beyond {self.logical_shape}")
        held = []
        for local in self.locals:
            boxes = [(piece, piece.logical_box.intersect(whole)) for piece in local.pieces]
            kept = (
                Piece(box, box.moved(p.logical_box.start, p.local_box.start)) for p, box in boxes if box is not None
            )
            held.append(LocalTensor(local.shape, tuple(kept)))
        return replace(self, logical_shape=logical_shape, locals=tuple(held))

    def factor(self, state: str) -> Fraction | None:
        """``local / logical`` for one state; None if this layout doesn't say how that state scales."""
        if self.scale == 1:
            return Fraction(1)
        power = self.scale_powers.get(state)
        return None if power is None else self.scale**power


def across_stages(stages: Sequence[Layout | None]) -> Layout:
    """Join the layouts of pipeline stages into one over all model-parallel ranks; stages follow one another.

    Args:
        stages: for each stage the layout over its tensor-parallel ranks; None if the stage doesn't hold the parameter.

    Raises:
        ValueError: no stage holds the parameter, or two hold it in different ways.
    """
    held = [stage for stage in stages if stage is not None]
    if not held:
        raise ValueError("no pipeline stage holds it")
    first = held[0]
    if len(stages) == 1:
        return first
    for other in held[1:]:
        if (other.logical_shape, other.degree) != (first.logical_shape, first.degree):
            raise ValueError(
                f"pipeline stages hold it in shapes {first.logical_shape} and {other.logical_shape}, over {first.degree} and "
                f"{other.degree} tensor-parallel ranks"
            )
    nothing = (NOTHING,) * first.degree
    locals_ = tuple(local for stage in stages for local in (stage.locals if stage is not None else nothing))
    return replace(first, locals=locals_)


def pieces_of(logical_box: Box, local_start: Shape) -> tuple[Piece, ...]:
    """The piece that puts ``logical_box`` at ``local_start``; none if the box is empty."""
    if logical_box.numel == 0:
        return ()
    return (Piece(logical_box, logical_box.moved(logical_box.start, local_start)),)


def overlapping(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Return two boxes with a common element, or None. Sweeps along the first dimension."""
    ordered = sorted((box for box in boxes if box.numel), key=lambda box: box.start)
    active: list[Box] = []
    for box in ordered:
        if not box.start:
            if active:
                return active[0], box
        else:
            active = [other for other in active if other.stop[0] > box.start[0]]
            for other in active:
                if other.intersect(box) is not None:
                    return other, box
        active.append(box)
    return None


def _merge_box(box: Box, shape: Shape, dims: frozenset[int]) -> Box:
    """Return the box after merging. It must be full in every merged-in dimension of a tensor of ``shape``."""
    found = Box(_merged(box.start, shape, dims), _merged(box.stop, shape, dims))
    assert found.numel == box.numel
    return found


def _merged(bounds: Shape, shape: Shape, dims: frozenset[int]) -> Shape:
    """Return bounds along each dimension after merging: a dimension is as many rows of its successor's extent."""
    merged: list[int] = []
    for dim, bound in enumerate(bounds):
        if dim - 1 in dims:
            merged[-1] *= shape[dim]
        else:
            merged.append(bound)
    return tuple(merged)


NOTHING = LocalTensor((), ())
"""The local tensor of a rank in a pipeline stage without the parameter."""
