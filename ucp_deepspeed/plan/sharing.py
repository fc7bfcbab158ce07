"""Which rank reads what, where several ranks need the same bytes (the paper's redundancy-bypassing load)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARED_READ_NUMBYTES = 64 << 20
"""Where replicas hold fewer bytes alike, each reads them all: that costs less than to exchange them."""

ALIGNMENT_NUMBYTES = 64
"""Buffers are cut at multiples of this, which are element boundaries of every dtype."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """A buffer that all of some ranks hold, each of which reads a part of it for all.

    Attributes:
        bounds: in elements: rank ``r`` reads from ``bounds[r]`` up to ``bounds[r + 1]``.
        rank: this rank's number among them.
    """

    bounds: tuple[int, ...]
    rank: int

    @property
    def mine(self) -> tuple[int, int]:
        """The first element that this rank reads, and that behind its last."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]


def share(buffers: Sequence[tuple[int, int]], ranks: int, rank: int) -> tuple[Sharing, ...]:
    """Cut buffers, laid end to end, into parts of equal numbers of bytes, one for each rank.

    Args:
        buffers: of each its elements, and the bytes of one.
        ranks: how many ranks hold them.
        rank: this rank's number.
    """
    total = sum(numel * itemsize for numel, itemsize in buffers)
    found: list[Sharing] = []
    begin = 0
    for numel, itemsize in buffers:
        cuts = [_cut(total * each // ranks - begin, numel * itemsize) // itemsize for each in range(1, ranks)]
        found.append(Sharing((0, *cuts, numel), rank))
        begin += numel * itemsize
    return tuple(found)


def _cut(place: int, numbytes: int) -> int:
    """A place inside a buffer, on a boundary of elements; its ends where the place is outside."""
    return numbytes if place >= numbytes else max(place, 0) // ALIGNMENT_NUMBYTES * ALIGNMENT_NUMBYTES
