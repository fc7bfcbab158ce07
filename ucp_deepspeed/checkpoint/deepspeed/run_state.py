"""The state of a run when DeepSpeed saved it: counters, scheduler, loss scale, hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import SCALE_KEYS, Deferred, Differing, LossScale, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.deepspeed.contents import value_of
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.stage0_slots import stage0_form
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import Slot, settings_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import read_tensors
from ucp_deepspeed.checkpoint.torch_files.unpickling import DynamicLossScaler, LossScaler
from ucp_deepspeed.errors import DamagedCheckpointError


def read_run(files: DeepSpeedFiles) -> RunState:
    """Read counters, scheduler and loss scale."""
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
        file = files.optimizer_state(0, 0)
        return loss_scale_of(file.saved, file.path)
    optimizer, path = files.whole_optimizer(0)
    if not optimizer or stage0_form(optimizer, path) == "plain":
        return None
    if "cur_scale" not in optimizer:
        raise DamagedCheckpointError(f"{path} lacks 'cur_scale', the loss scale of its optimizer in fp16")
    values = {key: optimizer[key] for key in SCALE_KEYS if key in optimizer}
    return LossScale(bool(value_of(optimizer, "dynamic_loss_scale", "the key", path)), values)


def loss_scale_of(saved: Mapping[str, Any], path: Path) -> LossScale:
    """Return the loss scale in the state of a ZeRO optimizer."""
    scaler = saved.get("loss_scaler")
    if scaler is None:
        raise DamagedCheckpointError(f"{path} lacks 'loss_scaler', which ZeRO in fp16 has in any version")
    values = {key: value for key, value in vars(scaler).items() if key not in ("dynamic", "dtype")}
    return LossScale(bool(saved.get("dynamic_loss_scale", isinstance(scaler, DynamicLossScaler))), values)


def scaler_of(scale: LossScale, config: Any) -> LossScaler:
    """Return the object in which ZeRO's optimizers keep a loss scale: the inverse of `loss_scale_of`.

    Args:
        config: the DeepSpeed config, if one is known. Values that the source's class doesn't keep are those that an engine begins
            with (``runtime/fp16/loss_scaler.py``).
    """
    if not scale.dynamic:
        scaler = LossScaler()
        vars(scaler).update(cur_scale=scale.values["cur_scale"], dynamic=False)
        return scaler
    given = config.get("fp16") if isinstance(config, Mapping) else None
    given = given if isinstance(given, Mapping) else {}
    told = {key: value for key, value in given.items() if isinstance(value, (int, float))}  # not "auto"
    shift = told.get("hysteresis", 2)
    begun = {"cur_iter": 0, "last_overflow_iter": -1, "scale_factor": 2.0}
    begun |= {"scale_window": told.get("loss_scale_window", 1000), "min_scale": told.get("min_loss_scale", 1)}
    begun |= {"delayed_shift": shift, "cur_hysteresis": shift, "raise_error_at_min_scale": True}
    begun |= {"consecutive_hysteresis": told.get("consecutive_hysteresis", False)}
    scaler = DynamicLossScaler()
    vars(scaler).update({**begun, **scale.values, "dynamic": True, "dtype": torch.float16})
    return scaler


def hyperparameters(files: DeepSpeedFiles, rank: int) -> list[Mapping[str, Any]]:
    """Read the base optimizer's parameter groups on one model-parallel rank, without names. Rates in tensors become numbers."""
    base, path = _base_optimizer(files, rank)
    return [settings_in(group, path) for group in base.get("param_groups", ())]


def with_all_states(slots: list[Slot], files: DeepSpeedFiles, rank: int) -> list[Slot]:
    """Return the slots of a model-parallel rank. The first one refuses data that the base optimizer keeps under keys of its own,
    among the states of parameters and beside them."""
    base, path = _base_optimizer(files, rank)
    states = [str(key) for key in base.get("state", ()) if type(key) is not int]
    others = [key for key in base if key not in ("state", "param_groups")]
    if not slots or not (states or others):
        return slots
    beside = {key: f"optimizer state {key!r} is of no parameter ({path})" for key in (*states, *others)}
    return [replace(slots[0], refused={**slots[0].refused, **beside}), *slots[1:]]


def _base_optimizer(files: DeepSpeedFiles, rank: int) -> tuple[Mapping[str, Any], Path]:
    """Return states and groups in the first file of a model-parallel rank; nothing for elastic files, which differ."""
    if files.partitioned:
        file = files.optimizer_state(rank, 0)
        return file.base, file.path
    saved, path = files.whole_optimizer(rank)
    return saved.get("optimizer_state_dict", saved), path


def number_groups(stages: Sequence[Sequence[Mapping[str, Any] | None]]) -> list[list[int | None]]:
    """Number the groups of all stages as groups of the whole model: those with the same hyper-parameters are one.

    Args:
        stages: for each pipeline stage and group its hyper-parameters; None for a group without trained parameters there. Such a
            group gets no number.
    """
    known: list[Mapping[str, Any]] = []
    numbers: list[list[int | None]] = []
    for stage, groups in enumerate(stages):
        numbers.append([])
        for settings in groups:
            same = next((number for number, other in enumerate(known) if stage and same_value(other, settings)), None)
            if settings is not None and same is None:
                same = len(known)
                known.append(settings)
            numbers[-1].append(same)
    return numbers


def join_groups(
    firsts: Sequence[int],
    named: Sequence[Sequence[Sequence[str]]],
    numbers: Sequence[Sequence[int | None]],
    read: Mapping[str, int | None],
    settings_of: Callable[[int, int], Mapping[str, Any]],
    differing_of: Callable[[int, int], Differing],
) -> tuple[ParameterGroup, ...]:
    """Join the stages' groups into the parameter groups of the whole model.

    Args:
        firsts: first model-parallel rank of each pipeline stage.
        named: for each stage and group the names in it.
        numbers: see `number_groups`.
        read: by name, the stage whose copy is read; on other stages the name doesn't count. None if only one stage has it.
        settings_of: reads the hyper-parameters of a model-parallel rank's group; called when they are looked into.
        differing_of: reads the hyper-parameters that differ between partitions of the stage; called then too.
    """
    groups: dict[int, ParameterGroup] = {}
    for stage, (first, held, numbered) in enumerate(zip(firsts, named, numbers, strict=True)):
        for index, (names, number) in enumerate(zip(held, numbered, strict=True)):
            if number is not None:
                known = groups.get(number) or ParameterGroup((), Deferred(partial(settings_of, first, index)))
                own = [name for name in names if read.get(name) in (None, stage)]
                differing = Deferred(partial(_either, known.differing, partial(differing_of, first, index)))
                groups[number] = replace(known, names=tuple(dict.fromkeys((*known.names, *own))), differing=differing)
    return tuple(group for group in groups.values() if group.names)


def _either(known: Differing, read: Callable[[], Differing]) -> Differing:
    return {**read(), **known}
