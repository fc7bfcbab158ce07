"""The work of the ranks of ``benchmark.py``: each function is called on all of them at once, and returns this rank's figures."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ucp_deepspeed import wait_for_save
from ucp_deepspeed.config import SaveConfig, UniversalCheckpointConfig
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.saving.background import BUFFERS
from ucp_deepspeed.testing.runs import Run, build_engine, train_step
from ucp_deepspeed.transfer import open_files

TAG = "measured"

LIMIT_NUMBYTES, PART_NUMBYTES = 1 << 30, 32 << 20
"""Memory that a bare copy fills, again and again, and what it copies at once: far more than caches hold, and little beside a
large engine."""

LARGE = 500_000_000
"""Parameters of a model for which a machine of 24 GiB has little memory to spare."""

PATTERNS = {
    "universal_checkpoint_version": 0.2,
    "parameter_with_row_parallelism_patterns": [r".*linear_proj\.weight", r".*linear_fc2\.weight"],
    "tp_replicated_parameter_patterns": [
        r".*layernorm\.(weight|bias)",
        r".*linear_proj\.bias",
        r".*linear_fc2\.bias",
        r".*position_embeddings\.weight",
    ],
    "vocabulary_parameter_patterns": [r".*word_embeddings\.weight"],
}
"""The settings of Megatron-Core's GPT that DeepSpeed's converter needs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One call on one rank, or on all. None is unknown, or makes no sense of such a call.

    Attributes:
        seconds: until it returned.
        bytes_read: bytes that the processes got from the kernel's reads (``rchar``), plus those that ours takes from memory maps.
            Files' headers count, and for a command what Python reads to start. The others map nothing.
        bytes_written: bytes that they gave to the kernel's writes (``wchar``), also the ranks' messages while they save.
        files: files that a rank opens under the folder of the checkpoint; for a save or a conversion, files that it makes.
        extra_memory: bytes that no file backs, at their peak, beyond those before the call: the engine has all of its buffers
            then. For a command, all bytes that its processes have.
        temporary: bytes on disk at the worst moment that are gone at the end.
        bytes_counted: what the call's own report says that it copied out of files.
    """

    seconds: float
    bytes_read: int | None = None
    bytes_written: int | None = None
    files: int | None = None
    extra_memory: int | None = None
    temporary: int | None = None
    bytes_counted: int | None = None

    def after(self, first: Measured) -> Measured:
        """Both, one after the other, of which only the first makes files that are gone at the end."""
        return Measured(
            first.seconds + self.seconds,
            (first.bytes_read or 0) + (self.bytes_read or 0),
            (first.bytes_written or 0) + (self.bytes_written or 0),
            self.files,
            max(first.extra_memory or 0, self.extra_memory or 0),
            first.temporary,
        )


_engine: Any = None
_run: Run | None = None
_watching = True
_mapped: list[int] = []
"""Bytes of each range of a memory map that ours has used."""


def build(run: Run) -> int:
    """An engine that the following calls use, with the optimizer's state of one step; returns the parameters' elements.

    A large one takes no step, since gradients and what torch's Adam computes in between need as much memory again: copies of the
    masters stand for its moments.
    """
    global _engine, _run
    release()
    _engine, _run = build_engine(run), run
    _leave_out_nothings(_engine)
    parameters = sum(getattr(param, "ds_numel", param.numel()) for param in _engine.module.parameters())
    if parameters < LARGE:
        train_step(_engine, run, 1)
        return parameters
    for slot in engine_optimizer(_engine).slots():
        moments = {state: slot.master.detach().clone() for state in ("exp_avg", "exp_avg_sq")}
        _engine.optimizer.optimizer.state[slot.master] = {"step": torch.tensor(1.0), **moments}
    return parameters


def _leave_out_nothings(engine: Any) -> None:
    """Leave Megatron-Core's extra states out of what is saved: they are None, at which DeepSpeed's converter fails."""
    state_dict = engine.module_state_dict

    def without(*arguments: Any, **settings: Any) -> dict[str, Any]:
        return {key: value for key, value in state_dict(*arguments, **settings).items() if value is not None}

    engine.module_state_dict = without


def engine() -> Any:
    """The one that `build` made."""
    return _engine


def watch(on: bool) -> None:
    """Set whether the following calls tell all that they take, or, undisturbed, the time alone."""
    global _watching
    _watching = on


def release() -> None:
    """Let go of the engine."""
    global _engine
    if _engine is not None:
        _engine.destroy()
        _engine = None
        gc.collect()


def save(folder: str, hook: bool, background: bool = False, checksums: bool = True) -> Measured:
    """``engine.save_checkpoint``, with the package's hook or without; in the background only the call's seconds count."""
    assert _run is not None
    info = PATTERNS | {"original_vocab_size": _run.size["vocabulary"]}
    _engine.universal_checkpoint_config = UniversalCheckpointConfig(
        enabled=hook, save=SaveConfig.model_validate({"async": background, "checksums": checksums})
    )
    with Gauge() as gauge:
        _engine.save_checkpoint(folder, tag=TAG, client_state={"universal_checkpoint_info": info})
        gauge.stop()
        wait_for_save()
    dist.barrier()
    files = sum(path.is_file() for path in Path(folder).rglob("*"))
    return replace(gauge.measured, files=files)


def save_first(folder: str) -> Measured:
    """In the background, by an engine that has no buffers yet: their memory is new."""
    vars(_engine).pop(BUFFERS, None)
    return save(folder, True, True)


def copy_state() -> Measured:
    """The limit of saving in the background: what this rank's last such save took, copied once into memory that exists."""
    import numpy as np

    sources = [buffer.numpy() for buffer in getattr(_engine, BUFFERS).taken]
    targets = [np.full_like(source, 1) for source in sources]
    with Gauge() as gauge:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
    return Measured(gauge.measured.seconds, extra_memory=gauge.measured.extra_memory)


def load_directly(folder: str, verify: Literal["pieces", "off"] = "pieces") -> Measured:
    """The package's load, also where nothing has changed."""
    _engine.universal_checkpoint_config = UniversalCheckpointConfig(enabled=True, load="always", verify=verify)
    with Gauge(folder) as gauge:
        path, _ = _engine.load_checkpoint(folder, tag=TAG)
    assert path is not None
    return replace(gauge.loaded, bytes_counted=_engine.universal_checkpoint_report.bytes_read)


def load_natively(folder: str, universal: bool = False, hook: bool = False) -> Measured:
    """DeepSpeed's own load: of its own files, or of what ``ds_to_universal`` made of them; with the hook, which checks them."""
    _engine.universal_checkpoint_config = UniversalCheckpointConfig(enabled=hook)
    _engine._config.load_universal_checkpoint = universal
    try:
        with Gauge(folder) as gauge:
            path, _ = _engine.load_checkpoint(folder, tag=TAG)
    finally:
        _engine._config.load_universal_checkpoint = False
    assert path is not None
    return gauge.loaded


def copy_mapped(paths: list[str]) -> Measured:
    """The limit: this rank's share of the bytes of some files, copied once from memory maps into memory that exists."""
    import numpy as np

    maps = [torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")) for path in paths]
    world, rank = dist.get_world_size(), dist.get_rank()
    shares = [held.tensor_split(world)[rank] for held in maps]
    total = sum(share.numel() for share in shares)
    target = torch.zeros(min(total, LIMIT_NUMBYTES), dtype=torch.uint8)
    with Gauge() as gauge:
        place = 0
        for part in (part for share in shares for part in share.split(PART_NUMBYTES)):
            place = 0 if place + part.numel() > target.numel() else place
            target[place : place + part.numel()].copy_(part)
            place += part.numel()
    return replace(gauge.loaded, bytes_read=total, files=len(paths))


def read_sequentially(paths: list[str]) -> Measured:
    """The limit of cold files: this rank's share of their bytes, read in order into memory that exists and is used again."""
    world, rank = dist.get_world_size(), dist.get_rank()
    buffer = memoryview(bytearray(b"\1") * PART_NUMBYTES)
    with Gauge(str(Path(paths[0]).parent)) as gauge:
        for path in paths:
            numbytes = Path(path).stat().st_size
            place, stop = numbytes * rank // world, numbytes * (rank + 1) // world
            descriptor = os.open(path, os.O_RDONLY)
            while place < stop:
                place += os.preadv(descriptor, [buffer[: stop - place]], place)
            os.close(descriptor)
    return gauge.loaded


def distribute(
    shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int | None], folder: str, load: bool
) -> Measured:
    """PyTorch's distributed checkpoint of fp32 tensors, cut over all ranks.

    Args:
        shapes: by key.
        dims: dimension along which each is cut; None where every rank has it whole.
        load: instead of saving, into tensors that exist.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Replicate, Shard, zeros

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {
        key: zeros(shape, device_mesh=mesh, placements=[Replicate() if dims[key] is None else Shard(dims[key])])
        for key, shape in shapes.items()
    }
    with Gauge(folder) as gauge:
        if load:
            dcp.load(state, checkpoint_id=folder)
        else:
            dcp.save(state, checkpoint_id=folder)
    return gauge.loaded


class Gauge:
    """Measures what happens in it, from when all ranks are ready until this rank is done.

    While `watch` is off it tells seconds alone.

    Args:
        folder: opened files under it are counted.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder, self._watching = folder, _watching
        self._opened: set[str] = set()
        self._peak, self._own_reads, self._done = 0, 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._seconds: float | None = None

    def __enter__(self) -> Gauge:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already must not hide what the call takes
        if self._watching:
            _count_opened(self._folder, self._opened)
            _mapped.clear()
        dist.barrier()
        self._before = self._memory()
        self._own_reads, self._io = 0, io_of_self()
        if self._watching:
            self._watcher.start()
        self._started = time.perf_counter()
        return self

    def stop(self) -> None:
        """The time ends here, and what else is measured at the end."""
        self._seconds = time.perf_counter() - self._started

    def __exit__(self, *error: object) -> None:
        if self._seconds is None:
            self.stop()
        if self._watching:
            self._done.set()
            self._watcher.join()
            _count_opened(None, set())
        self._after = io_of_self()

    @property
    def measured(self) -> Measured:
        """All of it."""
        assert self._seconds is not None
        if not self._watching:
            return Measured(self._seconds)
        read, written = (after - before for after, before in zip(self._after, self._io, strict=True))
        return Measured(
            self._seconds,
            read - self._own_reads + sum(_mapped),
            written,
            len(self._opened) if self._folder else None,
            max(self._peak - self._before, 0),
        )

    @property
    def loaded(self) -> Measured:
        """Return the measures of work that writes no file: the bytes that it gives to the kernel go to other ranks."""
        return replace(self.measured, bytes_written=None)

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._memory())

    def _memory(self) -> int:
        status = Path("/proc/self/status").read_text()
        self._own_reads += len(status)
        return memory_in(status)


def memory_in(status: str) -> int:
    """Bytes of a process that no file backs, by its ``/proc/…/status``."""
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def io_of_self() -> tuple[int, int]:
    """Bytes that this process, with those that it has waited for, got from the kernel's reads and gave to its writes."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    return counts["rchar"], counts["wchar"]


_counted: tuple[str | None, set[str]] = (None, set())
_hooked = False


def _count_opened(folder: str | None, opened: set[str]) -> None:
    """From now on note what Python opens to read under a folder, and what ours uses of memory maps."""
    global _counted, _hooked
    _counted = (folder, opened)
    if not _hooked:
        _hooked = True
        sys.addaudithook(_note)
        _note_maps()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    folder, opened = _counted
    if event == "open" and folder is not None and isinstance(arguments[0], str | os.PathLike):
        path, flags = os.fspath(arguments[0]), arguments[2]
        if str(path).startswith(folder + os.sep) and flags & os.O_ACCMODE == os.O_RDONLY:
            opened.add(str(path))


def _note_maps() -> None:
    in_map = open_files.OpenFile.range

    def noting(file: Any, start: int, stop: int) -> torch.Tensor:
        if file._map is not None:
            _mapped.append(stop - start)
        return in_map(file, start, stop)

    open_files.OpenFile.range = noting  # type: ignore[method-assign, assignment]
