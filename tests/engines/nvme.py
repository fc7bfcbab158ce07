"""Engines whose optimizer states or parameters are on "NVMe", which here are files that plain Python reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper

from ucp_deepspeed.testing.runs import Run, build_engine


class FileHandle:
    """In place of DeepSpeed's asynchronous reads and writes, which need libaio: the same, done at once."""

    def __init__(self, **_: Any) -> None:
        self._locked: set[int] = set()
        self._done = 0

    def new_cpu_locked_tensor(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        tensor = torch.zeros(numel, dtype=like.dtype)
        self._locked.add(tensor.untyped_storage().data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None:
        self._locked.discard(tensor.untyped_storage().data_ptr())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        Path(path).write_bytes(tensor.detach().numpy().tobytes())
        self._done += 1
        return offset

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        held = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=tensor.dtype)
        tensor.copy_(held[: tensor.numel()])
        self._done += 1
        return offset

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


@contextmanager
def nvme_as_files() -> Iterator[None]:
    """On a rank: let DeepSpeed offload to "NVMe" without libaio."""
    swappers: tuple[Any, ...] = (partitioned_optimizer_swapper, partitioned_param_swapper)
    builders = [swapper.AsyncIOBuilder for swapper in swappers]
    for swapper in swappers:
        swapper.AsyncIOBuilder = lambda: SimpleNamespace(load=lambda **_: SimpleNamespace(aio_handle=FileHandle))
    try:
        yield
    finally:
        for swapper, builder in zip(swappers, builders, strict=True):
            swapper.AsyncIOBuilder = builder


def nvme_run(folder: Path | None = None, **changes: Any) -> Run:
    """A run whose matrices are large enough (1 MiB) to be swapped out; without a folder for `build_on_nvme`."""
    nvme = {"device": "nvme", "nvme_path": str(folder), "pin_memory": False}
    return Run("mlp", size={"ffn": 30001}, zero={"stage": 3, "offload_optimizer": nvme}, **changes)


def nvme_parameters_run() -> Run:
    """Return a run with parameters on NVMe and states on the CPU; for `build_on_nvme`."""
    nvme = {"device": "nvme", "buffer_size": 1_500_000, "pin_memory": False}
    offload = {"offload_param": nvme, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    return Run("mlp", size={"ffn": 30001}, zero={"stage": 3, **offload})


def build_on_nvme(run: Run) -> Any:
    """On a rank: an engine that swaps to a folder of its own, which goes with it."""
    place = TemporaryDirectory()
    zero = {key: {**value, "nvme_path": place.name} if "offload" in key else value for key, value in run.zero.items()}
    with nvme_as_files():
        engine = build_engine(replace(run, zero=zero))
    engine.nvme_folder = place
    return engine
