"""Boxes: the arithmetic that everything else is built on.

A box is a half-open, axis-aligned range of indices of a row-major tensor. Three coordinate spaces use it: *logical* (the
whole, unpadded parameter), *local* (what one model-parallel rank holds of it) and, with one dimension, *flat* (positions in
row-major order). A name always says which space it lives in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """Indices ``start[d] <= x[d] < stop[d]`` of every dimension ``d``; a 0-d box holds the one element of a scalar.

    Raises:
        ValueError: ``start`` and ``stop`` differ in length, or a dimension runs backwards or below zero.
    """

    start: Shape
    stop: Shape

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"box start {self.start} and stop {self.stop} have different numbers of dimensions")
        if any(low < 0 or low > high for low, high in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"box {self.start}..{self.stop} runs backwards or below zero")

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box of all indices of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def shape(self) -> Shape:
        """Extent along each dimension, in elements."""
        return tuple(high - low for low, high in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The indices in both boxes, or None if there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(low >= high for low, high in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def contains(self, other: Box) -> bool:
        """Return whether every index of ``other`` is in this box (true for any empty box within the bounds)."""
        return all(
            mine_low <= low and high <= mine_high
            for mine_low, mine_high, low, high in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def moved(self, origin: Shape, new_origin: Shape) -> Box:
        """Return this box in another coordinate space, where the point ``origin`` is called ``new_origin``."""
        shift = tuple(new - old for old, new in zip(origin, new_origin, strict=True))
        return Box(
            tuple(low + by for low, by in zip(self.start, shift, strict=True)),
            tuple(high + by for high, by in zip(self.stop, shift, strict=True)),
        )

    def flat_range(self, shape: Shape) -> tuple[int, int]:
        """First flat index and one past the last flat index of this non-empty box in a row-major tensor of ``shape``."""
        strides = row_major_strides(shape)
        first = sum(low * stride for low, stride in zip(self.start, strides, strict=True))
        last = sum((high - 1) * stride for high, stride in zip(self.stop, strides, strict=True))
        return first, last + 1


def row_major_strides(shape: Shape) -> Shape:
    """Strides, in elements, of a contiguous row-major tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def flat_interval_boxes(shape: Shape, flat_start: int, flat_stop: int) -> tuple[Box, ...]:
    """Split the flat interval ``flat_start <= i < flat_stop`` of a row-major tensor into disjoint boxes, in flat order.

    Returns at most ``2 * len(shape) - 1`` boxes: a ragged head and a ragged tail per dimension around one full middle.

    Raises:
        ValueError: the interval leaves the tensor.
    """
    numel = prod(shape)
    if not 0 <= flat_start <= flat_stop <= numel:
        raise ValueError(f"flat interval {flat_start}..{flat_stop} leaves a tensor of shape {shape} ({numel} elements)")
    if flat_start == flat_stop:
        return ()
    if flat_start == 0 and flat_stop == numel:
        return (Box.whole(shape),)
    return tuple(Box(start, stop) for start, stop in _interval_bounds(shape, flat_start, flat_stop))


def _interval_bounds(shape: Shape, flat_start: int, flat_stop: int) -> list[tuple[Shape, Shape]]:
    """Bounds of the boxes of a non-empty interval that isn't the whole tensor; splits along the first dimension."""
    inner = shape[1:]
    row = prod(inner)
    first_row, head = divmod(flat_start, row)
    last_row, tail = divmod(flat_stop, row)
    bounds: list[tuple[Shape, Shape]] = []
    if first_row == last_row:
        return [((first_row, *low), (first_row + 1, *high)) for low, high in _interval_bounds(inner, head, tail)]
    if head:
        bounds += [((first_row, *low), (first_row + 1, *high)) for low, high in _interval_bounds(inner, head, row)]
        first_row += 1
    if first_row < last_row:
        bounds.append(((first_row, *(0,) * len(inner)), (last_row, *inner)))
    if tail:
        bounds += [((last_row, *low), (last_row + 1, *high)) for low, high in _interval_bounds(inner, 0, tail)]
    return bounds
