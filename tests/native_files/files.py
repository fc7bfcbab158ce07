"""The files of all ranks, and the manifest of the save hook."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from native_files.described import (
    TIED,
    VERSION,
    Cut,
    Held,
    NativeModel,
    NativeRun,
    ds_config,
    given_groups,
    held_by,
    kept_parameters,
    local_of,
    of_stage,
    optimized_groups,
    padded,
    stage_layers,
)
from native_files.optimizers import optimizer_states, stage0_optimizer


def write_native(
    root: Path, model: NativeModel, run: NativeRun, tag: str = "global_step5", client_state: Any = None
) -> Path:
    """Write all files of all ranks and ``latest``; return the tag folder."""
    folder = root / tag
    folder.mkdir(parents=True)
    for stage in range(run.pp or 1):
        for tp_rank in range(run.tp):
            for name, saved in rank_files(model, run, stage, tp_rank, client_state).items():
                torch.save(saved, folder / name)
    (root / "latest").write_text(tag, encoding="utf-8")
    return folder


def rank_files(
    model: NativeModel, run: NativeRun, stage: int, tp_rank: int, client_state: Any = None
) -> dict[str, dict[str, Any]]:
    """Return names and contents of the files of one model-parallel rank: of all its data-parallel ranks, and of its layers."""
    part, mp_rank = of_stage(model, run, stage), stage * run.tp + tp_rank
    files: dict[str, dict[str, Any]] = {}
    for dp_rank in range(run.dp):
        held = held_by(part, run, tp_rank, dp_rank)
        if run.stage == 3 or dp_rank == 0:
            prefix = f"zero_pp_rank_{dp_rank}_" if run.stage == 3 else ""
            saved = model_states(part, run, held, tp_rank, dp_rank) | dict(client_state or {})
            files[f"{prefix}mp_rank_{mp_rank:02d}_model_states.pt"] = saved
        if run.partitioned:
            prefix = "bf16_" if run.precision == "bf16" else ""
            name = f"{prefix}zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
            files[name] = optimizer_states(part, run, held, dp_rank)
    if run.pp is not None:
        used_again = [layer for used in model.tied.values() for layer in used[1:]]
        for layer in stage_layers(model, run)[stage]:
            if layer not in used_again:
                files[f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt"] = layer_states(
                    model, run, layer, tp_rank
                )
    return files


def layer_states(model: NativeModel, run: NativeRun, layer: int, tp_rank: int) -> OrderedDict[str, Any]:
    """Return the content of a pipeline layer's file (``PipelineModule.save_state_dict``): the module's state dict, its tensors
    cloned."""
    prefix = next((f"{TIED}.{key}." for key, used in model.tied.items() if layer in used), f"{layer}.")
    return OrderedDict(
        (name.removeprefix(prefix), value)
        for name, value in _module(model, run, tp_rank).items()
        if name.startswith(prefix)
    )


PATTERNS: dict[Cut, dict[str, Any]] = {
    "replicated": {"pattern": "replicate"},
    "rows": {"pattern": "shard", "dim": 0},
    "columns": {"pattern": "shard", "dim": 1},
    "gate_up": {"pattern": "shard", "dim": 0, "parts": [1, 1]},
}
"""Patterns in a manifest."""


def add_manifest(folder: Path, model: NativeModel, run: NativeRun, *, layouts: bool = False) -> None:
    """Add the manifest that the save hook adds: names, by group and pipeline stage, and the files' sizes; see ``docs/format.md``.

    Args:
        layouts: record each parameter's kind and layout too; older manifests don't record all of it.
    """
    parts = [of_stage(model, run, stage) for stage in range(run.pp or 1)]
    tied = {key: f"{TIED}.{key}." for key in model.tied}
    names = [parameter.name for parameter in model.parameters] + list(model.buffers)
    manifest = {
        "format_version": 1,
        "topology": {"tp": run.tp, "pp": run.pp or 1, "dp": run.dp, "zero_stage": run.stage},
        "optimizer": run.kind,
        "parameter_groups": [given_groups(part, run) for part in parts],
        "layer_keys": {
            f"{model.tied[key][0]}.{name.removeprefix(prefix)}": name
            for key, prefix in tied.items()
            for name in names
            if name.startswith(prefix)
        },
        "parameters": {name: {} for name in names} | (_layouts(model, run) if layouts else {}),
        "same_numbers": True if layouts else None,
        "differing_copies": [] if layouts else None,
        "has_extra_states": False if layouts else None,
        "group_numbers": _group_numbers(parts, run) if layouts else None,
        "files": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "ucp_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _group_numbers(parts: Sequence[NativeModel], run: NativeRun) -> list[list[int | None]]:
    """Number the groups in the order in which the stages first train something in them."""
    numbers: dict[int, int] = {}
    found: list[list[int | None]] = []
    for part in parts:
        trained = {parameter.name for parameter in part.parameters if parameter.optimized}
        held = [not trained.isdisjoint(names) for names in given_groups(part, run)]
        found.append([numbers.setdefault(group, len(numbers)) if has else None for group, has in enumerate(held)])
    return found


def _layouts(model: NativeModel, run: NativeRun) -> dict[str, Any]:
    stages_of: dict[str, list[int]] = {}
    for stage in range(run.pp or 1):
        part = of_stage(model, run, stage)
        for name in [*(parameter.name for parameter in part.parameters), *part.buffers]:
            stages_of.setdefault(name, []).append(stage)
    found: dict[str, Any] = {
        parameter.name: {
            "kind": "trainable" if parameter.optimized else "frozen",
            "logical_shape": list(parameter.fp32.shape),
            "pattern": PATTERNS[parameter.cut],
            "local_shapes": [list(local_of(parameter, run, tp_rank).shape) for tp_rank in range(run.tp)],
            "stages": stages_of[parameter.name],
        }
        for parameter in model.parameters
    }
    for name, tensor in model.buffers.items():
        shape = list(tensor.shape)
        found[name] = {"kind": "buffer", "logical_shape": shape, "local_shapes": [shape], "stages": stages_of[name]}
    return found


def model_states(
    model: NativeModel, run: NativeRun, held: Sequence[Held], tp_rank: int, dp_rank: int
) -> dict[str, Any]:
    """Return the content of a model_states file (``engine.py::_common_checkpoint_state``); ``model`` is `of_stage`."""
    zero = run.stage > 0
    aside = [parameter for parameter in model.parameters if not parameter.optimized]
    shapes = OrderedDict((p.name, local_of(p, run, tp_rank).shape) for p in aside)
    fragments = OrderedDict((p.name, _frozen_fragment(local_of(p, run, tp_rank), run, dp_rank)) for p in aside)
    described = [
        OrderedDict((name, local_of(model[name], run, tp_rank).shape) for name in entry.names) for entry in held
    ]
    with_frozen = run.stage >= 2 and not run.exclude_frozen
    return {
        "module": _module(model, run, tp_rank) if run.pp is None else None,
        "buffer_names": list(model.buffers),
        "optimizer": None if zero else stage0_optimizer(model, run, held),
        "param_shapes": described if zero else None,
        "frozen_param_shapes": shapes if with_frozen else None,
        "shared_params": (dict(model.aliases) if tp_rank == dp_rank == 0 else {}) if zero else None,
        "frozen_param_fragments": fragments if with_frozen else None,
        "lr_scheduler": {"last_batch_iteration": run.steps},
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": run.steps,
        "global_samples": run.steps * 4 * run.dp,
        "dp_world_size": run.dp,
        "mp_world_size": run.tp * (run.pp or 1),
        "checkpoint_parallel_dimensions": {"pp_degree": run.pp or 1, "tp_degree": run.tp},
        "ds_config": ds_config(run),
        "ds_version": VERSION,
    }


def _module(model: NativeModel, run: NativeRun, tp_rank: int) -> OrderedDict[str, Any]:
    """Return the module's state dict. Weights of flattening optimizers are views of one storage per group; in stage 3 they are
    empty."""
    module: OrderedDict[str, Any] = OrderedDict()
    for parameter in kept_parameters(model, run):
        local = local_of(parameter, run, tp_rank).to(run.dtype)
        module[parameter.name] = torch.empty(0, dtype=run.dtype) if run.stage == 3 else local.clone()
    if run.kind in ("fused", "zero", "bf16") and run.stage != 3 and run.pp is None:
        for names in optimized_groups(model, run):
            flat = torch.cat([module[name].flatten() for name in names])
            for name, view in zip(names, flat.split([module[name].numel() for name in names]), strict=True):
                module[name] = view.view(module[name].shape)
    for alias, owner in model.aliases.items():
        module[alias] = module[owner]
    module.update((name, tensor.clone()) for name, tensor in model.buffers.items())
    module.update((name, None) for name in model.extra_state)
    return module


def _frozen_fragment(local: torch.Tensor, run: NativeRun, dp_rank: int) -> torch.Tensor:
    weight = local.to(run.dtype)
    if run.stage < 3 or not weight.numel():
        return weight
    return padded(weight.flatten(), run.dp).chunk(run.dp)[dp_rank].clone()
