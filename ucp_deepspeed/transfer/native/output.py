"""The output itself: which files each rank of the topology would have written, and what describes them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint import random_files
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME, Manifest, ManifestParameter, digest_of
from ucp_deepspeed.checkpoint.deepspeed.written_names import model_states_name, optimizer_name, optimizer_prefix
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.encoding import with_sum
from ucp_deepspeed.checkpoint.output import Output, OutputPlan
from ucp_deepspeed.checkpoint.torch_files.writing import value_archive, write_sums
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError, UniversalCheckpointError, UnsupportedError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.layout.pattern import PerRank, Unique
from ucp_deepspeed.transfer.native.buffers import Tensors
from ucp_deepspeed.transfer.native.experts import Experts
from ucp_deepspeed.transfer.native.model_states import RankModel
from ucp_deepspeed.transfer.native.optimizer_states import HeldSlot, RankOptimizer
from ucp_deepspeed.transfer.native.pipeline import Pipeline
from ucp_deepspeed.transfer.native.run_values import RunValues
from ucp_deepspeed.transfer.native.settings import WRITTEN_VERSION, NativeSettings, reorders
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair, pair
from ucp_deepspeed.transfer.planning.policies import Obstacles, Policies
from ucp_deepspeed.transfer.planning.rank_planner import RankPlanner, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import TargetRank
from ucp_deepspeed.transfer.planning.target_ranks import target_ranks
from ucp_deepspeed.transfer.planning.targeting import describe_target

RESUME_HINT = "an engine with this package resumes from the checkpoint itself, on any topology"


@dataclass(frozen=True)
class NativeOutput(Output):
    """See `Output`.

    Attributes:
        topology: topology of the engine that is to load the files.
        config: its DeepSpeed config; by default that of the run that saved.
        layers: number of layers of each stage of a pipeline; by default as the checkpoint has them, if it has so many stages.
        spec: the spec that the user named.
    """

    topology: Topology
    config: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    spec: Spec | None = None
    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`."""
        checkpoint = view.checkpoint
        if checkpoint.lacking is not None:
            raise checkpoint.lacking
        _check_written(view, self.topology)
        pipeline = Pipeline.of(checkpoint, self.topology, self.layers)
        values = RunValues.of(checkpoint, self.drop_client_state, self.on_unreadable)
        groups = [group.hyperparameters for group in view.groups]
        experts = Experts.of(view, self.topology, RESUME_HINT)
        order = tuple(experts.ordered(_order(view, values, pipeline)))
        settings = NativeSettings.of(self.topology, checkpoint.run, groups, values.config, self.config, order)
        if settings.precision == "fp16" and checkpoint.run.loss_scale is None:
            raise UnsupportedError(
                f"{checkpoint.path} has no loss scale, with which fp16 resumes; name a config in bf16 or fp32 (--config), "
                f"or: {RESUME_HINT}"
            )
        experts.check(settings.config, RESUME_HINT)
        found = self._paired(view, pipeline)
        files = _Files(found, settings, values, experts, pipeline)
        manifest = files.manifest(view)
        archives = tuple(value_archive(name, value) for name, value in files.values())
        finish = partial(_finish, manifest)
        return OutputPlan(tuple(each.file for each in archives), finish, 0, partial(write_sums, archives), found.view)

    def notes(self, view: UniversalView) -> list[str]:
        """See `Output.notes`."""
        told = [*random_files.left_out(view.checkpoint), *_rounded(view)]
        with suppress(UniversalCheckpointError):  # `plan` raises it
            told += self._paired(view, Pipeline.of(view.checkpoint, self.topology, self.layers)).rows.told()
        return told

    def _paired(self, view: UniversalView, pipeline: Pipeline | None) -> Pair:
        """Pair the checkpoint with its own model on the other topology."""
        obstacles, stages = Obstacles(), None if pipeline is None else pipeline.stages(view)
        described = describe_target(view, self.topology, self.spec, obstacles, stages)
        policies = Policies(differing=self.on_differing)
        return pair(view.checkpoint, described, policies, obstacles, lambda *_: ())


def _rounded(view: UniversalView) -> list[str]:
    wide = [
        name for name, each in view.parameters.items() if each.kind == "trainable" and "F64" in each.states.values()
    ]
    if not wide:
        return []
    told = f"{len(wide)} of the trained parameters, such as {wide[0]}, are in fp64"
    return [f"{told}: DeepSpeed's optimizers keep fp32, to which they are rounded"]


def _check_written(view: UniversalView, topology: Topology) -> None:
    """Refuse what this release doesn't write.

    Raises:
        UnsupportedError: it doesn't.
    """
    path = view.checkpoint.path
    if topology.pp > 1 and topology.zero_stage > 1:
        stage = topology.zero_stage
        raise UnsupportedError(f"DeepSpeed refuses ZeRO-{stage} with pipeline parallelism; take --zero 0 or 1")
    if any(group.hyperparameters.get("use_muon") for group in view.groups):
        raise UnsupportedError(
            f"{path} has states of Muon, which aren't written in DeepSpeed's own files; {RESUME_HINT}"
        )
    unsure = [name for name, parameter in view.parameters.items() if parameter.may_be_buffer]
    if unsure and topology.zero_stage == 3:
        told = f"nothing in {path} tells whether these are buffers or frozen parameters, which ZeRO-3 keeps apart"
        raise MismatchError(told, unsure, f"write ZeRO 0 to 2 with --zero; or {RESUME_HINT}")


def _order(view: UniversalView, values: RunValues, pipeline: Pipeline | None) -> tuple[str, ...]:
    """Return all logical names in the order in which the saving run gave them to its optimizer, as far as the files tell."""
    known = [] if reorders(values.config) else [name for group in view.groups for name in group.names]
    names = list(dict.fromkeys([*known, *view.parameters]))
    if pipeline is None:
        return tuple(names)
    own = {logical: name for name, logical in view.logical_of.items()}
    logical = {own[name]: name for name in names}
    return tuple(logical[name] for name in pipeline.ordered(list(logical)))


class _Files:
    """The files of all ranks of an engine."""

    def __init__(
        self, found: Pair, settings: NativeSettings, values: RunValues, experts: Experts, pipeline: Pipeline | None
    ) -> None:
        """Raises:
        MismatchError: the checkpoint can't be on this topology; lists all obstacles.
        """
        self.pair, self.settings, self.run, self.view = found, settings, values, found.view
        self.experts, self.pipeline = experts, pipeline
        self.topology, checkpoint = settings.topology, found.checkpoint
        own = {name: logical for name, logical in self.view.logical_of.items() if name in checkpoint.parameters}
        self.names = {logical: name for name, logical in own.items()}
        self.tied = {alias: owner for alias, owner in checkpoint.tied.items() if owner in own}
        self.same_numbers = True
        self.ranks = list(self._models())
        if problems := [str(each) for each in found.obstacles]:
            told = f"{checkpoint.path} can't be written as DeepSpeed's files of {self.topology}"
            raise MismatchError(told, problems, "\n".join([*found.obstacles.remedies, RESUME_HINT]))

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each file, and the value to pickle into it."""
        settings, prefix = self.settings, optimizer_prefix(self.settings.precision)
        for model in self.ranks:
            rank, partition = model.target.model_parallel_rank, model.target.data_parallel_rank
            if settings.stage == 3 or partition == 0:
                yield model_states_name(rank, partition if settings.stage == 3 else None), model.state()
            if settings.partitioned:
                described = {"ds_config": dict(settings.config), "ds_version": WRITTEN_VERSION}
                state = {"optimizer_state_dict": model.optimizer.state_dict(), **described}
                yield optimizer_name(rank, partition, prefix), state
        yield from self._layers(self.pipeline) if self.pipeline is not None else ()
        yield from self.experts.files(self.ranks[0].expert_weights(), self.names)

    def _layers(self, pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
        """Yield the name and content of each layer's file. They are those of the first data-parallel ranks."""
        firsts = [model for model in self.ranks if model.target.data_parallel_rank == 0]
        held: list[dict[str, Any]] = [{} for _ in range(self.topology.tp)]
        for model in reversed(firsts):
            held[model.target.model_parallel_rank % self.topology.tp] |= model.weights()
        for layer, rank, name in pipeline.files():
            yield name, pipeline.content(layer, held[rank], firsts[rank].extra_states())

    def _models(self) -> Iterator[RankModel]:
        """Plan one rank after another; collect the obstacles."""
        shapes = {name: tensor.local_shapes for name, tensor in self.pair.tensors.items()}
        planner = RankPlanner(self.pair, TargetOptimizer(), frozenset(), sys.maxsize)
        for target in target_ranks(self.view, self.topology, shapes, settings=self.settings.buffers):
            tensors = Tensors(self.view, self.pair.layouts, target.model_parallel_rank)
            optimizer = self._optimizer(planner, target, tensors)
            held = self.names, self.tied, self.run, optimizer, self.pipeline is not None, self.experts
            yield RankModel(self.settings, self.view, tensors, target, *held)

    def _optimizer(self, planner: RankPlanner, target: TargetRank, tensors: Tensors) -> RankOptimizer:
        checkpoint, part = self.pair.checkpoint, target.data_parallel_rank
        place = target.model_parallel_rank, part % self.topology.ep
        source = self.pair.names.source
        numbers = PartitionNumbers(checkpoint, source, self.topology, place, target.slots, self.pair.policies)
        kept = sorted({slot.group for slot in target.slots})
        groups = {number: numbers.of_group(number, checkpoint.groups[number]) for number in kept if checkpoint.groups}
        groups = {number: self.experts.settings(group) for number, group in groups.items()}
        names = self.experts.names_on(self.names, part)
        states = planner.check(target, numbers)
        held = [HeldSlot(slot, found) for slot, found in zip(target.slots, states, strict=True)]
        held.sort(key=lambda each: each.slot.group)
        self.same_numbers = self.same_numbers and not any(map(numbers.has_own, target.slots))
        run = self.view.checkpoint.run
        return RankOptimizer(self.settings, tensors, held, groups, names, run.loss_scale, run.global_steps)

    def manifest(self, view: UniversalView) -> Manifest:
        """Return what describes the files to this package: names and layouts, which DeepSpeed doesn't record.

        Args:
            view: the checkpoint's, without rows of padding.
        """
        firsts = [model for model in self.ranks if model.target.data_parallel_rank == 0][:: self.topology.tp]
        groups = tuple(tuple(self._named(model, number) for number in model.optimizer.groups) for model in firsts)
        return Manifest(
            topology=self.topology,
            optimizer=self.settings.form,
            vocabulary_size=view.vocabulary_size,
            parameter_groups=groups,
            group_numbers=None if self.pipeline is None else tuple(tuple(model.optimizer.groups) for model in firsts),
            layer_keys={} if self.pipeline is None else self.pipeline.keys,
            parameters={self.names[name]: self._described(name, view) for name in view.parameters},
            has_extra_states=any(self.run.extra_states),
            same_numbers=self.same_numbers,
            differing_copies=(),
            files={},
        )

    def _named(self, model: RankModel, number: int) -> tuple[str, ...]:
        held = {name for each in model.optimizer.held if each.slot.group == number for name in each.slot.names}
        return tuple(self.names[name] for name in self.settings.buffers.order if name in held)

    def _described(self, name: str, view: UniversalView) -> ManifestParameter:
        pattern, own, tp = view.patterns[name], self.names[name], self.topology.tp
        shapes = self.pair.tensors[name].local_shapes
        stages = tuple(stage for stage in range(self.topology.pp) if shapes[stage * tp] is not None)
        local = tuple(shape for shape in shapes[stages[0] * tp : (stages[0] + 1) * tp] if shape is not None)
        known = self.view.parameters[name].kind != "buffer" and not isinstance(pattern, Unique | PerRank)
        return ManifestParameter(
            kind=self.view.parameters[name].kind,
            logical_shape=view.logical_shape(name) if known else None,
            pattern=pattern if known else None,
            logical_name=name if name != own else None,
            local_shapes=local[:1] if len(set(local)) == 1 else local,
            stages=stages,
        )


def _finish(manifest: Manifest, folder: Path, sums: Sequence[FileSums]) -> None:
    """Write the manifest, and open the result again: what can't be opened must not be committed."""
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir()) if entry.name != MARK_NAME}
    contents = {name: digest for name in files if (digest := digest_of(folder / name)) is not None}
    told = manifest.model_copy(update={"files": files, "contents": contents})
    (folder / MANIFEST_NAME).write_text(with_sum(told.model_dump_json(indent=1)), encoding="utf-8")
    _ = DeepSpeedCheckpoint(folder).parameters
