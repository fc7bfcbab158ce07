"""Runs of elements that are consecutive in a local tensor and in a buffer. Sources hold such runs, and targets want them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

from ucp_deepspeed.plan.sharing import Interval

B = TypeVar("B", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Fragment(Generic[B]):
    """A run of consecutive (row-major) elements of one rank's local tensor, consecutive in a buffer too. In elements.

    Attributes:
        local_start: flat position of its first element in the local tensor.
        numel: length.
        buffer: name of the buffer: a range of a file, or a tensor of an engine.
        buffer_start: position of its first element in the buffer.
    """

    local_start: int
    numel: int
    buffer: B
    buffer_start: int

    def within(self, intervals: Sequence[Interval]) -> Iterator[Fragment[B]]:
        """Yield the parts of it that lie in some intervals of the buffer. The intervals are ordered and don't overlap."""
        end = self.buffer_start + self.numel
        for start, stop in intervals[bisect_right(intervals, self.buffer_start, key=itemgetter(1)) :]:
            if start >= end:
                break
            low, high = max(self.buffer_start, start), min(end, stop)
            yield Fragment(self.local_start + low - self.buffer_start, high - low, self.buffer, low)
