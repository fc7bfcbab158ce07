"""Host memory that tensors are copied into, of just the size that they need."""

from __future__ import annotations

import logging
import mmap
import os
import platform
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.transfer.staging import pinned

logger = logging.getLogger("ucp_deepspeed")


class HostMemory:
    """One piece of host memory.

    torch rounds sizes of pinned blocks up to powers of two (``ATen/core/CachingHostAllocator.h``). So this is plain memory, which
    the runtime of CUDA or ROCm registers. Elsewhere tensors of an accelerator come by way of two pinned buffers.

    Args:
        device: an accelerator whose tensors are copied; None if they are on the host.

    Raises:
        OSError: the system doesn't give so much memory.
    """

    def __init__(self, numbytes: int, device: torch.device | None) -> None:
        self.numbytes = numbytes
        self._memory = mmap.mmap(-1, numbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.is_registered = device is not None and self._register(device)
        self._stages = None if device is None or self.is_registered else _Stages()

    def _register(self, device: torch.device) -> bool:
        runtime = getattr(torch.get_device_module(device), "cudart", None)
        if runtime is None:
            return False
        self._memory.madvise(mmap.MADV_DONTFORK)  # otherwise the page that the device writes to could become a child's
        address = self.buffer(0, 1).data_ptr()
        if code := int(runtime().cudaHostRegister(address, self.numbytes, 1)):  # 1: for all devices
            with suppress(RuntimeError):  # this takes the error, which torch would tell at the user's next kernel
                torch.zeros(1, device=device)
            told = "%d bytes of host memory can't be pinned (error %d of the device's runtime), so that snapshots take longer"
            logger.warning(told, self.numbytes, code)
            return False
        # The end of the process frees all, and the runtime may be gone by then.
        weakref.finalize(self, _unregister, runtime, address, self._memory, os.getpid()).atexit = False
        return True

    def buffer(self, start: int, numbytes: int) -> torch.Tensor:
        """Return a part of the memory as bytes, with a storage of their own."""
        with torch.inference_mode(False):  # later saves write to it outside of that mode
            if numbytes == 0:
                return torch.empty(0, dtype=torch.uint8, device="cpu")
            return torch.frombuffer(self._memory, dtype=torch.uint8, count=numbytes, offset=start)

    def fill(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy tensors into others, which lie in this memory; return when all is there."""
        for source, target in (pair for pair in copies if pair[0].numel()):
            plain = source.is_contiguous() and target.is_contiguous() and not (source.is_conj() or source.is_neg())
            if plain and source.device.type == "cpu":
                _copy_bytes(_bytes(source), _bytes(target))
            elif plain and self._stages is not None:
                self._stages.copy(_bytes(source), _bytes(target))
            else:
                target.copy_(source, non_blocking=self.is_registered)
        if self._stages is not None:
            self._stages.end()
        if self.is_registered:
            for device in {source.device for source, _ in copies}:
                torch.accelerator.current_stream(device).synchronize()


def _unregister(runtime: Callable[[], Any], address: int, memory: mmap.mmap, process: int) -> None:
    """Undo what `HostMemory` did in a process, but not in those that it has forked; ``memory`` stays until then."""
    if os.getpid() == process:
        runtime().cudaHostUnregister(address)


class _Stages:
    """Two pinned buffers, by way of which bytes come from an accelerator: one is emptied while the other is filled."""

    def __init__(self) -> None:
        self._free = deque(pinned(2 * tunables.PART_NUMBYTES).split(tunables.PART_NUMBYTES))
        self._begun: deque[tuple[torch.Event, torch.Tensor, torch.Tensor]] = deque()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy bytes of an accelerator."""
        parts = (each.split(tunables.PART_NUMBYTES) for each in (source, target))
        for source_part, target_part in zip(*parts, strict=True):
            if not self._free:
                self._end_first()
            stage = self._free.popleft()
            stage[: source_part.numel()].copy_(source_part, non_blocking=True)
            self._begun.append((torch.accelerator.current_stream(source.device).record_event(), stage, target_part))

    def _end_first(self) -> None:
        copied, stage, target = self._begun.popleft()
        copied.synchronize()
        _copy_bytes(stage[: target.numel()], target)
        self._free.append(stage)

    def end(self) -> None:
        """Return when all is there."""
        while self._begun:
            self._end_first()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy with the C library's ``memmove``, which goes around the caches and takes two thirds of the time of torch's own
    copy."""
    threads, read, written = torch.get_num_threads(), source.numpy(), target.numpy()
    if threads == 1 or read.size < tunables.LEAST_SHARED_NUMBYTES:
        np.copyto(written, read)
        return
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.copyto, np.array_split(written, threads), np.array_split(read, threads)))
    except RuntimeError:  # no thread can be started: the process has come to its end
        np.copyto(written, read)


GROUPS = Path("/sys/fs/cgroup")
"""The folder of control groups."""

UNLIMITED_NUMBYTES = 1 << 62
"""The least that version 1 of control groups says where there is no limit."""


def free_numbytes() -> tuple[int | None, int]:
    """Return how many bytes of host memory may still be taken, on the machine and in the control groups of this process, and how
    many more may be swapped out. None if the system doesn't tell."""
    told, found, swap = Path("/proc/self/cgroup"), list[int](), 0
    with suppress(OSError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        found.append(sizes["MemAvailable:"])
        swap = sizes["SwapFree:"]
    for left, left_to_swap in _left_in_groups(told):
        found += [] if left is None else [left]
        swap = swap if left_to_swap is None else min(swap, left_to_swap)
    return min(found, default=None), swap


def _left_in_groups(told: Path) -> Iterator[tuple[int | None, int | None]]:
    """Yield what each control group of this process has left, of version 1 or 2: of memory, and of swap; None where it limits
    nothing. ``told`` lists the process's groups; a container sees its own as the root."""
    with suppress(OSError):
        for line in told.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, left_in = GROUPS, _left_in_second
            elif "memory" in controllers.split(","):
                root, left_in = GROUPS / "memory", _left_in_first
            else:
                continue
            folder = root / path.lstrip("/")
            for group in (folder, *(each for each in folder.parents if each.is_relative_to(root))):
                yield left_in(group)


def _left_in_second(group: Path) -> tuple[int | None, int | None]:
    left = _left(group, "memory.max", "memory.current")
    return left if left is None else left + _cached(group, ""), _left(group, "memory.swap.max", "memory.swap.current")


def _left_in_first(group: Path) -> tuple[int | None, int | None]:
    """The second limit of version 1 is one of memory and swap together."""
    left = _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes")
    both = _left(group, "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
    swap = None if left is None or both is None else max(both - left, 0)
    return left if left is None else left + _cached(group, "total_"), swap


def _left(group: Path, limit_name: str, used_name: str) -> int | None:
    """Return the difference of two files of a control group; None where there is no limit, or no such file."""
    with suppress(OSError, ValueError):
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in (limit_name, used_name))
        if limit != "max" and int(limit) < UNLIMITED_NUMBYTES:
            return int(limit) - int(used)
    return None


def _cached(group: Path, prefix: str) -> int:
    """Return the bytes of files that a control group and those below it keep in memory, which the system gives up; ``prefix`` is
    of the names in ``memory.stat``."""
    with suppress(OSError, ValueError):
        words = (group / "memory.stat").read_text(encoding="ascii").split()
        stat = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        return stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
    return 0


def size_of(numbytes: int) -> str:
    """Return a size in words, in MB unless it is less than 0.1 MB."""
    if abs(numbytes) >= 100_000:
        return f"{numbytes / 1e6:.1f} MB"
    return f"{numbytes / 1e3:.1f} kB" if abs(numbytes) >= 1000 else f"{numbytes} bytes"


@dataclass(frozen=True, slots=True)
class Need:
    """Host memory that a rank is about to take for snapshots.

    Attributes:
        machine: the host's name, which containers have of their own.
        copied: bytes for what is copied from an accelerator.
        plain: bytes for what is on the host.
        free: bytes that may still be taken; see `free_numbytes`.
        swap: more bytes for what is on the host; what an accelerator copies to stays in memory.
    """

    machine: str
    copied: int
    plain: int
    free: int | None
    swap: int = 0

    @property
    def numbytes(self) -> int:
        """Return all bytes."""
        return self.copied + self.plain

    def __str__(self) -> str:
        return (
            f"{size_of(self.copied)} of host memory for tensors of accelerators, and {size_of(self.plain)} for others"
        )

    @classmethod
    def here(cls, copied: int, plain: int) -> Need:
        """Return the need of this process."""
        return cls(platform.node(), copied, plain, *free_numbytes())


def check_room(needs: Sequence[Need]) -> None:
    """Check that each machine has the memory that its ranks need.

    Raises:
        SaveError: says what is needed and what is free.
    """
    for machine in dict.fromkeys(need.machine for need in needs):
        here = [need for need in needs if need.machine == machine]
        free = min((need.free for need in here if need.free is not None), default=None)
        in_all = Need(machine, sum(need.copied for need in here), sum(need.plain for need in here), free)
        swap = min(need.swap for need in here)
        if free is not None and (in_all.copied > free or in_all.numbytes > free + swap):
            raise SaveError(
                f"{machine} has {size_of(free)} of host memory left, and the snapshots of {len(here)} ranks take {in_all}; "
                f"make room, or set \"async\": false in 'universal_checkpoint.save'"
            )
