"""One open file: positioned reads, and a map where the system gives one."""

from __future__ import annotations

import os
import resource
import weakref
from contextlib import suppress
from functools import cached_property

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.remote import RemotePath


def most_open() -> int:
    """Return how many files a reader may keep open: a third of what is left, since there may be a second reader."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return tunables.MOST_OPEN
    return min(max((allowed - len(os.listdir("/dev/fd"))) // 3, tunables.FEWEST_OPEN), tunables.MOST_OPEN)  # noqa: PTH208


def close_quietly(descriptor: int) -> None:
    """Close a file or folder that isn't written by it; that this fails, on a disk that does, takes nothing away."""
    with suppress(OSError):
        os.close(descriptor)


class RemoteFile:
    """An object in a store, with the interface of `OpenFile`: it is never mapped, and each read is a request, or several.

    Args:
        request_numbytes: most bytes of one request, which lie in memory once more.
    """

    is_mapped, is_remote = False, True

    def __init__(self, path: RemotePath, request_numbytes: int) -> None:
        self.path, self._location, self._step = str(path), path, request_numbytes
        self.status = path.stat()
        self.numbytes = self.status.st_size

    def range(self, start: int, stop: int) -> torch.Tensor:
        """Return bytes of the object in new memory."""
        raw = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        self.read_into(start, memoryview(raw.numpy()))
        return raw

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill memory with the bytes from a place on."""
        for low in range(0, len(target), self._step):
            part = target[low : low + self._step]
            try:
                part[:] = self._location.read_range(start + low, start + low + len(part))
            except OSError as error:
                raise unreadable(self.path, error) from error

    def close(self) -> None:
        """Do nothing: no connection belongs to one object."""


class OpenFile:
    """An open file, at the latest closed when nobody uses it any more. It is mapped when blocks are asked for, if possible."""

    is_remote = False

    def __init__(self, path: str, mapped: bool) -> None:
        self.path, self._mapped = path, mapped
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, close_quietly, self._descriptor)
        self.status = os.fstat(self._descriptor)
        self.numbytes = self.status.st_size

    @property
    def is_mapped(self) -> bool:
        """Return whether `range` costs no memory."""
        return self._map is not None

    @cached_property
    def _map(self) -> torch.Tensor | None:
        if self._mapped and self.numbytes:  # an empty file can't be mapped
            with suppress(OSError, RuntimeError):
                # Copy-on-write: torch wants writable memory, and the file must never change. It keeps no descriptor.
                return torch.from_file(self.path, shared=False, size=self.numbytes, dtype=torch.uint8)
        return None

    def range(self, start: int, stop: int) -> torch.Tensor:
        """Return bytes of the file: a view of the map, or new memory that they are read into.

        The system ends a process (SIGBUS) that reads a page of a map which the file has lost. Whoever cuts the file in the moment
        between this look and the read still ends it.
        """
        if self._map is not None:
            if os.fstat(self._descriptor).st_size < stop:
                raise self._shorter(stop)
            return self._map[start:stop]
        raw = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        self.read_into(start, memoryview(raw.numpy()))
        return raw

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill memory with the bytes from a place on."""
        stop = start + len(target)
        while target:
            try:
                count = os.preadv(self._descriptor, [target], stop - len(target))
            except OSError as error:
                raise unreadable(self.path, error) from error
            if count == 0:
                raise self._shorter(stop)
            target = target[count:]

    def _shorter(self, stop: int) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self.path} became shorter while it was read: {stop} bytes were expected")


def unreadable(path: str, error: OSError) -> DamagedCheckpointError:
    """Return the error for a file that can't be read."""
    return DamagedCheckpointError(f"{path} can't be read: {error.strerror or error}")
