"""What the ranks of ``benchmark.py`` do: each function is called on all of them at once, and returns this rank's figures."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ucp_deepspeed import wait_for_save
from ucp_deepspeed.config import SaveConfig, UniversalCheckpointConfig
from ucp_deepspeed.engine.background import BUFFERS
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

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
"""What DeepSpeed's converter must be told of Megatron-Core's GPT."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One call on one rank: seconds, bytes read, and bytes of memory beyond those before and after the call."""

    seconds: float
    bytes_read: int
    extra_memory: int
    files: int = 0


_engine: Any = None
_run: Run | None = None
_watching = True


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


def watch_memory(on: bool) -> None:
    """Whether the following calls tell the memory that they take."""
    global _watching
    _watching = on


def release() -> None:
    """Let go of the engine."""
    global _engine
    if _engine is not None:
        _engine.destroy()
        _engine = None
        gc.collect()


def save(folder: str, hook: bool, background: bool = False) -> Measured:
    """``engine.save_checkpoint``, with the package's hook or without; in the background the call alone counts."""
    assert _run is not None
    info = PATTERNS | {"original_vocab_size": _run.size["vocabulary"]}
    _engine.universal_checkpoint_config = UniversalCheckpointConfig(
        enabled=hook, save=SaveConfig(asynchronous=background)
    )
    with measured() as figures:
        _engine.save_checkpoint(folder, tag=TAG, client_state={"universal_checkpoint_info": info})
    wait_for_save()
    return figures()


def copy_state() -> Measured:
    """The limit of saving in the background: what this rank's last such save took, copied once into memory that exists."""
    import numpy as np

    sources = [buffer.numpy() for buffer in getattr(_engine, BUFFERS).taken]
    targets = [np.full_like(source, 1) for source in sources]
    with measured() as figures:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
    return figures()


def load_directly(folder: str) -> Measured:
    """The package's load, also where nothing has changed."""
    _engine.universal_checkpoint_config = UniversalCheckpointConfig(enabled=True, load="always")
    with measured() as figures:
        path, _ = _engine.load_checkpoint(folder, tag=TAG)
    assert path is not None
    report = _engine.universal_checkpoint_report
    return figures(report.bytes_read, report.files)


def load_natively(folder: str, universal: bool = False) -> Measured:
    """DeepSpeed's own load: of its own files, or of what ``ds_to_universal`` made of them."""
    _engine.universal_checkpoint_config = UniversalCheckpointConfig()
    _engine._config.load_universal_checkpoint = universal
    try:
        with measured() as figures:
            path, _ = _engine.load_checkpoint(folder, tag=TAG)
    finally:
        _engine._config.load_universal_checkpoint = False
    assert path is not None
    return figures()


def copy_mapped(paths: list[str]) -> Measured:
    """The limit: this rank's share of the bytes of some files, copied once from memory maps into memory that exists."""
    import numpy as np

    maps = [torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")) for path in paths]
    world, rank = dist.get_world_size(), dist.get_rank()
    shares = [held.tensor_split(world)[rank] for held in maps]
    total = sum(share.numel() for share in shares)
    target = torch.zeros(min(total, LIMIT_NUMBYTES), dtype=torch.uint8)
    with measured() as figures:
        place = 0
        for part in (part for share in shares for part in share.split(PART_NUMBYTES)):
            place = 0 if place + part.numel() > target.numel() else place
            target[place : place + part.numel()].copy_(part)
            place += part.numel()
    return figures(total, len(paths))


def distribute(
    shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int | None], folder: str, load: bool
) -> Measured:
    """PyTorch's distributed checkpoint of the same state: three fp32 tensors for each parameter, cut over all ranks.

    Args:
        dims: dimension along which each is cut; None where every rank has it whole.
        load: instead of saving, into tensors that exist.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Replicate, Shard, zeros

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {
        f"{name}/{kind}": zeros(
            shape, device_mesh=mesh, placements=[Replicate() if dims[name] is None else Shard(dims[name])]
        )
        for name, shape in shapes.items()
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
    }
    with measured() as figures:
        if load:
            dcp.load(state, checkpoint_id=folder)
        else:
            dcp.save(state, checkpoint_id=folder)
    return figures()


@contextmanager
def measured() -> Iterator[Callable[..., Measured]]:
    """From when all ranks are ready until this rank is done. Memory counts while `watch_memory` is on."""
    gc.collect()
    dist.barrier()
    before, read, peak, done = _memory(), _characters_read(), [0], threading.Event()

    def watch() -> None:
        while _watching and not done.wait(0.002):
            peak[0] = max(peak[0], _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    ended: list[tuple[float, int]] = []

    def figures(bytes_read: int | None = None, files: int = 0) -> Measured:
        seconds, characters = ended[0]
        extra = max(peak[0] - max(before, _memory()), 0)
        return Measured(seconds, characters if bytes_read is None else bytes_read, extra, files)

    try:
        yield figures
    finally:
        ended.append((time.perf_counter() - started, _characters_read() - read))
        done.set()
        watcher.join()


def _memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def _characters_read() -> int:
    """Bytes that this process has asked the kernel for; what it reads through memory maps isn't among them."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
