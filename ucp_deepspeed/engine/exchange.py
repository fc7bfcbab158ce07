"""Exchange between ranks: one rank sends over the network what others need too, while it goes on reading.

gloo's all-gather waits for one neighbour after the other, at a third of the speed of messages sent side by side. Other
backends use their own collectives, which run beside the host anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from ucp_deepspeed import tunables
from ucp_deepspeed.engine.deepspeed_types import Engine


@dataclass
class Exchange:
    """An exchange under way. Until `wait` the tensors to send may not change, and the received ones may not be used."""

    _works: list[Any] = field(default_factory=list)
    _packed: list[_Pack] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until every rank has what this one sent, and this one has what the others sent."""
        for work in self._works:
            work.wait()
        self._works = []
        self.wait_for_packed()

    def wait_for_packed(self) -> None:
        """Wait for the small tensors; the memory in which they travel is free then."""
        for pack in self._packed:
            for work in pack.works:
                work.wait()
            if pack.received:
                parts = pack.buffer.split([tensor.nbytes for tensor in pack.tensors])
                for tensor, part in zip(pack.tensors, parts, strict=True):
                    _bytes(tensor).copy_(part)
        self._packed = []


@dataclass(frozen=True)
class _Pack:
    """Small tensors of one rank in one message."""

    tensors: Sequence[torch.Tensor]
    buffer: torch.Tensor
    works: Sequence[Any]
    received: bool


def replica_group(engine: Engine, tensor: torch.Tensor) -> Any:
    """Return the process group of the ranks that hold all of a parameter or buffer, or what belongs to it, as this one does.

    It is None where there are no others, where ZeRO-3 has partitioned the tensor, or where the group's backend can't reach its
    device.
    """
    group = (
        groups._get_expert_data_parallel_group(tensor.group_name)  # type: ignore[attr-defined]
        if is_expert(tensor)
        else engine.seq_data_parallel_group
    )
    cut = hasattr(tensor, "ds_tensor")
    return None if cut or dist.get_world_size(group) == 1 or not reaches(group, tensor) else group


def is_expert(tensor: torch.Tensor) -> bool:
    """Return whether DeepSpeed keeps a parameter on some expert-parallel ranks only (``moe/experts.py``)."""
    return not getattr(tensor, "allreduce", True)


def goes_over_gloo(group: Any, tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on the CPU and the process group's messages are gloo's."""
    return bool(dist.get_backend(group) == "gloo" and tensor.device.type == "cpu")


def reaches(group: Any, tensor: torch.Tensor) -> bool:
    """Return whether the backend of a process group can send a tensor from where it is."""
    return goes_over_gloo(group, tensor) or (dist.get_backend(group) != "gloo" and tensor.device.type != "cpu")


Held = Sequence[Sequence[torch.Tensor]]
"""For each rank of a group contiguous tensors, of the same shapes on all ranks. The rank's own are sent; the others' are filled
with what is received."""


class Packing:
    """Memory in which small tensors travel together; one exchange at a time uses it.

    Args:
        numbytes: most bytes; the same on all ranks.
    """

    def __init__(self, numbytes: int = tunables.ROUND_NUMBYTES) -> None:
        self._numbytes = numbytes
        self._memory: dict[torch.device, torch.Tensor] = {}

    def least(self, held: Held) -> int:
        """Return the bytes from which a tensor travels by itself."""
        return max(min(tunables.PACKED_NUMBYTES, self._numbytes // len(held)), 1)

    def rounds(self, held: Held) -> Iterator[list[tuple[int, Sequence[torch.Tensor]]]]:
        """Yield the ranks and their small tensors that travel at one time."""
        most, least = self._numbytes // len(held), self.least(held)
        for together in zip_longest(*(_cut(tensors, least, most) for tensors in held)):
            yield [(rank, small) for rank, small in enumerate(together) if small]

    def reserve(self, held: Held) -> None:
        """Allocate what an exchange of these needs: it must not fail for want of memory, since other ranks wait for it."""
        for together in self.rounds(held):
            tensors = [tensor for _, small in together for tensor in small]
            numbytes, device = sum(tensor.nbytes for tensor in tensors), tensors[0].device
            if device not in self._memory or self._memory[device].numel() < numbytes:
                self._memory[device] = torch.empty(numbytes, dtype=torch.uint8, device=device)

    def buffers(self, together: Sequence[tuple[int, Sequence[torch.Tensor]]]) -> Iterator[torch.Tensor]:
        """Yield the reserved memory of each rank's tensors."""
        start = 0
        for _, small in together:
            numbytes = sum(tensor.nbytes for tensor in small)
            yield self._memory[small[0].device][start : start + numbytes]
            start += numbytes


def begin_exchange(held: Held, group: Any, packing: Packing) -> Exchange:
    """Begin to give every rank of a process group what each of them has. Collective over the group.

    Args:
        packing: has reserved memory for ``held``.
    """
    me, exchange = dist.get_rank(group), Exchange()
    for rank, tensors in enumerate(held):
        for tensor in tensors:
            if tensor.nbytes >= packing.least(held):
                exchange._works += _give(tensor, rank, me, group)
    for together in packing.rounds(held):
        exchange.wait_for_packed()
        for (rank, small), buffer in zip(together, packing.buffers(together), strict=True):
            if rank == me:
                torch.cat([_bytes(tensor) for tensor in small], out=buffer)
            exchange._packed.append(_Pack(small, buffer, _give(buffer, rank, me, group), rank != me))
    return exchange


def _cut(tensors: Sequence[torch.Tensor], least: int, most: int) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors smaller than ``least`` bytes, in lists of at most ``most`` bytes: the same on all ranks."""
    taken: list[torch.Tensor] = []
    numbytes = 0
    for tensor in tensors:
        if not 0 < tensor.nbytes < least:
            continue
        if taken and numbytes + tensor.nbytes > most:
            yield taken
            taken, numbytes = [], 0
        taken.append(tensor)
        numbytes += tensor.nbytes
    if taken:
        yield taken


def _give(tensor: torch.Tensor, owner: int, me: int, group: Any) -> list[Any]:
    """Begin to send a tensor from its owner to all others, as bytes: no backend has all dtypes."""
    if not goes_over_gloo(group, tensor):
        return [dist.broadcast(_bytes(tensor), group=group, group_src=owner, async_op=True)]
    if owner != me:
        return [dist.irecv(_bytes(tensor), group=group, group_src=owner)]
    others = (rank for rank in range(dist.get_world_size(group)) if rank != me)
    return [dist.isend(_bytes(tensor), group=group, group_dst=rank) for rank in others]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
