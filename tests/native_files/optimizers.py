"""Saved optimizer states, one function for each class of optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from native_files.described import (
    VERSION,
    Held,
    NativeModel,
    NativeRun,
    ds_config,
    given_groups,
    optimized_groups,
    shares,
)


def optimizer_states(model: NativeModel, run: NativeRun, held: Sequence[Held], dp_rank: int) -> dict[str, Any]:
    """Return the content of an optim_states file."""
    state = _zero3_state(run, held) if run.stage == 3 else _zero12_state(model, run, held, dp_rank)
    return {"optimizer_state_dict": state, "ds_config": ds_config(run), "ds_version": VERSION}


def hyperparameters(group: int, run: NativeRun) -> dict[str, Any]:
    """Return hyper-parameters of one parameter group, as torch's AdamW lists them; each group has a weight decay of its own."""
    listed: dict[str, Any] = torch.optim.AdamW([torch.zeros(1)], lr=1e-3).state_dict()["param_groups"][0]
    return listed | {"weight_decay": 0.1 / (group + 1)} | ({"step": 0} if run.integer_step else {})


def _step(run: NativeRun) -> Any:
    """Return the optimizer's ``step``: the stage-0 wrappers step once in their constructor."""
    steps = run.steps + (run.kind in ("unfused", "fused"))
    return steps if run.integer_step else torch.tensor(float(steps))


def _entry(run: NativeRun, held: Held) -> dict[str, Any]:
    """Return one entry of a torch optimizer's ``state``."""
    states = {key: tensor for key, tensor in held.states.items() if key != "fp32"}
    return {"step": _step(run), **states} if states else {}


def _torch_state(run: NativeRun, held: Sequence[Held], params: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return ``state_dict()`` of a torch optimizer that holds the entries of ``params``, one after the other."""
    indices = [index for group in params for index in group]
    entries = {index: _entry(run, entry) for index, entry in zip(indices, held, strict=True) if len(entry.states) > 1}
    groups = [hyperparameters(group, run) | {"params": list(held_)} for group, held_ in enumerate(params)]
    return {"state": entries, "param_groups": groups}


def _of_group(held: Sequence[Held]) -> list[list[int]]:
    """Return positions of the entries of each parameter group."""
    groups = range(max((entry.group for entry in held), default=-1) + 1)
    return [[index for index, entry in enumerate(held) if entry.group == group] for group in groups]


def _scale(run: NativeRun) -> dict[str, Any]:
    """Return the loss scaling as the stage-0 wrappers write it."""
    dynamic = run.precision == "fp16" and run.dynamic_scale
    values: dict[str, Any] = {
        "dynamic_loss_scale": dynamic,
        "cur_scale": 256.0 if dynamic else 1.0,
        "cur_iter": run.steps,
    }
    return values | ({"last_overflow_iter": 1, "scale_factor": 2.0, "scale_window": 1000} if dynamic else {})


def _scaler(run: NativeRun) -> Any:
    """Return the loss scaling as the ZeRO optimizers write it: an object of DeepSpeed's own class."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    if run.precision != "fp16" or not run.dynamic_scale:
        return LossScaler(scale=1.0)
    scaler = DynamicLossScaler(2.0**8, 1000, 1, 2, False)
    scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = run.steps, 1, 1
    return scaler


def stage0_optimizer(model: NativeModel, run: NativeRun, held: Sequence[Held]) -> dict[str, Any]:
    if run.kind == "plain":
        return _plain_optimizer(model, run, held)
    if run.kind == "bf16":
        return _zero12_state(model, run, held, dp_rank=0)
    base = _torch_state(run, held, _of_group(held))
    masters = [entry.states["fp32"] for entry in held]
    if run.kind == "fused":
        scale = _scale(run) if run.precision == "fp16" else {}
        return {**scale, "optimizer_state_dict": base, "fp32_groups_flat": masters, "clip_grad": 1.0}
    groups = [[masters[index] for index in group] for group in _of_group(held)]
    return {**_scale(run), "optimizer_state_dict": base, "fp32_groups": groups}


def _plain_optimizer(model: NativeModel, run: NativeRun, held: Sequence[Held]) -> dict[str, Any]:
    """Return the state of a torch optimizer. It numbers every parameter that it was given, also frozen ones, which have no
    state."""
    groups = given_groups(model, run)
    numbered = [name for names in groups for name in names]
    entries = {numbered.index(entry.names[0]): _entry(run, entry) for entry in held if len(entry.states) > 1}
    starts = [sum(map(len, groups[:group])) for group in range(len(groups))]
    listed = [list(range(start, start + len(names))) for start, names in zip(starts, groups, strict=True)]
    described = [hyperparameters(group, run) | {"params": params} for group, params in enumerate(listed)]
    return {"state": entries, "param_groups": described}


def _zero12_state(model: NativeModel, run: NativeRun, held: Sequence[Held], dp_rank: int) -> dict[str, Any]:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    mappings = [_slice_mapping(model, run, entry, group) for group, entry in enumerate(held)]
    base: Any = _torch_state(run, held, _of_group(held))
    common: dict[str, Any] = {"clip_grad": 1.0, "partition_count": [run.dp] * len(held), "ds_version": VERSION}
    if run.kind == "bf16":
        last = dp_rank == run.dp - 1
        return common | {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": [entry.states["fp32"] for entry in held],
            "group_paddings": [last * (entry.states["fp32"].numel() * run.dp - entry.unpadded) for entry in held],
            "param_slice_mappings": mappings,
        }
    lean = [entry.states["fp32"].numel() - entry.end_padding for entry in held]
    more = {}
    if run.elastic:
        base = [_lean_entry(_entry(run, entry), length) for entry, length in zip(held, lean, strict=True)]
        more = {"base_optimizer_state_step": 0} if run.integer_step else {}
    scaler = _scaler(run)
    return {
        **common,
        **more,
        "loss_scaler": scaler,
        "dynamic_loss_scale": scaler.dynamic,
        "overflow": False,
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": [
            entry.states["fp32"][:length] for entry, length in zip(held, lean, strict=True)
        ],
        "zero_stage": ZeroStageEnum(run.stage),
        "group_paddings": [entry.end_padding for entry in held],
        "param_alignment_paddings": [list(entry.gaps) for entry in held],
        "param_slice_mappings": mappings,
    }


def _lean_entry(entry: Mapping[str, Any], length: int) -> dict[str, Any]:
    lean = {key: value[:length] for key, value in entry.items() if isinstance(value, torch.Tensor) and value.ndim}
    return dict(entry) | lean


def _slice_mapping(model: NativeModel, run: NativeRun, held: Held, group: int) -> OrderedDict[str, Any]:
    """Return ``param_slice_mappings`` of one group: with round robin, and no gaps, DeepSpeed writes the mappings of another
    order."""
    from deepspeed.utils.tensor_fragment import fragment_address

    user_order = optimized_groups(model, run)[group]
    laid = list(held.names) if any(held.gaps) else user_order
    gaps = held.gaps if any(held.gaps) else (0,) * len(laid)
    length = held.states["fp32"].numel()
    begin = 0
    found: dict[str, Any] = {}
    for name, gap in zip(laid, gaps, strict=True):
        end = begin + shares(model[name].fp32, model[name].cut, run.tp)[0].numel()
        low, high = max(begin, held.start), min(end, held.start + length)
        if low < high:
            found[name] = fragment_address(numel=high - low, start=low - held.start)
        begin = end + gap
    return OrderedDict((name, found[name]) for name in user_order if name in found)


def _zero3_state(run: NativeRun, held: Sequence[Held]) -> dict[str, Any]:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    scaler = _scaler(run)
    return {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": scaler,
        "dynamic_loss_scale": scaler.dynamic,
        "overflow": False,
        "partition_count": run.dp,
        "optimizer_state_dict": _torch_state(run, held, _of_group(held)),
        "fp32_flat_groups": [entry.states["fp32"] for entry in held],
    }
