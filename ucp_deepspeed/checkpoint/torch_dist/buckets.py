"""Buffers of Megatron-Core's distributed optimizer as they are, in the form of sharding ``dp_reshardable``.

A buffer holds the masters or a state of one model-parallel rank's parameters, each from a multiple of 64 elements on
(``distributed/param_and_grad_buffer.py``). Nothing in the files says which parameter lies where, and their order is the model's
only for some ways of saving. But the weights are the masters, rounded. So a parameter is found by its content: what a buffer has
at a place must be, rounded, what exactly one of the weights has.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHTS_HINT, FileExtent
from ucp_deepspeed.checkpoint.dcp.entries import MISSING_HINT, Entries
from ucp_deepspeed.checkpoint.dcp.metadata import StoredTensor
from ucp_deepspeed.checkpoint.torch_dist.keys import SHARDING_HINT
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES, TORCH_DTYPES
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, naming
from ucp_deepspeed.layout import Box
from ucp_deepspeed.plan import Fragment

_BUCKET = re.compile(
    r"((?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_\d+\..*\.bucket_idx_\d+)\.(\w+)"
)

ALIGNMENT = 64
"""Elements to whose multiple the start of each parameter is padded."""

MOST_COMPARED = 4096
"""Elements of a parameter that are compared at most."""

_FIRST, _SECOND = re.compile(r"\.linear_fc1\.(?:weight|bias)$"), ".linear_fc2.weight"


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that a model-parallel rank has: a box of it or, of gate and up, two, end to end."""

    name: str
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(box.numel for box in self.boxes)


@dataclass(frozen=True, slots=True)
class Place:
    """The begin of a box in a buffer: the beginning of the keys of its tensors, and an element."""

    bucket: str
    start: int


@dataclass(frozen=True)
class Bucket:
    """The tensor of one state of a buffer."""

    key: str
    tensor: StoredTensor

    @cached_property
    def starts(self) -> list[int]:
        """First elements of the chunks, in order."""
        return sorted(box.start[0] for box in self.tensor.chunks)

    @cached_property
    def boxes(self) -> dict[int, Box]:
        """The chunks by their first elements."""
        return {box.start[0]: box for box in self.tensor.chunks}

    def runs(self, start: int, stop: int) -> Iterator[tuple[Box, int, int]]:
        """Yield the chunks that hold an interval: chunk, first element in it, and number of elements."""
        at = start
        while at < stop:
            place = bisect_right(self.starts, at) - 1
            box = self.boxes[self.starts[place]] if place >= 0 else None
            if box is None or at >= box.stop[0]:
                raise DamagedCheckpointError(f"no chunk of {self.key:.200} holds element {at}; {MISSING_HINT}")
            numel = min(stop, box.stop[0]) - at
            yield box, at - box.start[0], numel
            at += numel


class Buckets:
    """The buffers of a folder, and what lies where.

    Raises:
        MismatchError: not all of it can be told.
    """

    def __init__(self, entries: Entries, weights: Mapping[str, str]) -> None:
        """Find all parameters.

        Args:
            weights: key of each weight, by name.
        """
        self._entries, self._weights = entries, weights
        self._buckets: dict[str, dict[str, Bucket]] = {}
        for key, tensor in entries.metadata.tensors.items():
            if (match := _BUCKET.fullmatch(key)) is not None:
                state = MASTER if match[2] == "param" else match[2]
                self._buckets.setdefault(match[1], {})[state] = Bucket(key, tensor)
        held = [each.tensor.shape for states in self._buckets.values() for each in states.values()]
        if not held or any(len(shape) != 1 for shape in held):
            self._refuse("they aren't tensors of one dimension")
        self.places: dict[tuple[str, Box], Place] = {}
        self._find()
        self._check()

    def states(self, name: str) -> dict[str, str]:
        """Return the states of a parameter → their types, the master among them."""
        return self._states_in(self._bucket_of[name])

    @property
    def names(self) -> Set[str]:
        """Names of the parameters that are there."""
        return self._bucket_of.keys()

    @cached_property
    def _bucket_of(self) -> dict[str, str]:
        """A bucket of each parameter."""
        return {name: place.bucket for (name, _), place in self.places.items()}

    def _states_in(self, bucket: str) -> dict[str, str]:
        return {state: TORCH_DTYPES[each.tensor.dtype] for state, each in self._buckets[bucket].items()}

    def fragments(self, name: str, state: str, box: Box, start: int, stop: int) -> Iterator[Fragment[FileExtent]]:
        """Yield the file ranges of a flat interval of a box of a parameter."""
        place = self.places[name, box]
        bucket, at = self._buckets[place.bucket][state], start
        for chunk, first, numel in bucket.runs(place.start + start, place.start + stop):
            yield Fragment(at, numel, self._entries.extent(bucket.key, chunk), first)
            at += numel

    def _find(self) -> None:
        shards = list(self._shards())
        shortest = min((shard.numel for shard in shards), default=1)
        by_start: dict[bytes, list[Shard]] = {}
        for shard in shards:
            by_start.setdefault(_bits(self._weight(shard, min(shortest, ALIGNMENT))), []).append(shard)
        dtypes = {self._entries.metadata.tensors[self._weights[shard.name]].dtype for shard in shards}
        for title, bucket in self._buckets.items():
            master = bucket.get(MASTER)
            if master is None:
                self._refuse(f"{title} has no masters")
            at, end = 0, master.tensor.shape[0]
            while at < end:
                first = self._master(master, at, min(shortest, ALIGNMENT, end - at))
                near = [shard for dtype in dtypes for shard in by_start.get(_bits(first.to(dtype)), ())]
                found = [shard for shard in near if self._is_at(shard, master, at)]
                if len(found) != 1:
                    self._refuse(f"{len(found)} parameters may be what {title} has from element {at} on")
                for box in found[0].boxes:
                    self.places.setdefault((found[0].name, box), Place(title, at))
                    at += box.numel
                at = -(-at // ALIGNMENT) * ALIGNMENT

    def _is_at(self, shard: Shard, master: Bucket, at: int) -> bool:
        if at + shard.numel > master.tensor.shape[0]:
            return False
        weight = self._weight(shard, MOST_COMPARED)
        return torch.equal(self._master(master, at, len(weight)).to(weight.dtype), weight)

    def _shards(self) -> Iterator[Shard]:
        tensors = self._entries.metadata.tensors
        for name, key in self._weights.items():
            boxes = sorted(tensors[key].chunks, key=lambda box: box.start)
            second = tensors.get(self._weights.get(_FIRST.sub(_SECOND, name), ""))
            if _FIRST.search(name) and second is not None and len(boxes) == 2 * len(second.chunks):
                half = len(boxes) // 2
                yield from (Shard(name, pair) for pair in zip(boxes[:half], boxes[half:], strict=True))
            else:
                yield from (Shard(name, (box,)) for box in boxes)

    def _weight(self, shard: Shard, most: int) -> torch.Tensor:
        """Return the first elements of a weight."""
        parts, left = [], min(most, shard.numel)
        for box in shard.boxes:
            if left == 0:
                break
            extent = self._entries.extent(self._weights[shard.name], box)
            parts.append(_read(extent, 0, min(left, box.numel)))
            left -= len(parts[-1])
        return torch.cat(parts)

    def _master(self, bucket: Bucket, start: int, numel: int) -> torch.Tensor:
        runs = bucket.runs(start, start + numel)
        return torch.cat([_read(self._entries.extent(bucket.key, box), first, count) for box, first, count in runs])

    def _check(self) -> None:
        """Check that each parameter is there as a whole, with the same states everywhere, or not at all."""
        for name, key in self._weights.items():
            without = [box for box in self._entries.metadata.tensors[key].chunks if (name, box) not in self.places]
            if name in self.names and without:
                self._refuse(f"nothing has the part of {name} at {without[0].start}")
        for title, bucket in self._buckets.items():
            shapes = {each.tensor.shape for each in bucket.values()}
            unknown = [each.tensor.dtype for each in bucket.values() if each.tensor.dtype not in TORCH_DTYPES]
            if len(shapes) != 1 or unknown:
                self._refuse(f"{title} has states of different shapes, or of types without a universal form")
        for (name, _), place in self.places.items():
            if self._states_in(place.bucket) != self.states(name):
                self._refuse(f"{place.bucket} has other states of {name} than {self._bucket_of[name]}")

    def _refuse(self, told: str) -> NoReturn:
        path = self._entries.metadata.path
        raise MismatchError(
            f"{path} holds the distributed optimizer's buffers as they are, and {told:.300}: {SHARDING_HINT}. The weights are "
            f"whole: {WEIGHTS_HINT}"
        )


def _bits(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _read(extent: FileExtent, start: int, numel: int) -> torch.Tensor:
    """Read some elements of a range of a file."""
    dtype = NAMED_DTYPES[extent.dtype]
    with naming(extent.path), Path(extent.path).open("rb") as file:
        file.seek(extent.file_offset + start * dtype.itemsize)
        return torch.frombuffer(bytearray(file.read(numel * dtype.itemsize)), dtype=dtype)
