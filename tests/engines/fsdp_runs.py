"""Runs of torch's FSDP2 that save with DCP, and what torch itself reads from these folders: called on every rank of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from deepspeed import comm as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of

STEPS = 2
"""Steps that a run has taken when it saves."""

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def sharded(mesh: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The small model on one of FSDP2's meshes, of all ranks."""
    model: nn.Module = build_mlp(vocabulary=VOCABULARY, dtype=dtype)
    count = dist.get_world_size()
    if mesh == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (count,)))  # type: ignore[return-value]
    if mesh == "hsdp":
        names = ("replicate", "shard")
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, count // 2), mesh_dim_names=names))  # type: ignore[return-value]
    whole = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("shard", "tp"))
    # The embedding is cut along both dimensions, the last layer twice along the first.
    gathered = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("embedding", "linear_out")}
    parallelize_module(model, whole["tp"], gathered)
    return fully_shard(model, mesh=whole["shard"])  # type: ignore[return-value]


def optimizer_of(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    """Two groups: matrices, and the rest without weight decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    made: torch.optim.Optimizer = getattr(torch.optim, kind)(groups, lr=0.01, **options)
    return made


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule as torchtitan's: a function of the step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take one step; all ranks have the same batch."""
    batch = batch_of(Run(), number)
    model(batch[:, :-1], batch[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: str, form: str, mesh: str = "fsdp", kind: str = "AdamW", dtype: torch.dtype = torch.float32) -> None:
    """On a rank: train, and save in one of the forms in which programs do."""
    reset_parallel_state()
    model = sharded(mesh, dtype)
    optimizer = optimizer_of(model, kind)
    scheduler = schedule_of(optimizer)
    for number in range(1, STEPS + 1):
        step(model, optimizer, number)
        scheduler.step()
    weights = get_model_state_dict(model)
    nested, flat = (get_optimizer_state_dict(model, optimizer, options=options) for options in (None, FLAT))
    rest = {"lr_scheduler": scheduler.state_dict(), "train_state": {"step": torch.tensor(STEPS), "seen": [3, "a"]}}
    wrapped = {f"_orig_mod.{name}": value for name, value in weights.items()}
    states: Mapping[str, dict[str, Any]] = {
        "nested": {"model": weights, "optim": nested} | rest,
        "app": {"app": {"model": weights, "optim": nested}} | rest,
        "flat": {"model": weights, "optimizer": flat} | rest,
        "top": {**weights, "optimizer": flat} | rest,
        "wrapped": {"model": wrapped, "optim": nested} | rest,
        "weights": dict(weights),
        "numbered": {"model": weights, "optim": optimizer.state_dict()} | rest,
    }
    dcp.save(states[form], checkpoint_id=folder)


def read_by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, whole, as ``dcp.load`` reads them; by key."""
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in held.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
