"""Whole tensors, the runs that save them, and the buffers that each rank holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
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
    return [[name for name in names if model[name].optimized] for names in given_groups(model, run)]


def ds_config(run: NativeRun) -> dict[str, Any]:
    """Return the DeepSpeed config of the run."""
    config: dict[str, Any] = {"train_batch_size": 4 * run.dp, "zero_optimization": {"stage": run.stage}}
    if run.round_robin:
        config["zero_optimization"]["round_robin_gradients"] = True
    if run.precision != "fp32":
        config[run.precision] = {"enabled": True}
    return config


def given_groups(model: NativeModel, run: NativeRun) -> tuple[tuple[str, ...], ...]:
    if run.groups is None:
        return (tuple(parameter.name for parameter in model.parameters if parameter.optimized),)
    if run.pp is None:
        return run.groups
    held = {parameter.name for parameter in model.parameters}
    return tuple(tuple(name for name in names if name in held) for names in run.groups)


def local_of(parameter: NativeParameter, run: NativeRun, tp_rank: int) -> torch.Tensor:
    return shares(parameter.fp32, parameter.cut, run.tp)[tp_rank]


def _local_states(parameter: NativeParameter, run: NativeRun, tp_rank: int) -> dict[str, torch.Tensor]:
    """Return master weight and optimizer states of one parameter on one tensor-parallel rank."""
    stepped = parameter.states if run.steps or run.kind in ("unfused", "fused") else {}
    whole = {"fp32": parameter.fp32, **stepped}
    return {key: shares(tensor, parameter.cut, run.tp)[tp_rank] for key, tensor in whole.items()}


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
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
        states[key] = padded(flat, 2 * run.dp).chunk(run.dp)[dp_rank].clone()
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
            parts[key].append(padded(tensor.flatten(), run.dp).chunk(run.dp)[dp_rank])
        full = sum(part.numel() for part in parts["fp32"]) >= run.sub_group_size
        if full or name == list(local)[-1]:
            held.append(Held(tuple(names), group, {key: torch.cat(held_) for key, held_ in parts.items()}))
            names, parts = [], {key: [] for key in parts}
    return held
