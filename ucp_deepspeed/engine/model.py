"""What an engine's model looks like from outside: topology, parameters and buffers with their local shapes, and layouts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import prod
from typing import Any, Literal, TypeVar

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_group,
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
)

from ucp_deepspeed.checkpoint.autotp import RecordedLayouts, read_autotp_layouts
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, Kind, Precision
from ucp_deepspeed.checkpoint.experts import expert_of
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.deepspeed_surface import dealt_experts, uncut_by_autotp
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.exchange import replica_group
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizer_only import optimizer_only
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.optimizers.plain import PlainOptimizer
from ucp_deepspeed.errors import ConfigError, MismatchError, UniversalCheckpointError
from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.layout import FlatGroup, Flattening, Shape, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate
from ucp_deepspeed.transfer.target import TargetSlot

T = TypeVar("T")

HeldKind = Literal[Kind, "idle"]
"""What a rank tells others of a tensor; see `EngineTensor.idle`."""


WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of trained weights, by precision."""


@dataclass(frozen=True)
class EngineTensor:
    """A parameter or persistent buffer of the live model.

    Attributes:
        name: the first name under which the model has it.
        kind: see `ucp_deepspeed.checkpoint.checkpoint.Kind`.
        tensor: the live one; None where another pipeline stage has it, or another expert-parallel rank.
        local_shapes: over the model-parallel ranks, of the whole local tensor also where ZeRO-3 has cut it, or AutoEP.
        replicas: process group of the ranks that hold it as this one does; None if there are no others, or it isn't here.
        idle: trainable, and on no rank needs a gradient for now: what an optimizer with a slot for each parameter skips.
        start: where in the local tensor this rank's experts begin, in elements; 0 for all that AutoEP hasn't cut.
    """

    name: str
    kind: Kind
    tensor: torch.Tensor | None
    local_shapes: HeldShapes
    replicas: Any = None
    start: int = 0
    idle: bool = False

    def held(self) -> tuple[torch.Tensor, TargetSlot]:
        """The memory of this rank's share of the weight, and which elements lie in it."""
        assert self.tensor is not None, f"{self.name} is on another rank"
        memory, partition = self.tensor.data, 0
        cut: Flattening = FlatGroup((self.tensor.numel(),), 1, alignment=1)
        if hasattr(self.tensor, "ds_tensor"):
            memory, group = self.tensor.ds_tensor.data, self.tensor.ds_process_group
            cut = SlicedGroup((self.tensor.ds_numel,), dist.get_world_size(group=group))
            partition = dist.get_rank(group=group)
        slot = TargetSlot(
            (self.name,),
            cut,
            partition,
            starts=(self.start,),
            replicas=self.replicas,
            itemsize=memory.element_size(),
            divisible=memory.is_contiguous(),
        )
        return memory, slot


@dataclass(frozen=True)
class EngineModel:
    """The target, or the run that saves. Built by `describe_model`, the same on every rank but for ``rank`` and ``ep_rank``.

    Attributes:
        topology: of the engine.
        precision: of the weights.
        rank: this rank's model-parallel rank.
        ep_rank: its expert-parallel rank; 0 without experts.
        tensors: of all pipeline stages, by name, in the model's order.
        inferred: patterns that parameter attributes tell (Megatron-Core, AutoTP), by name.
        exact: whether they tell the whole cut, as AutoTP's do.
        refused: parameters that AutoTP has cut in a way that can't be told, and why.
        spec: the one named in the config.
        vocabulary_size: as in the config.
        tensor_parallel_group: the process group; None if this is the only tensor-parallel rank.
        tied: further names of this rank's parameters → the first name.
    """

    topology: Topology
    precision: Precision
    rank: int
    ep_rank: int
    tensors: Mapping[str, EngineTensor]
    inferred: Mapping[str, Pattern]
    exact: bool
    refused: Mapping[str, str]
    spec: Spec | None
    vocabulary_size: int | None
    tensor_parallel_group: Any = None
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def local_shapes(self) -> dict[str, Shape]:
        """Of what the first model-parallel rank holds."""
        first = {name: tensor.local_shapes[0] for name, tensor in self.tensors.items()}
        return {name: shape for name, shape in first.items() if shape is not None}

    def named(self, *kinds: Kind) -> list[str]:
        """Names of the tensors of some kinds, in the model's order."""
        return [name for name, tensor in self.tensors.items() if tensor.kind in kinds]


def describe_model(engine: Engine) -> EngineModel:
    """Collective over the model-parallel ranks: those of a stage tell one another what they hold, and then the stages.

    A rank learns the names and shapes of the model once, and not once for each tensor-parallel rank.

    Raises:
        SpecError: the spec named in the config doesn't exist or isn't valid.
        MismatchError: the tensor-parallel ranks of a stage have different parameters.
    """
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    topology = engine_topology(engine)
    names, tensors_here = ModelNames(engine), list(_local_tensors(engine))
    local = {names.in_model(name): tensor for name, _, tensor in tensors_here}
    live = _live_layouts(engine)
    mine = _Held(
        {each: (kind, local_shape(tensor)) for name, kind, tensor in tensors_here for each in names.on_all_ranks(name)},
        {each: pattern for name, pattern in live.patterns.items() for each in names.on_all_ranks(name)},
    )
    stages = _gather_stages(engine, topology, mine)
    tensors = {
        name: EngineTensor(
            name,
            "trainable" if kind == "idle" else kind,
            local.get(name),
            tuple(shape for stage in stages for shape in stage.local_shapes(name, topology.tp)),
            None if name not in local or _is_expert_buffer(name, kind) else replica_group(engine, local[name]),
            first_element(local[name]) if name in local else 0,
            kind == "idle",
        )
        for name, kind in _kinds(stages).items()
    }
    return EngineModel(
        topology=topology,
        precision=engine_precision(engine),
        rank=model_parallel_rank(engine),
        ep_rank=names.ep_rank,
        tensors=tensors,
        inferred={name: pattern for stage in stages for name, pattern in stage.inferred.items()},
        exact=engine.autotp_size() > 1,
        refused=live.refused,
        spec=None if config.spec == "auto" else load_spec(config.spec),
        vocabulary_size=config.vocabulary_size,
        tensor_parallel_group=bwc_tensor_model_parallel_group(engine.mpu) if topology.tp > 1 else None,
        tied=_tied(engine, names),
    )


def _tied(engine: Engine, names: ModelNames) -> dict[str, str]:
    """Further names of parameters; one without elements may share its address with others, and is left out."""
    first = names.of_parameters
    return {
        names.in_model(name): first[param]
        for name, param in engine.module.named_parameters(remove_duplicate=False)
        if param in first and torch.Size(local_shape(param)).numel() and names.in_model(name) != first[param]
    }


def _is_expert_buffer(name: str, kind: HeldKind) -> bool:
    """DeepSpeed marks an expert's parameters with the group that holds them, and its buffers with nothing."""
    return kind == "buffer" and expert_of(name) is not None


def engine_topology(engine: Engine) -> Topology:
    """The topology under the names of this package; sequence-parallel ranks count as data-parallel, as in DeepSpeed's files."""
    pp = bwc_pipeline_parallel_world_size(engine.mpu) if engine.mpu is not None else 1
    stage, ep = engine.zero_optimization_stage(), ModelNames(engine).ep
    return Topology(engine.mp_world_size // pp, pp, engine.seq_dp_world_size, stage, ep)


def engine_precision(engine: Engine) -> Precision:
    """Precision of the weights."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def _local_tensors(engine: Engine) -> Iterator[tuple[str, HeldKind, torch.Tensor]]:
    """Parameters and persistent buffers, under the names of this rank's modules.

    What the optimizer has is trained, also while ``requires_grad`` is off: its states are still there, and go on later.
    """
    optimizer, names = engine_optimizer(engine), ModelNames(engine).of_parameters
    stepped = frozenset(name for group in optimizer.group_names() for name in group)
    for param, name in engine.param_names.items():
        trained = names[param] in stepped and has_elements(param)
        idle = optimizer.form == PlainOptimizer.form and not param.requires_grad
        yield name, ("idle" if idle else "trainable") if trained else "frozen", param
    yield from ((name, "trainable", param) for param, name in optimizer_only(engine).items())
    buffers = dict(engine.module.named_buffers(remove_duplicate=False))  # DeepSpeed saves one under each of its names
    for name in engine._get_buffer_names():
        if name in buffers:
            yield name, "buffer", buffers[name]


def has_elements(param: torch.Tensor) -> bool:
    """Whether an optimizer can step on it: a parameter without elements counts as frozen (``runtime/utils.py``)."""
    return torch.Size(local_shape(param)).numel() > 0


def local_shape(tensor: torch.Tensor) -> Shape:
    """Shape of the whole local tensor, also where ZeRO-3 has cut it; of experts that AutoEP has dealt out that of all."""
    held: Shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    dealt = dealt_experts(tensor)
    return held if dealt is None else dealt.shape


def first_element(tensor: torch.Tensor) -> int:
    """Where in the whole local tensor what this rank has of it begins, in elements: its first expert's with AutoEP."""
    dealt = dealt_experts(tensor)
    return 0 if dealt is None else dealt.first * prod(dealt.shape[1:])


@dataclass(frozen=True)
class _Held:
    """What one model-parallel rank tells the others of its stage: kinds and local shapes by name, and inferred patterns."""

    shapes: Mapping[str, tuple[HeldKind, Shape]]
    inferred: Mapping[str, Pattern]


@dataclass(frozen=True)
class _Stage:
    """What a pipeline stage tells the others: the same, of its tensor-parallel ranks; one shape where they hold the same.

    Attributes:
        differing: names that not all of these ranks have.
    """

    shapes: Mapping[str, tuple[HeldKind, tuple[Shape, ...]]]
    inferred: Mapping[str, Pattern]
    differing: tuple[str, ...]

    def local_shapes(self, name: str, degree: int) -> tuple[Shape | None, ...]:
        """Of each tensor-parallel rank; None if the stage doesn't hold it."""
        if name not in self.shapes:
            return (None,) * degree
        _, shapes = self.shapes[name]
        return shapes * degree if len(shapes) == 1 else shapes


def _gather_stages(engine: Engine, topology: Topology, mine: _Held) -> list[_Stage]:
    """What each stage holds. Raised after the last exchange, and so on all ranks, is what one stage has wrong."""
    held = _gather(engine, mine, bwc_tensor_model_parallel_group(engine.mpu)) if topology.tp > 1 else [mine]
    common = [name for name in mine.shapes if all(name in share.shapes for share in held)]
    stage = _Stage(
        {name: _over_ranks([share.shapes[name] for share in held]) for name in common},
        {name: pattern for share in held for name, pattern in share.inferred.items()},
        tuple(sorted({name for share in held for name in share.shapes} - set(common))),
    )
    stages = _gather(engine, stage, bwc_pipeline_parallel_group(engine.mpu)) if topology.pp > 1 else [stage]
    if differing := sorted({name for stage in stages for name in stage.differing}):
        raise MismatchError("tensor-parallel ranks have different parameters", differing)
    return stages


def _over_ranks(held: Sequence[tuple[HeldKind, Shape]]) -> tuple[HeldKind, tuple[Shape, ...]]:
    """Kind and shapes of one tensor. Where a rank's share is empty DeepSpeed doesn't train it."""
    kinds, shapes = zip(*held, strict=True)
    return _joint(kinds), shapes[:1] if len(set(shapes)) == 1 else shapes


def _kinds(stages: Sequence[_Stage]) -> dict[str, HeldKind]:
    """Of each tensor; one that any stage trains is trained."""
    kinds: dict[str, HeldKind] = {}
    for stage in stages:
        for name, (kind, _) in stage.shapes.items():
            kinds[name] = _joint((kinds.get(name, kind), kind))
    return kinds


def _joint(kinds: Sequence[HeldKind]) -> HeldKind:
    return next((kind for kind in ("trainable", "idle") if kind in kinds), kinds[-1])


def model_parallel_rank(engine: Engine) -> int:
    """Position among the ranks that hold one copy of the model: stage by stage, tensor-parallel rank by rank."""
    return int(engine.mpu.get_model_parallel_rank()) if engine.mp_world_size > 1 else 0


def gather_model_parallel(engine: Engine, value: T) -> list[T]:
    """Every model-parallel rank's value, in rank order. Collective over the model-parallel group."""
    return [value] if engine.mp_world_size == 1 else _gather(engine, value, engine.mpu.get_model_parallel_group())


def _gather(engine: Engine, value: T, group: Any) -> list[T]:
    """The values of a group of model-parallel ranks, in the order of these."""
    gathered: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(gathered, (model_parallel_rank(engine), value), group=group)
    return [held for _, held in sorted(gathered, key=lambda entry: entry[0])]


def _live_layouts(engine: Engine) -> RecordedLayouts:
    """What AutoTP's or Megatron-Core's attributes of parameters tell; the latter's if the process uses Megatron-Core anyway."""
    if engine.autotp_size() > 1:
        info = getattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, None)
        recorded = read_autotp_layouts(info, engine.autotp_size(), "the engine's model")
        whole: dict[str, Pattern] = {
            engine.param_names[param]: Replicate()
            for param in uncut_by_autotp(engine.module)
            if param in engine.param_names
        }
        return replace(recorded, patterns=whole | dict(recorded.patterns))
    if "megatron.core" not in sys.modules:
        return RecordedLayouts()
    from ucp_deepspeed.megatron.layouts import inferred_patterns

    return RecordedLayouts(inferred_patterns(engine.module))


@contextmanager
def agreement() -> Iterator[None]:
    """Collective over all ranks, at its end: what is raised on one rank is raised on every rank, so that none goes on alone.

    Raises:
        Exception: this rank's own error.
        UniversalCheckpointError: another rank's, with its rank in the message where it doesn't list parameters.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _portable(error))
    if error is not None:
        raise error
    for rank, other in enumerate(gathered):
        if other is not None:
            raise other if getattr(other, "problems", ()) else type(other)(f"rank {rank}: {other}")


def check_same_on_all_ranks(what: str, settings: Mapping[str, Any]) -> None:
    """Collective: what ranks do together goes by it, and they would wait for one another, or end in different states.

    Args:
        what: to which the settings belong, for the message.

    Raises:
        ConfigError: on all ranks; lists the settings that differ.
    """
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, sha256(repr(sorted(settings.items())).encode()).digest())
    if len(set(digests)) == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(settings))
    differing = [
        f"{key} is {gathered[0][key]!r} on rank 0 and {other[key]!r} on rank {rank}"
        for rank, other in enumerate(gathered)
        for key in gathered[0]
        if other[key] != gathered[0][key]
    ]
    if differing:
        more = f", and so on ({len(differing)} differences)" if len(differing) > 1 else ""
        raise ConfigError(f"{what!r} must be the same on all ranks: {differing[0]}{more}")


def _portable(error: Exception | None) -> UniversalCheckpointError | None:
    """An error that other ranks can unpickle."""
    if error is None or isinstance(error, UniversalCheckpointError):
        return error
    return UniversalCheckpointError(f"{type(error).__name__}: {error}")
