"""What a run was at when DeepSpeed saved it: counters, scheduler, loss scale, hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import SCALE_KEYS, LossScale, RunState
from ucp_deepspeed.checkpoint.deepspeed_files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed_zero import recognise
from ucp_deepspeed.checkpoint.torch_files import read_tensors, scalar_of


def read_run(files: DeepSpeedFiles) -> RunState:
    """Counters, scheduler and loss scale."""
    saved = files.model_states(0)
    return RunState(
        precision=files.precision,
        global_steps=saved["global_steps"],
        global_samples=saved.get("global_samples"),
        skipped_steps=saved["skipped_steps"],
        lr_scheduler=read_tensors(saved.get("lr_scheduler"), files.model_states_path(0, 0)),
        loss_scale=_read_loss_scale(files) if files.precision == "fp16" else None,
        ds_version=str(saved.get("ds_version", "unknown")),
    )


def _read_loss_scale(files: DeepSpeedFiles) -> LossScale | None:
    if files.partitioned:
        state, _ = files.optimizer_state(0, 0)
        scaler = state.get("loss_scaler")
        if scaler is None:
            return None
        values = {key: value for key, value in vars(scaler).items() if key not in ("dynamic", "dtype")}
        return LossScale(bool(state.get("dynamic_loss_scale", scaler.dynamic)), values)
    optimizer = files.model_states(0)["optimizer"] or {}
    if "cur_scale" not in optimizer:
        return None
    values = {key: optimizer[key] for key in SCALE_KEYS if key in optimizer}
    return LossScale(bool(optimizer["dynamic_loss_scale"]), values)


def hyperparameters(files: DeepSpeedFiles, rank: int) -> list[Mapping[str, Any]]:
    """The base optimizer's parameter groups on one model-parallel rank; rates that are tensors as numbers."""
    if files.partitioned:
        state, path = files.optimizer_state(rank, 0)
        groups = recognise(state, path).hyperparameters(state)
    else:
        saved, path = files.model_states(rank)["optimizer"], files.model_states_path(rank, 0)
        groups = list(saved.get("optimizer_state_dict", saved)["param_groups"]) if saved else []
    return [{key: _as_number(value, path) for key, value in group.items()} for group in groups]


def _as_number(value: Any, path: Path) -> Any:
    return (
        scalar_of(value, path) if isinstance(value, torch.Tensor) and value.numel() == 1 else read_tensors(value, path)
    )
