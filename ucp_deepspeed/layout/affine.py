"""Patterns from DeepSpeed's affine maps. A map tells how automatic tensor parallelism (AutoTP) has cut a parameter.

A map lists for each rank the blocks that it holds, as offsets and strides in the whole parameter and in the rank's tensor
(DeepSpeed 0.19.8, ``checkpoint/affine.py``). A map is for one number of ranks; the pattern found here serves all. Patterns are
tried one by one; a pattern is accepted only if its layout has exactly the map's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from ucp_deepspeed.layout.box import Box, Shape, row_major_strides
from ucp_deepspeed.layout.layout import Piece
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Scale, Shard

MAP_VERSION = 1
"""The only version of affine maps so far."""


def pattern_of_map(entry: Mapping[str, Any]) -> Pattern:
    """Return the pattern of one parameter's map over two or more ranks.

    Raises:
        ValueError: the map has blocks that no pattern has, or it isn't a map.
    """
    try:
        logical_shape: Shape = tuple(entry["logical_shape"])
        ranks = [entry["ranks"][rank] for rank in sorted(entry["ranks"], key=int)]
        shapes: list[Shape] = [tuple(rank["shard_shape"]) for rank in ranks]
        held = [
            [
                Piece(
                    _box(found["source"], tuple(found["shape"]), logical_shape),
                    _box(found["dest"], tuple(found["shape"]), shape),
                )
                for found in rank["pieces"]
            ]
            for rank, shape in zip(ranks, shapes, strict=True)
        ]
        scales = {float(found.get("scale", 1.0)) for rank in ranks for found in rank["pieces"]}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its affine map can't be read ({type(error).__name__}: {error})") from error
    if len(ranks) < 2:
        raise ValueError("its affine map is of one rank, which tells nothing about a cut")
    pieces = [{piece for piece in found if piece.logical_box.numel} for found in held]
    for pattern in _candidates(logical_shape, shapes, pieces, scales):
        try:
            layout = pattern.layout(logical_shape, shapes)
        except ValueError:
            continue
        if [set(local.pieces) for local in layout.locals] == pieces:
            return pattern
    raise ValueError(f"its affine map over {len(ranks)} ranks, scaled by {sorted(scales)}, is that of no known pattern")


def _candidates(
    logical_shape: Shape, shapes: Sequence[Shape], pieces: Sequence[set[Piece]], scales: set[float]
) -> Iterator[Pattern]:
    if scales == {1 / len(shapes)}:
        yield Replicate(scale=Scale())
    if scales != {1.0}:
        return
    yield Replicate()
    ordered = [sorted(found, key=lambda piece: piece.local_box.start) for found in pieces]
    same_parts = len(set(map(len, ordered))) == 1
    for dim in range(len(logical_shape)):
        yield Shard(dim)
        widths = [[piece.local_box.shape[dim] for piece in part] for part in zip(*ordered, strict=same_parts)]
        if not same_parts or len(widths) < 2 or not all(map(all, widths)):
            continue
        sizes = [sum(found) for found in widths]
        parts = tuple(size // gcd(*sizes) for size in sizes)
        yield Shard(dim, parts=parts)
        heads = _heads(widths)
        if heads is not None:
            yield Shard(dim, parts=parts, heads=heads)


def _heads(widths: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """Return the number of units of each part that no cut goes through. If shares differ, they differ by one unit."""
    units = [max(found) - min(found) for found in widths]
    counts = {sum(found) // unit for found, unit in zip(widths, units, strict=True) if unit}
    if len(counts) != 1:
        return None
    return (counts.pop(),) * len(widths)


def _box(place: Sequence[Any], extents: Shape, shape: Shape) -> Box:
    """Return the block at ``[offset, strides]`` of a tensor, whose strides must be row-major."""
    offset, strides = place
    if 0 in extents:  # the offset may lie behind the end
        return Box((0,) * len(extents), (0,) * len(extents))
    if tuple(strides) != row_major_strides(shape) or len(extents) != len(shape):
        raise ValueError(f"its affine map has blocks with strides {list(strides)} in a tensor of shape {list(shape)}")
    start = []
    for stride in strides:
        index, offset = divmod(offset, stride)
        start.append(index)
    return Box.whole(extents).moved((0,) * len(extents), tuple(start))
