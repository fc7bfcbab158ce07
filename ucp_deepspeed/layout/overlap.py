"""Buffers in which each rank keeps whole tensors: every tensor of which its partition holds a part.

DeepSpeed's Muon keeps its momentum in this way under ZeRO-1 and 2 without offload (``runtime/zero/stage_1_and_2.py``,
``_muon_momentum_buffer``), because its update needs whole matrices. A tensor that is cut between two partitions is in both
buffers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ucp_deepspeed.layout.zero import FlatGroup, Slice


@dataclass(frozen=True)
class OverlappingGroup:
    """A `Flattening`: the tensors that overlap a partition of ``flat``, whole and end to end, without gaps or padding."""

    flat: FlatGroup

    @property
    def numels(self) -> tuple[int, ...]:
        """See `Flattening.numels`."""
        return self.flat.numels

    @property
    def partitions(self) -> int:
        """See `Flattening.partitions`."""
        return self.flat.partitions

    @cached_property
    def _stops(self) -> list[int]:
        """Position after each tensor's last element in the whole flat buffer."""
        return [offset + numel for offset, numel in zip(self.flat.offsets, self.numels, strict=True)]

    @cached_property
    def _before(self) -> list[int]:
        """Elements of all tensors before each one."""
        return list(accumulate(self.numels, initial=0))

    def slices(self, index: int, local_start: int, local_stop: int) -> Iterator[Slice]:
        """See `Flattening.slices`. If there are several copies, the one in the first partition is used."""
        if local_start < local_stop:
            partition = self.flat.offsets[index] // self.flat.partition_numel
            first = bisect_right(self._stops, partition * self.flat.partition_numel)
            start = self._before[index] - self._before[first] + local_start
            yield Slice(index, partition, local_start, start, local_stop - local_start)

    def held_by(self, partition: int) -> Iterator[Slice]:
        """See `Flattening.held_by`."""
        start = 0
        for part in self.flat.held_by(partition):
            numel = self.numels[part.index]
            yield Slice(part.index, partition, 0, start, numel)
            start += numel

    def buffer_numel(self, partition: int) -> int:
        """See `Flattening.buffer_numel`."""
        return sum(part.numel for part in self.held_by(partition))
