"""Fill an engine as planned: read, give replicas what they need, and make the weights.

The masters come first, so that the weights made of them travel while the optimizer's states are read.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER
from ucp_deepspeed.checkpoint.versions import FileVersions, status_of
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.engine.agreement import agreement, portable
from ucp_deepspeed.engine.exchange import Exchange, Held, Packing, begin_exchange
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.plan import Sharing, without
from ucp_deepspeed.remote import located
from ucp_deepspeed.transfer import CopyPool, FileReader, TransferCount, run_copies
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.rank_planner import PlannedBuffer, PlannedRank, PlannedSlot
from ucp_deepspeed.transfer.planning.target import TargetRank

Buffer = tuple[torch.Tensor, PlannedBuffer, Any]
"""A buffer, its plan, and the process group of the ranks that hold the whole of it."""

Shared = dict[Any, list[list[torch.Tensor]]]
"""Tensors to exchange, by process group; see `Held`."""


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
                status = status_of(located(path))
            except OSError as error:
                raise DamagedCheckpointError(f"{path} can't be read: {error.strerror or error}") from error
            if status.st_size < stop:
                raise DamagedCheckpointError(f"{path} is truncated: expected {stop} bytes, found {status.st_size}")
            self.versions.note(path, status)
        self.versions.check()

    def run(self, optimizer: EngineOptimizer, memory_numbytes: int, threads: int) -> TransferCount:
        """Fill the engine. Collective.

        Args:
            memory_numbytes: most bytes of memory for blocks on their way from a file into a buffer.
            threads: number of threads that read.

        Raises:
            UniversalCheckpointError: a rank couldn't read a file, a file was changed meanwhile, or memory was short. It is raised
                on every rank, so that none waits for the others.
        """
        slots, weights = list(self._slots()), zip(self.weights, self.planned.weights, self.rank.weights, strict=True)
        filler = _Filler(memory_numbytes, self.versions, self.tensor_parallel, threads)
        with torch.no_grad(), closing(filler):
            with agreement():  # there may be too little memory on one rank
                optimizer.begin()
                states = [
                    {state: optimizer.state_buffer(slot, state) for state in plan.buffers if state != MASTER}
                    for slot, plan in slots
                ]
            masters = [(slot.master.data, plan.buffers[MASTER], slot.replicas) for slot, plan in slots]
            with filler.alone():
                filler.read(masters, self.rounding)
            filler.exchange()
            with filler.alone():
                for held, group in optimizer.own_weights():
                    filler.share(held, group)
            filler.exchange()
            with filler.alone():
                filler.read(list(self._become_part(optimizer, states)))
                filler.read([(weight, plan, slot.replicas) for weight, plan, slot in weights])
            filler.exchange()
            filler.wait()
            with filler.alone():
                filler.finish()
                optimizer.make_weights()
                self.versions.check()
            optimizer.send_weights()
            optimizer.end()
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


Cores = tuple[str, frozenset[int]]
"""A machine, and the cores of it that a rank may use."""


def own_cores() -> Cores:
    """Return this rank's cores; containers on one machine count as on that machine."""
    machine = Path("/proc/sys/kernel/random/boot_id")
    name = machine.read_text(encoding="ascii").strip() if machine.is_file() else platform.node()
    return name, frozenset(os.sched_getaffinity(0))


def share_of_cores(mine: Cores, of_ranks: Sequence[Cores]) -> int:
    """Return the number of cores that a rank has for itself, at least 1, if the ranks that may use a core share it.

    Launchers differ in whether they bind each rank to cores of its own, and in how they say how many ranks a machine has.
    """
    machine, cores = mine
    users = Counter(core for other, theirs in of_ranks if other == machine for core in theirs)
    return max(floor(sum(Fraction(1, users[core]) for core in cores)), 1)


class _Filler:
    """Fills buffers one after another, while the parts that replicas share are on their way.

    What a rank does `alone` and what ranks do together take turns, and all ranks learn of an error before they wait for one
    another again.
    """

    def __init__(self, memory_numbytes: int, versions: FileVersions, tensor_parallel: Any, threads: int) -> None:
        self.count, self._tensor_parallel = TransferCount(), tensor_parallel
        packed_numbytes = min(tunables.ROUND_NUMBYTES, memory_numbytes // 4)
        request_numbytes = max(min(tunables.REQUEST_NUMBYTES, (memory_numbytes - packed_numbytes) // threads // 2), 1)
        self._reader = FileReader(versions, request_numbytes=request_numbytes)
        self._packing = Packing(packed_numbytes)
        self._pool = CopyPool(threads, memory_numbytes - packed_numbytes)
        self._among_tensor_parallel: Shared = {}
        self._among_replicas: Shared = {}
        self._begun: list[Exchange] = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raise on every rank what one raises in the block; something of the engine may have changed. Collective at the end."""
        with agreement():
            try:
                yield
                for held in (*self._among_tensor_parallel.values(), *self._among_replicas.values()):
                    self._packing.reserve(held)
            except Exception as error:
                reason = portable(error)
                raise type(reason)(
                    f"{reason}; the engine may be filled in part, and can't be used without another load"
                ) from error

    def read(self, buffers: Sequence[Buffer], rounding: torch.dtype | None = None) -> None:
        """Fill this rank's part of each buffer; the parts that process groups share are to be exchanged."""
        for buffer, plan, replicas in buffers:
            whole = buffer.contiguous()  # the tensor itself unless its elements lie in another order
            flat = whole.view(-1)
            read = plan.division.read(whole.numel())
            held = sorted((part.buffer_start, part.buffer_start + part.numel) for part in plan.held)
            for low, high in without(read, held):  # padding, or states that begin at zero
                flat[low:high].zero_()  # to clear whole buffers first would cost a pass
            self.count.add(run_copies(plan.copies, self._reader, lambda _, flat=flat: flat, self._pool))  # type: ignore[misc]
            if rounding is not None:
                for low, high in read:
                    for part in flat[low:high].split(tunables.ROUNDED_NUMEL):
                        part.copy_(part.to(rounding))
            if whole is not buffer:
                buffer.copy_(whole)
            if (sharing := plan.division.tensor_parallel) is not None:
                _add(self._among_tensor_parallel, buffer, self._tensor_parallel, sharing)
            if (sharing := plan.division.replicas) is not None:
                _add(self._among_replicas, buffer, replicas, sharing)

    def finish(self) -> None:
        """Check pieces of files that were read in part against their checksums, and count what was checked."""
        self._reader.finish()
        self.count.bytes_checked = self._reader.bytes_checked

    def share(self, held: Held, group: Any) -> None:
        """Have tensors exchanged among the ranks of a process group."""
        for mine, more in zip(self._among_replicas.setdefault(group, [[] for _ in held]), held, strict=True):
            mine += more

    def exchange(self) -> None:
        """Begin to exchange what is to be. Tensor-parallel ranks get theirs first, since replicas get it whole. Collective."""
        for exchange in self._begin(self._among_tensor_parallel):
            exchange.wait()
        self._begun += self._begin(self._among_replicas)
        self._among_tensor_parallel, self._among_replicas = {}, {}

    def _begin(self, shared: Shared) -> list[Exchange]:
        begun: list[Exchange] = []
        for group, held in shared.items():
            for exchange in (*self._begun, *begun):
                exchange.wait_for_packed()  # one exchange at a time takes memory for that
            begun.append(begin_exchange(held, group, self._packing))
        return begun

    def wait(self) -> None:
        """Wait until replicas have what they need. Collective."""
        for exchange in self._begun:
            exchange.wait()
        self._begun = []

    def close(self) -> None:
        """End the threads, close the files, and wait for what is on its way; after an error other ranks may be gone."""
        self._pool.close()
        self._reader.close()
        with suppress(Exception):
            self.wait()


def _add(shared: Shared, buffer: torch.Tensor, group: Any, sharing: Sharing) -> None:
    """Add the parts of a buffer that each rank of a process group reads."""
    flat, by_reader = buffer.view(-1), shared.setdefault(group, [[] for _ in range(dist.get_world_size(group))])
    for part in sharing.shares:
        by_reader[part.reader].append(flat[part.start : part.stop])
