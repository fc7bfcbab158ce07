"""Fill an engine as planned: read, give replicas what they need, and make the weights.

The masters come first, so that the weights made of them travel while the optimizer's states are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.engine.agreement import agreement, portable
from ucp_deepspeed.engine.exchange import Exchange, begin_exchange
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.plan import Sharing, without
from ucp_deepspeed.transfer import CopyPool, FileReader, TransferCount, run_copies
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.rank_planner import Copies, PlannedBuffer, PlannedRank, PlannedSlot
from ucp_deepspeed.transfer.planning.target import TargetRank

Buffer = tuple[torch.Tensor, PlannedBuffer, Any]
"""A buffer, its plan, and the process group of the ranks that hold the whole of it."""


@dataclass(frozen=True)
class Filling:
    """Everything that one rank fills.

    Attributes:
        rank: its slots (`EngineSlot`), frozen parameters and buffers.
        weights: memory of the frozen parameters and buffers.
        planned: the plan for each of them.
        policies: whether the base optimizer's state is replaced, kept or reset.
        rounding: dtype to which masters are rounded; None to keep them exact.
        tensor_parallel: process group of the tensor-parallel ranks; None if there are no others.
        versions: versions of the checkpoint's files.
    """

    rank: TargetRank
    weights: tuple[torch.Tensor, ...]
    planned: PlannedRank
    policies: Policies
    rounding: torch.dtype | None
    tensor_parallel: Any
    versions: FileVersions

    def exchange_key(self) -> tuple[int, str] | None:
        """Return the first of the tensor-parallel ranks, and a digest of what they exchange; None where this is the only one."""
        group = self.tensor_parallel
        if group is None:
            return None
        return dist.get_global_rank(group, 0), hashlib.sha256(repr(self.planned.exchanged).encode()).hexdigest()

    def check_files(self) -> None:
        """Open each file that this rank is to read once, so that an unreadable file is told before anything has changed.

        Raises:
            DamagedCheckpointError: a file is missing, can't be opened, ends before the bytes that are needed, or has changed
                since it was opened for planning.
        """
        stops: dict[str, int] = {}
        for copy in (copy for buffer in self.planned.buffers for copy in buffer.copies):
            for extent in (view.buffer for view in copy.sources):
                stop = extent.file_offset + extent.numel * ITEMSIZE[extent.dtype]
                stops[extent.path] = max(stop, stops.get(extent.path, 0))
        for path, stop in stops.items():
            try:
                with Path(path).open("rb") as file:
                    status = os.fstat(file.fileno())
            except OSError as error:
                raise DamagedCheckpointError(f"{path} can't be read: {error.strerror}") from error
            if status.st_size < stop:
                raise DamagedCheckpointError(f"{path} is truncated: expected {stop} bytes, found {status.st_size}")
            self.versions.note(path, status)
        self.versions.check()

    def run(self, optimizer: EngineOptimizer, memory_numbytes: int) -> TransferCount:
        """Fill the engine. Collective.

        Args:
            memory_numbytes: most bytes of memory for blocks on their way from a file into a buffer.

        Raises:
            UniversalCheckpointError: a rank couldn't read a file, or a file was changed meanwhile. It is raised on every rank, so
                that none waits for the others.
        """
        slots, weights = list(self._slots()), zip(self.weights, self.planned.weights, self.rank.weights, strict=True)
        filler = _Filler(memory_numbytes, self.versions, self.tensor_parallel)
        with torch.no_grad(), closing(filler):
            with agreement():  # there may be too little memory on one rank
                optimizer.begin()
                states = [
                    {state: optimizer.state_buffer(slot, state) for state in plan.buffers if state != MASTER}
                    for slot, plan in slots
                ]
            filler.fill(
                [(slot.master.data, plan.buffers[MASTER], slot.replicas) for slot, plan in slots], self.rounding
            )
            optimizer.begin_refresh()
            filler.fill(list(self._become_part(optimizer, states)))
            filler.fill([(weight, plan, slot.replicas) for weight, plan, slot in weights])
            filler.wait()
            optimizer.refresh_weights()
            optimizer.end()
        with agreement():
            filler.check()
        return filler.count

    def _slots(self) -> Iterator[tuple[EngineSlot, PlannedSlot]]:
        for slot, plan in zip(self.rank.slots, self.planned.slots, strict=True):
            assert isinstance(slot, EngineSlot), "a live one"
            yield slot, plan

    def _become_part(
        self, optimizer: EngineOptimizer, states: Sequence[Mapping[str, torch.Tensor]]
    ) -> Iterator[Buffer]:
        """Yield the buffers of the optimizer's states, and make them part of it."""
        for (slot, plan), buffers in zip(self._slots(), states, strict=True):
            if self.policies.optimizer_states == "reset":
                optimizer.reset_state(slot)
            if self.policies.optimizer_states == "restore":
                yield from ((buffer, plan.buffers[state], slot.replicas) for state, buffer in buffers.items())
                optimizer.set_state(slot, buffers, plan.scalars)


def check_exchange(keys: Sequence[tuple[int, str] | None]) -> None:
    """Check that all tensor-parallel ranks are to exchange the same, by all ranks' `Filling.exchange_key`.

    Raises:
        MismatchError: they don't, and would wait for one another, or receive what is meant for another parameter.
    """
    told = {key for key in keys if key is not None}
    if len(told) > len({first for first, _ in told}):
        raise MismatchError(
            'tensor-parallel ranks don\'t hold what they should have in common; a "shared_read_bytes" above the '
            "checkpoint's size lets each of them read what it holds"
        )


class _Filler:
    """Fills buffers one after another, while the parts that replicas share are on their way."""

    def __init__(self, memory_numbytes: int, versions: FileVersions, tensor_parallel: Any) -> None:
        self.count, self._tensor_parallel = TransferCount(), tensor_parallel
        self._versions, self._reader = versions, FileReader(versions)
        self._round_numbytes = min(tunables.ROUND_NUMBYTES, memory_numbytes // 4)
        # ``torchrun`` and ``deepspeed`` say how many ranks this machine has.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
        threads = max(min(len(os.sched_getaffinity(0)) // ranks, tunables.MOST_THREADS), 1)
        self._pool = CopyPool(threads, memory_numbytes - self._round_numbytes)
        self._exchanges: list[Exchange] = []
        self._error: Exception | None = None

    def fill(self, buffers: Sequence[Buffer], rounding: torch.dtype | None = None) -> None:
        """Fill this rank's part of each buffer, and begin to exchange the parts with replicas. Collective."""
        for buffer, plan, _ in buffers:
            whole = buffer.contiguous()  # the tensor itself unless its elements lie in another order
            flat = whole.view(-1)
            read = plan.division.read(whole.numel())
            held = sorted((part.buffer_start, part.buffer_start + part.numel) for part in plan.held)
            for low, high in without(read, held):  # padding, or states that begin at zero
                flat[low:high].zero_()  # to clear whole buffers first would cost a pass
            self._read(plan.copies, flat)
            if rounding is not None:
                for low, high in read:
                    for part in flat[low:high].split(tunables.ROUNDED_NUMEL):
                        part.copy_(part.to(rounding))
            if whole is not buffer:
                buffer.copy_(whole)
        group = self._tensor_parallel
        for exchange in self._begin([(each, group, plan.division.tensor_parallel) for each, plan, _ in buffers]):
            exchange.wait()  # replicas get it whole
        self._exchanges += self._begin([(each, replicas, plan.division.replicas) for each, plan, replicas in buffers])

    def _read(self, copies: Copies, flat: torch.Tensor) -> None:
        """Read into one buffer. After a first error read nothing more; other ranks still get what they wait for."""
        if self._error is None:
            try:
                self.count.add(run_copies(copies, self._reader, lambda _: flat, self._pool))
            except Exception as error:
                self._error = error

    def check(self) -> None:
        """Raise the error of this rank, if there is one."""
        try:
            if self._error is not None:
                raise self._error
            self._versions.check()
        except Exception as error:
            reason = portable(error)
            raise type(reason)(
                f"{reason}; the engine is filled in part and can't be used without another load"
            ) from error

    def _begin(self, buffers: Iterable[tuple[torch.Tensor, Any, Sharing | None]]) -> list[Exchange]:
        """Begin to exchange the parts of buffers that process groups share. Collective."""
        held: dict[Any, list[list[torch.Tensor]]] = {}
        for buffer, group, sharing in buffers:
            if sharing is not None:
                flat = buffer.view(-1)
                by_reader = held.setdefault(group, [[] for _ in range(dist.get_world_size(group))])
                for part in sharing.shares:
                    by_reader[part.reader].append(flat[part.start : part.stop])
        begun: list[Exchange] = []
        for group, by_reader in held.items():
            for exchange in (*self._exchanges, *begun):
                exchange.wait_for_packed()  # one exchange at a time takes memory for that
            begun.append(begin_exchange(by_reader, group, self._round_numbytes))
        return begun

    def wait(self) -> None:
        """Wait until replicas have what they need. Collective."""
        for exchange in self._exchanges:
            exchange.wait()

    def close(self) -> None:
        """End the threads, and close the files."""
        self._pool.close()
        self._reader.close()
