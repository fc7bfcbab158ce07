"""Megatron-Core's distributed checkpoint, for ``benchmark.py``: saved by ranks of torchrun, loaded by the benchmark's own.

Its writer starts processes, which the benchmark's ranks, being children themselves, may not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_ranks import Gauge, Measured

from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu


def load(shapes: Mapping[str, tuple[int, ...]], folder: str) -> Measured:
    """On each rank: three fp32 tensors for each parameter, cut along rows, into tensors that exist."""
    state = _state(shapes, dict.fromkeys(shapes, 0))
    from megatron.core import dist_checkpointing

    with Gauge(folder) as gauge:
        dist_checkpointing.load(state, folder)
    return gauge.loaded


def save(shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int | None], folder: str) -> None:
    """Save the benchmark's state. ``dims`` tells along which dimension ranks cut a tensor; None where each has it whole."""
    state = _state(shapes, dims)
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, folder)


def _state(shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int | None]) -> dict[str, Any]:
    run_megatron_on_cpu()
    torch.cuda.synchronize = lambda device=None: None  # which saving calls whatever the tensors' device
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size())
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {}
    for name, shape in shapes.items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            key, dim = f"{name}/{kind}", dims[name]
            if dim is None or shape[dim] % world:
                state[key] = ShardedTensor.from_rank_offsets(key, torch.zeros(shape), replica_id=rank)
            else:
                local = (*shape[:dim], shape[dim] // world, *shape[dim + 1 :])
                state[key] = ShardedTensor.from_rank_offsets(key, torch.zeros(local), (dim, rank, world))
    return state


if __name__ == "__main__":
    dist.init_process_group("gloo")
    described = json.loads(Path(sys.argv[2]).read_text())
    save({name: tuple(shape) for name, shape in described["shapes"].items()}, described["dims"], sys.argv[1])
