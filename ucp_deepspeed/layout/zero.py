"""ZeRO's flat buffers: local tensors of a group laid end to end, and the buffer cut over data-parallel ranks.

Padding lanes belong to no slice, so that nothing built on slices can read, copy or compare them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of consecutive elements of one local tensor in one rank's flat buffer. All in elements.

    Attributes:
        index: number of the tensor in the group.
        partition: rank of the partition group that holds it.
        local_start: flat position of the first element in the (row-major) local tensor.
        buffer_start: position of the first element in that rank's flat buffer.
        numel: length; never 0.
    """

    index: int
    partition: int
    local_start: int
    buffer_start: int
    numel: int


class Flattening(Protocol):
    """The positions of a group's local tensors in flat buffers: `FlatGroup`, `SlicedGroup` or `OverlappingGroup`."""

    @property
    def numels(self) -> tuple[int, ...]:
        """Elements of each local tensor, in buffer order."""
        ...

    @property
    def partitions(self) -> int:
        """Ranks that share the group."""
        ...

    def slices(self, index: int, local_start: int, local_stop: int) -> Iterator[Slice]:
        """Yield the slices that hold ``local_start <= i < local_stop`` of tensor ``index``, in local order; visits no others."""
        ...

    def held_by(self, partition: int) -> Iterator[Slice]:
        """The slices in one rank's buffer, in buffer order; together with the padding they fill it."""
        ...

    def buffer_numel(self, partition: int) -> int:
        """Length of one rank's flat buffer, padding included, in elements."""
        ...


@dataclass(frozen=True)
class FlatGroup:
    """Stages 0 to 2: the tensors lie one after the other in one flat buffer, which is cut into equal consecutive partitions.

    Formulas: DeepSpeed 0.19.8, ``runtime/``: ``zero/stage_1_and_2.py``, ``bf16_optimizer.py``, ``fp16/fused_optimizer.py``.

    Attributes:
        numels: elements of each local tensor, in flat order.
        partitions: ranks that share the group; 1 for stage 0.
        gaps: alignment zeros after each tensor (``parameter_alignment``); empty if all are 0, however they are given.
        alignment: the total is padded to a multiple of ``alignment * partitions``; 2 under ZeRO
            (``nccl_start_alignment_factor``), 1 for stage 0.

    Raises:
        ValueError: a negative number, no partition, or another number of gaps than of tensors.
    """

    numels: tuple[int, ...]
    partitions: int
    gaps: tuple[int, ...] = ()
    alignment: int = 2

    def __post_init__(self) -> None:
        _check_group(self.numels, self.partitions)
        if self.gaps and len(self.gaps) != len(self.numels):
            raise ValueError(f"{len(self.gaps)} alignment gaps for {len(self.numels)} tensors")
        if self.alignment < 1 or any(gap < 0 for gap in self.gaps):
            raise ValueError("alignment must be positive and gaps not negative")
        if not any(self.gaps):
            object.__setattr__(self, "gaps", ())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each tensor's first element in the whole flat buffer."""
        gaps = self.gaps or (0,) * len(self.numels)
        return tuple(accumulate((n + gap for n, gap in zip(self.numels, gaps, strict=True)), initial=0))[:-1]

    @cached_property
    def unpadded(self) -> int:
        """Elements up to the end padding, gaps included."""
        return sum(self.numels) + sum(self.gaps)

    @cached_property
    def partition_numel(self) -> int:
        """Length of each rank's partition, end padding included."""
        unit = self.alignment * self.partitions
        return -(-self.unpadded // unit) * unit // self.partitions

    def buffer_numel(self, partition: int) -> int:
        """See `Flattening.buffer_numel`."""
        return self.partition_numel

    def unpadded_numel(self, partition: int) -> int:
        """Elements of one partition before the end padding. ZeRO-1/2 saves only these of the fp32 partition."""
        return min(max(self.unpadded - partition * self.partition_numel, 0), self.partition_numel)

    def slices(self, index: int, local_start: int, local_stop: int) -> Iterator[Slice]:
        """See `Flattening.slices`."""
        position = local_start
        while position < local_stop:
            partition, buffer_start = divmod(self.offsets[index] + position, self.partition_numel)
            numel = min(local_stop - position, self.partition_numel - buffer_start)
            yield Slice(index, partition, position, buffer_start, numel)
            position += numel

    def held_by(self, partition: int) -> Iterator[Slice]:
        """See `Flattening.held_by`."""
        low, high = partition * self.partition_numel, (partition + 1) * self.partition_numel
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            start, stop = max(low, offset), min(high, offset + numel)
            if start < stop:
                yield Slice(index, partition, start - offset, start - low, stop - start)


@dataclass(frozen=True)
class SlicedGroup:
    """Stage 3: every tensor is padded and cut on its own; a sub-group's buffer is one slice of each.

    Formulas: DeepSpeed 0.19.8, ``runtime/zero/partition_parameters.py`` and ``stage3.py``.

    Attributes:
        numels: elements of each tensor of the sub-group, in buffer order.
        partitions: ranks that share the parameters.

    Raises:
        ValueError: a negative number, or no partition.
    """

    numels: tuple[int, ...]
    partitions: int

    def __post_init__(self) -> None:
        _check_group(self.numels, self.partitions)

    @cached_property
    def slice_numels(self) -> tuple[int, ...]:
        """Length of each tensor's slice on every rank, padding included."""
        return tuple(-(-numel // self.partitions) for numel in self.numels)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each tensor's slice in a rank's buffer."""
        return tuple(accumulate(self.slice_numels, initial=0))[:-1]

    def buffer_numel(self, partition: int) -> int:
        """See `Flattening.buffer_numel`."""
        return sum(self.slice_numels)

    def slices(self, index: int, local_start: int, local_stop: int) -> Iterator[Slice]:
        """See `Flattening.slices`."""
        position = local_start
        while position < local_stop:
            partition, within = divmod(position, self.slice_numels[index])
            numel = min(local_stop - position, self.slice_numels[index] - within)
            yield Slice(index, partition, position, self.offsets[index] + within, numel)
            position += numel

    def held_by(self, partition: int) -> Iterator[Slice]:
        """See `Flattening.held_by`."""
        for index, (offset, length, numel) in enumerate(zip(self.offsets, self.slice_numels, self.numels, strict=True)):
            start, stop = partition * length, min((partition + 1) * length, numel)
            if start < stop:
                yield Slice(index, partition, start, offset, stop - start)


@dataclass(frozen=True)
class OverlappingGroup:
    """The tensors that overlap a partition of ``flat``, whole and end to end, without gaps or padding.

    DeepSpeed's Muon keeps its momentum in this way under ZeRO-1 and 2 without offload (``_muon_momentum_buffer``), because its
    update needs whole matrices. A tensor that is cut between two partitions is in both buffers.
    """

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
    def _before(self) -> list[int]:
        """Elements of all tensors before each one."""
        return list(accumulate(self.numels, initial=0))

    def slices(self, index: int, local_start: int, local_stop: int) -> Iterator[Slice]:
        """See `Flattening.slices`. If there are several copies, the one in the first partition is used."""
        if local_start < local_stop:
            flat, tensors = self.flat, range(len(self.numels))
            partition = flat.offsets[index] // flat.partition_numel
            low = partition * flat.partition_numel
            first = bisect_right(tensors, low, key=lambda tensor: flat.offsets[tensor] + self.numels[tensor])
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


def _check_group(numels: tuple[int, ...], partitions: int) -> None:
    if partitions < 1:
        raise ValueError(f"a group needs at least one partition, not {partitions}")
    if any(numel < 0 for numel in numels):
        raise ValueError(f"negative tensor size in {numels}")


@dataclass(frozen=True)
class SlotLayout:
    """Some parameters of one rank that lie in one buffer for each partition, and in one more for each optimizer state.

    Attributes:
        names: the parameters, in buffer order.
        flattening: where their elements lie in the buffers of the partitions.
        overlapping: states that are kept whole for every parameter of which a partition has a part; see `OverlappingGroup`.
        starts: place in each local tensor where the slot's part begins, in elements: at its first expert. Empty where it has all
            of each.
    """

    names: tuple[str, ...]
    flattening: Flattening
    overlapping: frozenset[str] = field(default=frozenset(), kw_only=True)
    starts: tuple[int, ...] = field(default=(), kw_only=True)

    def start(self, index: int) -> int:
        """Return where the slot's part of a parameter begins in its local tensor, in elements."""
        return self.starts[index] if self.starts else 0

    def flattening_of(self, state: str) -> Flattening:
        """Return where the elements of a state lie: as in the masters, except for the states in ``overlapping``."""
        if state in self.overlapping and isinstance(self.flattening, FlatGroup):
            return OverlappingGroup(self.flattening)
        return self.flattening
