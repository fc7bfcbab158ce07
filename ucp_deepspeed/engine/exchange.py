"""What one rank has read and others need too goes over the network, while this rank goes on reading.

gloo's all-gather waits for one neighbour after the other, at a third of the speed of messages sent side by side; other backends
are left to their own collectives, which run beside the host anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

PACKED_NUMBYTES = 1 << 17
"""Tensors below this size travel together: a message of its own costs more than copying them."""


@dataclass
class Exchange:
    """One under way. Until `wait` neither what is sent may change, nor what is received be used."""

    _works: list[Any] = field(default_factory=list)
    _packed: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = field(default_factory=list)

    def wait(self) -> None:
        """Until every rank has what this one sent, and this one what the others sent."""
        for work in self._works:
            work.wait()
        for buffer, tensors in self._packed:
            _unpack(buffer, tensors)
        self._works, self._packed = [], []


def replica_group(engine: Any, tensor: torch.Tensor) -> Any:
    """The ranks that hold all of a parameter or buffer, or what belongs to it, as this one does.

    None where there are no others, where ZeRO-3 has cut it, or where the group's backend can't reach its device.
    """
    cut, expert = hasattr(tensor, "ds_tensor"), not getattr(tensor, "allreduce", True)
    group = (
        groups._get_expert_data_parallel_group(tensor.group_name)  # type: ignore[attr-defined]
        if expert
        else engine.seq_data_parallel_group
    )
    return None if cut or dist.get_world_size(group) == 1 or not _reaches(group, tensor) else group


def goes_over_gloo(group: Any, tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU and the process group's messages are gloo's."""
    return bool(dist.get_backend(group) == "gloo" and tensor.device.type == "cpu")


def _reaches(group: Any, tensor: torch.Tensor) -> bool:
    return goes_over_gloo(group, tensor) or (dist.get_backend(group) != "gloo" and tensor.device.type != "cpu")


def begin_exchange(held: Sequence[Sequence[torch.Tensor]], group: Any) -> Exchange:
    """Begin to give every rank of a process group what each of them has. Collective over the group.

    Args:
        held: for each rank of the group contiguous tensors, of the same shapes on all ranks: the rank's own are sent, the others'
            are received into.
    """
    me = dist.get_rank(group)
    exchange = Exchange()
    for rank, tensors in enumerate(held):
        large = [tensor for tensor in tensors if _numbytes(tensor) >= PACKED_NUMBYTES]
        small = [tensor for tensor in tensors if 0 < _numbytes(tensor) < PACKED_NUMBYTES]
        if small:
            packed = _pack(small) if rank == me else _empty(small)
            large.append(packed)
            if rank != me:
                exchange._packed.append((packed, small))
        for tensor in large:
            exchange._works += _give(tensor, rank, me, group)
    return exchange


def _give(tensor: torch.Tensor, owner: int, me: int, group: Any) -> list[Any]:
    """Begin to send a tensor from its owner to all others."""
    if not goes_over_gloo(group, tensor):
        return [dist.broadcast(tensor, group=group, group_src=owner, async_op=True)]
    if owner != me:
        return [dist.irecv(tensor, group=group, group_src=owner)]
    others = (rank for rank in range(dist.get_world_size(group)) if rank != me)
    return [dist.isend(tensor, group=group, group_dst=rank) for rank in others]


def _numbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def _empty(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.empty(sum(map(_numbytes, tensors)), dtype=torch.uint8, device=tensors[0].device)


def _unpack(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    start = 0
    for tensor in tensors:
        stop = start + _numbytes(tensor)
        tensor.view(-1).view(torch.uint8).copy_(buffer[start:stop])
        start = stop
