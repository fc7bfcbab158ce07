"""The model of an engine as seen from outside: topology, parameters and buffers with their local shapes, and layouts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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

from ucp_deepspeed.checkpoint.checkpoint import Kind, Precision
from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import RecordedLayouts, read_autotp_layouts
from ucp_deepspeed.checkpoint.expert_names import expert_of
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import gathered_in, portable, raise_first
from ucp_deepspeed.engine.deepspeed_surface import dealt_experts, uncut_by_autotp
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.exchange import replica_group
from ucp_deepspeed.engine.names import ModelNames, optimizer_only
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.optimizers.stage0 import PlainOptimizer
from ucp_deepspeed.errors import MismatchError, UniversalCheckpointError
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.language.name_spaces import CatalogName, ModuleName
from ucp_deepspeed.layout import FlatGroup, Flattening, Shape, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate
from ucp_deepspeed.transfer.planning.target import ModelDescription, ModelTensor, TargetSlot

T = TypeVar("T")

HeldKind = Literal[Kind, "idle"]
"""The kind that a rank tells others of a tensor; see `ModelTensor`."""


@dataclass(frozen=True)
class EngineTensor(ModelTensor):
    """A parameter or persistent buffer of the live model.

    Attributes:
        tensor: the live one; None where another pipeline stage has it, or another expert-parallel rank.
        replicas: process group of the ranks that hold it as this one does; None if there are no others, or it isn't here.
        start: place in the local tensor where this rank's experts begin, in elements; 0 for all tensors that AutoEP hasn't dealt
            out.
    """

    tensor: torch.Tensor | None = None
    replicas: Any = None
    start: int = 0

    def held(self) -> tuple[torch.Tensor, TargetSlot]:
        """Return the memory of this rank's share of the weight, and which elements lie in it."""
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


@dataclass(frozen=True, kw_only=True)
class EngineModel(ModelDescription):
    """The live model: the target, or the run that saves. `describe_model` builds it.

    Attributes:
        precision: precision of the weights.
        rank: this rank's model-parallel rank.
        ep_rank: this rank's expert-parallel rank; 0 without experts.
        tensor_parallel_group: the process group; None if this is the only tensor-parallel rank.
    """

    tensors: Mapping[str, EngineTensor]
    precision: Precision
    rank: int
    ep_rank: int
    tensor_parallel_group: Any = None


def describe_model(engine: Engine) -> EngineModel:
    """Describe an engine's model. Collective over the model-parallel ranks: the ranks of a stage tell one another what they hold,
    then the stages do, so that no rank learns names and shapes once for each tensor-parallel rank.

    Raises:
        SpecError: the spec named in the config doesn't exist or isn't valid.
        MismatchError: the tensor-parallel ranks of a stage have different parameters.
    """
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    error, mine = None, _Held({}, {})
    try:
        topology, names, tensors_here = engine_topology(engine), ModelNames(engine), list(_local_tensors(engine))
        local = {names.in_model(name): tensor for name, _, tensor in tensors_here}
        live = _live_layouts(engine)
        mine = _Held(
            {
                each: (kind, (local_shape(tensor),))
                for name, kind, tensor in tensors_here
                for each in names.on_all_ranks(name)
            },
            {each: pattern for name, pattern in live.patterns.items() for each in names.on_all_ranks(ModuleName(name))},
        )
    except Exception as caught:
        error, mine = caught, _Held({}, {}, failed=((dist.get_rank(), portable(caught)),))
    stages = _gather_stages(engine, mine)
    raise_first(error, chain.from_iterable(stage.failed for stage in stages))
    if differing := sorted({name for stage in stages for name in stage.differing}):
        raise MismatchError("tensor-parallel ranks have different parameters", differing)
    kinds: dict[CatalogName, HeldKind] = {}
    for name, (kind, _) in chain.from_iterable(stage.shapes.items() for stage in stages):
        kinds[name] = _joint((kinds.get(name, kind), kind))
    # DeepSpeed marks an expert's parameters with the group that holds them, and its buffers with nothing.
    marked = {name for name in local if kinds[name] != "buffer" or expert_of(name) is None}
    tensors: dict[str, EngineTensor] = {
        name: EngineTensor(
            name,
            "trainable" if kind == "idle" else kind,
            tuple(shape for stage in stages for shape in stage.local_shapes(name, topology.tp)),
            kind == "idle",
            local.get(name),
            replica_group(engine, local[name]) if name in marked else None,
            first_element(local[name]) if name in local else 0,
        )
        for name, kind in kinds.items()
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
    """Return further names of parameters. A parameter without elements may share its address with others, and is left out."""
    first = names.of_parameters
    return {
        names.in_model(name): first[param]
        for name, param in engine.module.named_parameters(remove_duplicate=False)
        if param in first and has_elements(param) and names.in_model(name) != first[param]
    }


def engine_topology(engine: Engine) -> Topology:
    """Return the topology under the names of this package; sequence-parallel ranks count as data-parallel, as in DeepSpeed's
    files."""
    stage, ep = engine.zero_optimization_stage(), ModelNames(engine).ep
    return Topology(*_model_parallel_sizes(engine), engine.seq_dp_world_size, stage, ep)


def _model_parallel_sizes(engine: Engine) -> tuple[int, int]:
    """Return the tensor- and the pipeline-parallel size."""
    pp = bwc_pipeline_parallel_world_size(engine.mpu) if engine.mpu is not None else 1
    return engine.mp_world_size // pp, pp


def engine_precision(engine: Engine) -> Precision:
    """Return the precision of the weights."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def _local_tensors(engine: Engine) -> Iterator[tuple[ModuleName, HeldKind, torch.Tensor]]:
    """Yield parameters and persistent buffers, under the names of this rank's modules.

    A parameter in the optimizer is trained, also while ``requires_grad`` is off: its states are still there, and go on later.
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
    """Return whether an optimizer can step on a parameter: one without elements counts as frozen (``runtime/utils.py``)."""
    return torch.Size(local_shape(param)).numel() > 0


def local_shape(tensor: torch.Tensor) -> Shape:
    """Return the shape of the whole local tensor, also where ZeRO-3 has partitioned it; where AutoEP has dealt out experts, the
    shape with all of them."""
    held: Shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    dealt = dealt_experts(tensor)
    return held if dealt is None else dealt.shape


def first_element(tensor: torch.Tensor) -> int:
    """Return where this rank's part begins in the whole local tensor, in elements: at its first expert with AutoEP."""
    dealt = dealt_experts(tensor)
    return 0 if dealt is None else dealt.first * prod(dealt.shape[1:])


@dataclass(frozen=True)
class _Held:
    """The tensors of which tensor-parallel ranks of a pipeline stage tell others.

    Attributes:
        shapes: kind of each tensor, and its local shape on each of these ranks; one shape where all hold the same.
        inferred: patterns that parameters' attributes tell.
        differing: names that not all of these ranks have.
        failed: ranks that couldn't tell, and why.
    """

    shapes: Mapping[CatalogName, tuple[HeldKind, tuple[Shape, ...]]]
    inferred: Mapping[CatalogName, Pattern]
    differing: tuple[str, ...] = ()
    failed: tuple[tuple[int, UniversalCheckpointError], ...] = ()

    def local_shapes(self, name: CatalogName, degree: int) -> tuple[Shape | None, ...]:
        """Return the shape on each tensor-parallel rank; None if the stage doesn't hold the tensor."""
        _, shapes = self.shapes.get(name, ("frozen", (None,)))
        return shapes * degree if len(shapes) == 1 else shapes


def _gather_stages(engine: Engine, mine: _Held) -> list[_Held]:
    """Return what each stage holds, and tells of problems: they are raised after the last exchange, and so on all ranks."""
    tp, pp = _model_parallel_sizes(engine)
    held = _gather(engine, mine, bwc_tensor_model_parallel_group(engine.mpu)) if tp > 1 else [mine]
    common = [name for name in mine.shapes if all(name in share.shapes for share in held)]
    shapes = {}
    for name in common:  # DeepSpeed doesn't train a tensor on a rank whose share of it is empty
        kinds, found = zip(*(share.shapes[name] for share in held), strict=True)
        shapes[name] = _joint(kinds), found[0] if len(set(found)) == 1 else tuple(shape for (shape,) in found)
    stage = _Held(
        shapes,
        {name: pattern for share in held for name, pattern in share.inferred.items()},
        tuple(sorted({name for share in held for name in share.shapes} - set(common))),
        tuple(chain.from_iterable(share.failed for share in held)),
    )
    return _gather(engine, stage, bwc_pipeline_parallel_group(engine.mpu)) if pp > 1 else [stage]


def _joint(kinds: Sequence[HeldKind]) -> HeldKind:
    """Return one kind for ranks that hold a tensor alike; a tensor that any of them trains is trained."""
    return next((kind for kind in ("trainable", "idle") if kind in kinds), kinds[-1])


def model_parallel_rank(engine: Engine) -> int:
    """Return this rank's position among the ranks that hold one copy of the model: stage by stage, tensor-parallel rank by
    rank."""
    return int(engine.mpu.get_model_parallel_rank()) if engine.mp_world_size > 1 else 0


def gather_model_parallel(engine: Engine, value: T) -> list[T]:
    """Return every model-parallel rank's value, in rank order. Collective over the model-parallel group."""
    return [value] if engine.mp_world_size == 1 else _gather(engine, value, engine.mpu.get_model_parallel_group())


def _gather(engine: Engine, value: T, group: Any) -> list[T]:
    """Return the values of a group of model-parallel ranks, in rank order."""
    found = gathered_in(group, (model_parallel_rank(engine), value))
    return [held for _, held in sorted(found, key=lambda entry: entry[0])]


def _live_layouts(engine: Engine) -> RecordedLayouts:
    """Return the layouts in AutoTP's or Megatron-Core's attributes of parameters; Megatron-Core's only if the process uses it
    anyway."""
    if engine.autotp_size() > 1:
        info = getattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, None)
        recorded = read_autotp_layouts(info, engine.autotp_size(), "the engine's model")
        uncut = (engine.param_names[param] for param in uncut_by_autotp(engine.module) if param in engine.param_names)
        whole: dict[str, Pattern] = dict.fromkeys(uncut, Replicate())
        return replace(recorded, patterns=whole | dict(recorded.patterns))
    if "megatron.core" not in sys.modules:
        return RecordedLayouts()
    from ucp_deepspeed.megatron.layouts import inferred_patterns

    return RecordedLayouts(inferred_patterns(engine.module))
