"""An oracle: write DeepSpeed's native checkpoint files by brute force, from whole tensors.

Everything is plain ``cat``, ``pad`` and ``chunk`` on real tensors. It shares no geometry with the package, so that the two can be
checked against each other. Padding is NaN wherever DeepSpeed doesn't promise a value, so that any leak shows.

File names, keys, types and order: DeepSpeed 0.19.8, ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``, ``runtime/bf16_optimizer.py``, ``runtime/fp16``, ``runtime/pipe/module.py``.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch

Cut = Literal["replicated", "rows", "columns", "gate_up"]
"""The way in which tensor parallelism shards a parameter: not at all, along dimension 0 or 1, or each half of dimension 0 on its
own."""

Optimizer = Literal["plain", "unfused", "fused", "zero", "bf16"]
"""Class of the engine's optimizer: a torch optimizer, ``FP16_UnfusedOptimizer``, ``FP16_Optimizer``, one of the ZeRO
optimizers (by stage), or ``BF16_Optimizer``."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VERSION = "0.19.8"
TIED = "tied_modules"


@dataclass(frozen=True)
class NativeParameter:
    """One whole parameter.

    Attributes:
        name: as in the model's ``state_dict``; in a pipeline ``{layer}.{local name}`` or ``tied_modules.{key}.{local name}``.
        fp32: its master weight.
        states: optimizer states of the same shape (``exp_avg``, …).
        cut: see `Cut`.
        frozen: whether it isn't trained; then its weight is ``fp32`` rounded to the run's precision.
    """

    name: str
    fp32: torch.Tensor
    states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cut: Cut = "replicated"
    frozen: bool = False

    @property
    def optimized(self) -> bool:
        """Return whether the optimizer keeps it: DeepSpeed treats parameters without elements as frozen."""
        return not self.frozen and self.fp32.numel() > 0


@dataclass(frozen=True)
class NativeModel:
    """The model to save.

    Attributes:
        parameters: in the model's order.
        buffers: persistent buffers, the same on every rank.
        aliases: names of tied parameters → the name under which they are kept.
        extra_state: keys of the module's state dict whose value is None.
        layers: number of a pipeline's layers, including layers that hold nothing.
        tied: key of a pipeline's tied module → the layers that use it. The first has a file. The others use a function of their
            own, and have no file.
    """

    parameters: tuple[NativeParameter, ...]
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra_state: tuple[str, ...] = ()
    layers: int = 0
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NativeParameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)


@dataclass(frozen=True)
class NativeRun:
    """The settings of the run that saves. The defaults are DeepSpeed's.

    Attributes:
        pp: pipeline-parallel size; None for a plain engine, 1 for a pipeline engine with one stage.
        parts: number of layers of each pipeline stage; by default as even as possible, with one more on the first stages.
        groups: names of each parameter group, frozen ones included where the user passed them; by default all trainable
            parameters in one group.
        steps: optimizer steps taken; before the first one torch optimizers have no state.
        integer_step: ``step`` is a Python int, as FusedAdam and DeepSpeedCPUAdam keep it; otherwise a 0-d tensor.
        dynamic_scale: fp16 only: the loss scale adapts.
        exclude_frozen: the argument ``exclude_frozen_parameters`` of ``save_checkpoint``.
    """

    tp: int = 1
    dp: int = 1
    stage: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Optimizer | None = None
    groups: tuple[tuple[str, ...], ...] | None = None
    sub_group_size: int = 10**9
    round_robin: bool = False
    parameter_alignment: bool = False
    elastic: bool = False
    steps: int = 5
    integer_step: bool = False
    dynamic_scale: bool = True
    exclude_frozen: bool = False
    pp: int | None = None
    parts: tuple[int, ...] | None = None

    @property
    def kind(self) -> Optimizer:
        """The optimizer's class; by default the one that the stage and precision lead to with a torch optimizer."""
        if self.optimizer is not None:
            return self.optimizer
        if self.stage:
            return "zero"
        if self.precision == "bf16" and self.pp is not None:
            return "bf16"
        return "plain" if self.precision == "fp32" else "unfused"

    @property
    def partitioned(self) -> bool:
        """Return whether the data-parallel ranks partition the optimizer's state, and write files of their own."""
        return self.stage > 0 or self.kind == "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that the model computes with."""
        return DTYPES[self.precision]

    def __str__(self) -> str:
        stages = "" if self.pp is None else f"pp{self.pp}"
        return f"tp{self.tp}{stages}dp{self.dp}z{self.stage}-{self.kind}-{self.precision}"


@dataclass(frozen=True)
class Held:
    """One flat buffer of a rank and its optimizer states.

    Attributes:
        names: names of the parameters in it, in flat order.
        group: the parameter group.
        states: ``fp32`` and the optimizer's states → the buffer; NaN where there is padding.
        start: position of the buffer's first element in the group's whole flat buffer; 0 unless stage 1 or 2.
        unpadded: length of the group's whole flat buffer without its end padding.
        gaps: alignment padding after each parameter.
    """

    names: tuple[str, ...]
    group: int
    states: Mapping[str, torch.Tensor]
    start: int = 0
    unpadded: int = 0
    gaps: tuple[int, ...] = ()

    @property
    def end_padding(self) -> int:
        """Number of elements of the buffer that lie behind the group's last element."""
        length = self.states["fp32"].numel()
        return min(max(self.start + length - self.unpadded, 0), length)


def shares(whole: torch.Tensor, cut: Cut, degree: int) -> list[torch.Tensor]:
    """Return the part of a whole tensor that each tensor-parallel rank holds."""
    if cut == "replicated":
        return [whole] * degree
    if cut == "gate_up":
        halves = zip(*(half.chunk(degree, 0) for half in whole.chunk(2, 0)), strict=True)
        return [torch.cat(pair, 0) for pair in halves]
    return [part.contiguous() for part in whole.chunk(degree, 0 if cut == "rows" else 1)]


def stage_layers(model: NativeModel, run: NativeRun) -> list[range]:
    """Return the layers of each pipeline stage."""
    assert run.pp is not None
    even, more = divmod(model.layers, run.pp)
    parts = run.parts or tuple(even + (stage < more) for stage in range(run.pp))
    assert (len(parts), sum(parts)) == (run.pp, model.layers), f"{parts} for {run.pp} stages of {model.layers} layers"
    return [range(sum(parts[:stage]), sum(parts[: stage + 1])) for stage in range(run.pp)]


def of_stage(model: NativeModel, run: NativeRun, stage: int) -> NativeModel:
    """Return the part of the model that one pipeline stage holds, in the order of its modules: tied modules come first. For a
    plain run, return the whole model."""
    if run.pp is None:
        return model
    layers = stage_layers(model, run)[stage]
    prefixes = [f"{TIED}.{key}." for key, used in model.tied.items() if set(used) & set(layers)]
    prefixes += [f"{layer}." for layer in layers]
    kept = [parameter for prefix in prefixes for parameter in model.parameters if parameter.name.startswith(prefix)]
    buffers = {name: value for prefix in prefixes for name, value in model.buffers.items() if name.startswith(prefix)}
    return replace(model, parameters=tuple(kept), buffers=buffers)


def held_by(model: NativeModel, run: NativeRun, tp_rank: int, dp_rank: int) -> list[Held]:
    """Return the optimizer's buffers on one rank, in the order in which its files list them; ``model`` is `of_stage`."""
    held: list[Held] = []
    for group, names in enumerate(optimized_groups(model, run)):
        local = {name: _local_states(model[name], run, tp_rank) for name in names}
        if run.kind in ("plain", "unfused"):
            held += [Held((name,), group, states) for name, states in local.items()]
        elif run.kind == "fused":
            flat = {
                key: torch.cat([states[key].flatten() for states in local.values()])
                for key in next(iter(local.values()))
            }
            held.append(Held(tuple(local), group, flat))
        elif run.stage == 3:
            held += _sub_groups(local, group, run, dp_rank)
        else:
            held.append(_partition(local, group, run, dp_rank))
    return held


def kept_parameters(model: NativeModel, run: NativeRun) -> list[NativeParameter]:
    """Return the parameters in the module's state dict: one without elements isn't left out with the frozen ones."""
    return [parameter for parameter in model.parameters if not (run.exclude_frozen and parameter.frozen)]


def optimized_groups(model: NativeModel, run: NativeRun) -> list[list[str]]:
    """Return names of the parameters that the optimizer keeps, by group, in the user's order."""
    return [[name for name in names if model[name].optimized] for names in _given_groups(model, run)]


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
        "parameter_groups": [_given_groups(part, run) for part in parts],
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
        held = [not trained.isdisjoint(names) for names in _given_groups(part, run)]
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
            "local_shapes": [list(_local(parameter, run, tp_rank).shape) for tp_rank in range(run.tp)],
            "stages": stages_of[parameter.name],
        }
        for parameter in model.parameters
    }
    for name, tensor in model.buffers.items():
        shape = list(tensor.shape)
        found[name] = {"kind": "buffer", "logical_shape": shape, "local_shapes": [shape], "stages": stages_of[name]}
    return found


def ds_config(run: NativeRun) -> dict[str, Any]:
    """Return the DeepSpeed config of the run."""
    config: dict[str, Any] = {"train_batch_size": 4 * run.dp, "zero_optimization": {"stage": run.stage}}
    if run.round_robin:
        config["zero_optimization"]["round_robin_gradients"] = True
    if run.precision != "fp32":
        config[run.precision] = {"enabled": True}
    return config


def model_states(
    model: NativeModel, run: NativeRun, held: Sequence[Held], tp_rank: int, dp_rank: int
) -> dict[str, Any]:
    """Return the content of a model_states file (``engine.py::_common_checkpoint_state``); ``model`` is `of_stage`."""
    zero = run.stage > 0
    aside = [parameter for parameter in model.parameters if not parameter.optimized]
    shapes = OrderedDict((p.name, _local(p, run, tp_rank).shape) for p in aside)
    fragments = OrderedDict((p.name, _frozen_fragment(_local(p, run, tp_rank), run, dp_rank)) for p in aside)
    described = [OrderedDict((name, _local(model[name], run, tp_rank).shape) for name in entry.names) for entry in held]
    with_frozen = run.stage >= 2 and not run.exclude_frozen
    return {
        "module": _module(model, run, tp_rank) if run.pp is None else None,
        "buffer_names": list(model.buffers),
        "optimizer": None if zero else _stage0_optimizer(model, run, held),
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


def optimizer_states(model: NativeModel, run: NativeRun, held: Sequence[Held], dp_rank: int) -> dict[str, Any]:
    """Return the content of an optim_states file."""
    state = _zero3_state(run, held) if run.stage == 3 else _zero12_state(model, run, held, dp_rank)
    return {"optimizer_state_dict": state, "ds_config": ds_config(run), "ds_version": VERSION}


def _given_groups(model: NativeModel, run: NativeRun) -> tuple[tuple[str, ...], ...]:
    if run.groups is None:
        return (tuple(parameter.name for parameter in model.parameters if parameter.optimized),)
    if run.pp is None:
        return run.groups
    held = {parameter.name for parameter in model.parameters}
    return tuple(tuple(name for name in names if name in held) for names in run.groups)


def _local(parameter: NativeParameter, run: NativeRun, tp_rank: int) -> torch.Tensor:
    return shares(parameter.fp32, parameter.cut, run.tp)[tp_rank]


def _local_states(parameter: NativeParameter, run: NativeRun, tp_rank: int) -> dict[str, torch.Tensor]:
    """Return master weight and optimizer states of one parameter on one tensor-parallel rank."""
    stepped = parameter.states if run.steps or run.kind in ("unfused", "fused") else {}
    whole = {"fp32": parameter.fp32, **stepped}
    return {key: shares(tensor, parameter.cut, run.tp)[tp_rank] for key, tensor in whole.items()}


def _padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return the tensor with NaN behind it up to a multiple of a length."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % multiple), value=float("nan"))


def _partition(local: Mapping[str, Mapping[str, torch.Tensor]], group: int, run: NativeRun, dp_rank: int) -> Held:
    """Return a partition of stages 1 and 2: all parameters end to end, padded to a multiple of ``2 * dp``, cut in ``dp`` equal
    parts."""
    names = list(local)
    if run.round_robin:
        names = [name for first in range(run.dp) for name in names[first :: run.dp]]
    numels = [local[name]["fp32"].numel() for name in names]
    gaps = _gaps(numels, run) if run.parameter_alignment else [0] * len(names)
    states: dict[str, torch.Tensor] = {}
    for key in next(iter(local.values())):
        pieces = [torch.full((gap,), float("nan"), dtype=local[names[0]][key].dtype) for gap in gaps]
        flat = torch.cat([part for i, name in enumerate(names) for part in (local[name][key].flatten(), pieces[i])])
        states[key] = _padded(flat, 2 * run.dp).chunk(run.dp)[dp_rank].clone()
    start = dp_rank * states["fp32"].numel()
    return Held(tuple(names), group, states, start, sum(numels) + sum(gaps), tuple(gaps))


def _gaps(numels: Sequence[int], run: NativeRun) -> list[int]:
    """Return the gaps after each parameter, so that the next one in the low-precision buffer begins on 16 bytes."""
    unit = 16 // gcd(16, torch.empty((), dtype=run.dtype).element_size())
    gaps: list[int] = []
    end = 0
    for numel in numels[:-1]:
        end += numel
        gaps.append(-end % unit)
        end += gaps[-1]
    return [*gaps, 0]


def _sub_groups(
    local: Mapping[str, Mapping[str, torch.Tensor]], group: int, run: NativeRun, dp_rank: int
) -> list[Held]:
    """Return the sub-groups of stage 3: each parameter is padded and cut on its own; a sub-group closes when it has
    ``sub_group_size`` elements."""
    held: list[Held] = []
    names: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {key: [] for key in next(iter(local.values()))}
    for name, states in local.items():
        names.append(name)
        for key, tensor in states.items():
            parts[key].append(_padded(tensor.flatten(), run.dp).chunk(run.dp)[dp_rank])
        full = sum(part.numel() for part in parts["fp32"]) >= run.sub_group_size
        if full or name == list(local)[-1]:
            held.append(Held(tuple(names), group, {key: torch.cat(held_) for key, held_ in parts.items()}))
            names, parts = [], {key: [] for key in parts}
    return held


def _module(model: NativeModel, run: NativeRun, tp_rank: int) -> OrderedDict[str, Any]:
    """Return the module's state dict. Weights of flattening optimizers are views of one storage per group; in stage 3 they are
    empty."""
    module: OrderedDict[str, Any] = OrderedDict()
    for parameter in kept_parameters(model, run):
        local = _local(parameter, run, tp_rank).to(run.dtype)
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
    return _padded(weight.flatten(), run.dp).chunk(run.dp)[dp_rank].clone()


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


def _stage0_optimizer(model: NativeModel, run: NativeRun, held: Sequence[Held]) -> dict[str, Any]:
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
    groups = _given_groups(model, run)
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
