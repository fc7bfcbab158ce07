"""The part of ``benchmark.py`` for machines with GPUs: loads and saves of one rank for each GPU.

Without a GPU it runs on the stand-in device (`ucp_deepspeed.testing.device`): that shows that all of it runs, and its figures
mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmark_ranks as on_rank
import torch
from deepspeed.accelerator import get_accelerator

from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run

Row = tuple[str, str, float, int]
"""An operation, a way of it, the slowest rank's seconds (a median), and the bytes of all ranks."""


def seconds_of(work: Callable[[], object]) -> float:
    """On a rank: seconds until the device has done it too."""
    get_accelerator().synchronize()
    started = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - started


def load(folder: str, natively: bool) -> tuple[float, int]:
    """On a rank: seconds of a load, and the bytes that it read."""
    measured = None

    def work() -> None:
        nonlocal measured
        measured = on_rank.load_natively(folder) if natively else on_rank.load_directly(folder)

    seconds = seconds_of(work)
    assert measured is not None
    return seconds, measured.bytes_read or 0


def save(folder: str, background: bool) -> tuple[float, int]:
    """On a rank: seconds until a save lets training go on. Bytes are the files'."""
    return on_rank.save(folder, background, background).seconds, 0


def copy(paths: Sequence[str]) -> tuple[float, int]:
    """The limit, on a rank: read its share of files into two pinned buffers in turn, and copy these to the device."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    numel = on_rank.PART_NUMBYTES
    pinned = [torch.empty(numel, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    target = torch.empty(numel, dtype=torch.uint8, device=get_accelerator().current_device_name())
    copied, taken = [torch.Event(device=target.device) for _ in pinned], 0

    def work() -> None:
        nonlocal taken
        for path in paths[rank::count]:
            with Path(path).open("rb", buffering=0) as file:
                for turn in range(-(-Path(path).stat().st_size // numel)):
                    buffer, event = pinned[turn % 2], copied[turn % 2]
                    event.synchronize()
                    read = file.readinto(buffer.numpy())
                    target[:read].copy_(buffer[:read], non_blocking=True)
                    event.record()
                    taken += read

    return seconds_of(work), taken


def measure(size: dict[str, int], repeats: int, folder: Path) -> list[Row]:
    """Save and load a model of a size on all GPUs; ways of one operation take turns."""
    device = "cuda" if torch.cuda.is_available() else "standin"
    pool = RankPool(torch.cuda.device_count() or 2, most_runs=1000, device=device)
    run = Run("gpt", size=size, precision="bf16", zero={"stage": 1})
    sources = [str(folder / name) for name in ("stage1", "stage3", "save")]
    for source, stage in zip(sources, (1, 3), strict=False):
        pool.run(on_rank.build, Run("gpt", size=size, precision="bf16", zero={"stage": stage}), timeout=900.0)
        pool.run(on_rank.save, source, False, timeout=900.0)
    pool.run(on_rank.build, run, timeout=900.0)
    paths = [str(path) for path in Path(sources[0]).rglob("*optim_states.pt")]
    ways: dict[tuple[str, str], tuple[Any, ...]] = {
        ("resume, same topology", "ours"): (load, sources[0], False),
        ("resume, same topology", "DeepSpeed's own load"): (load, sources[0], True),
        ("resume, ZeRO-3 → ZeRO-1", "ours"): (load, sources[1], False),
        ("read the partitions", "pinned buffers (the limit)"): (copy, paths),
        ("save stall", "ours: asynchronous"): (save, sources[2], True),
        ("save stall", "DeepSpeed's native save"): (save, sources[2], False),
    }
    taken: dict[tuple[str, str], list[tuple[float, int]]] = {way: [] for way in ways}
    for _ in range(max(repeats, 1)):
        for way, call in ways.items():
            ranks = pool.run(*call, timeout=900.0)
            taken[way].append((max(seconds for seconds, _ in ranks), sum(numbytes for _, numbytes in ranks)))
    pool.close()
    return [(*way, statistics.median(s for s, _ in runs), runs[-1][1]) for way, runs in taken.items()]


def table_of(rows: Sequence[Row]) -> str:
    """One row a way; no rate where no bytes were counted."""
    lines = ["| operation | way | s | GB/s |", "| --- | --- | ---: | ---: |"]
    for operation, way, seconds, numbytes in rows:
        rate = f"{numbytes / seconds / 1e9:.2f}" if numbytes else ""
        lines.append(f"| {operation} | {way} | {seconds:.2f} | {rate} |")
    return "\n".join(lines) + "\n"
