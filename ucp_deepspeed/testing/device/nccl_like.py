"""The backend ``nccl_like``: moves tensors of the stand-in device between ranks, over gloo, as strictly as NCCL.

It takes tensors of the device alone, of the dtypes that NCCL has. A result is there after ``wait()``, and not before. A rank that
waits for another for `WATCHDOG_SECONDS` ends its process, as NCCL's watchdog does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
)
from torch.distributed import ProcessGroupGloo, Work

from ucp_deepspeed.testing.device.stand_in import BACKEND, NAME

WATCHDOG_SECONDS = 20.0

DTYPES = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)
"""The dtypes that NCCL moves (``torch/csrc/distributed/c10d/NCCLUtils.cpp``)."""

Tensors = Sequence[torch.Tensor]


class _Late(Work):
    """One operation: gloo does it on the host, and ``wait()`` brings the result to the device."""

    def __init__(self, work: Any, finish: Callable[[], None]) -> None:
        super().__init__()
        self._work, self._finish = work, finish
        self._done = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._done:
            return True
        try:
            self._work.wait()
        except RuntimeError as error:
            sys.stderr.write(f"nccl_like: a rank is missing after {WATCHDOG_SECONDS:g} s; this process ends: {error}\n")
            sys.stderr.flush()
            os._exit(134)
        self._finish()
        self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or bool(self._work.is_completed())


class NcclLike(dist.ProcessGroup):
    """A process group of the backend."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = ProcessGroupGloo(store, rank, size, timedelta(seconds=WATCHDOG_SECONDS))

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices that torch puts objects on before it sends them."""
        return [torch.device(NAME)]

    def _set_group_name(self, name: str) -> None:
        self._own_name = name

    def _set_group_desc(self, text: str) -> None:
        self._own_description = text

    @property
    def group_name(self) -> str:
        return self._own_name

    @property
    def group_desc(self) -> str:
        return self._own_description

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return BACKEND

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def _on_host(self, tensors: Tensors) -> list[torch.Tensor]:
        for tensor in tensors:
            if tensor.device.type != NAME:
                raise RuntimeError(f"{BACKEND} moves tensors of the device alone, and this one is on {tensor.device}")
            if tensor.dtype not in DTYPES:
                raise RuntimeError(f"{BACKEND} doesn't move {tensor.dtype}")
            if not tensor.is_contiguous():
                raise RuntimeError(f"{BACKEND} moves contiguous tensors alone")
        return [tensor.detach().cpu() for tensor in tensors]

    def _later(self, work: Any, *pairs: tuple[Tensors, Tensors]) -> Work:
        """Return the operation; ``pairs`` are tensors of the device and the host's that become theirs."""

        def finish() -> None:
            with torch.no_grad():
                for targets, sources in pairs:
                    for target, source in zip(targets, sources, strict=True):
                        target.detach().copy_(source.view(target.shape))

        return _Late(work, finish)

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Work:
        held = self._on_host(tensors)
        return self._later(self._gloo.allreduce(held, opts or AllreduceOptions()), (tensors, held))

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        return _All([self.allreduce([tensor], _reduction(opts)) for tensor in tensors])

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Work:
        held = self._on_host(tensors)
        return self._later(self._gloo.broadcast(held, opts or BroadcastOptions()), (tensors, held))

    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        held = self._on_host(tensors)
        own = opts.rootRank == self._rank
        return self._later(self._gloo.reduce(held, opts), (tensors, held) if own else ((), ()))

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        held, found = self._on_host(inputs), [self._on_host(each) for each in outputs]
        work = self._gloo.allgather(found, held, opts or AllgatherOptions())
        return self._later(work, *zip(outputs, found, strict=True))

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        [held], [whole] = self._on_host([tensor]), self._on_host([output])
        found = list(whole.view(self._size, -1).unbind())
        work = self._gloo.allgather([found], [held.view(-1)], AllgatherOptions())
        return self._later(work, ([output], [whole]))

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        return _All([self._allgather_base(*pair) for pair in zip(outputs, inputs, strict=True)])

    def _reduce_scatter_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Work:
        [held] = self._on_host([tensor])
        self._on_host([output])
        work = self._gloo.allreduce([held], _reduction(opts))
        return self._later(work, ([output], [held.view(self._size, -1)[self._rank]]))

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Work:
        held = [self._on_host(each) for each in inputs]
        self._on_host(outputs)
        works = [self._gloo.allreduce([tensor], _reduction(opts)) for each in held for tensor in each]
        return _All(
            [self._later(work) for work in works[:-1]]
            + [self._later(works[-1], (outputs, [each[self._rank] for each in held]))]
        )

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        return _All([self._reduce_scatter_base(*pair, opts) for pair in zip(outputs, inputs, strict=True)])

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any) -> Work:
        held, found = self._on_host(inputs), [self._on_host(each) for each in outputs]
        return self._later(self._gloo.gather(found, held, opts), *zip(outputs, found, strict=True))

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> Work:
        held, found = [self._on_host(each) for each in inputs], self._on_host(outputs)
        return self._later(self._gloo.scatter(found, held, opts), (outputs, found))

    def alltoall_base(
        self, output: torch.Tensor, tensor: torch.Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> Work:
        [held], [found] = self._on_host([tensor]), self._on_host([output])
        work = self._gloo.alltoall_base(found, held, output_sizes, input_sizes, AllToAllOptions())
        return self._later(work, ([output], [found]))

    all_to_all_single = alltoall_base

    def send(self, tensors: Tensors, rank: int, tag: int = 0) -> Work:
        return self._later(self._gloo.send(self._on_host(tensors), rank, tag))

    def recv(self, tensors: Tensors, rank: int, tag: int = 0) -> Work:
        found = self._on_host(tensors)
        return self._later(self._gloo.recv(found, rank, tag), (tensors, found))

    def barrier(self, opts: Any = None) -> Work:
        return self._later(self._gloo.barrier(BarrierOptions()))


class _All(Work):
    """Several operations."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all([work.wait() for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _reduction(opts: Any) -> Any:
    found = AllreduceOptions()
    if opts is not None:
        found.reduceOp = opts.reduceOp
    return found


def register() -> None:
    """Make the backend known to torch."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: NcclLike(store, rank, size), devices=[NAME]
        )
