"""The catalog of a native DeepSpeed checkpoint, stages 0 to 3, saved with this plugin or without."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ucp_deepspeed.checkpoint.checkpoint import (
    Checkpoint,
    Deferred,
    FileExtent,
    HeldShapes,
    Kind,
    Parameter,
    ParameterGroup,
)
from ucp_deepspeed.checkpoint.deepspeed.contents import item_of, value_of
from ucp_deepspeed.checkpoint.deepspeed.experts import expert_parallel_size, shares_of_group, stage0_expert_slots
from ucp_deepspeed.checkpoint.deepspeed.files import VALUES_KEY, DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME, STALE_MANIFEST
from ucp_deepspeed.checkpoint.deepspeed.pipeline import PipelineLayers
from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import MegatronDeepSpeedInfo, read_autotp_layouts
from ucp_deepspeed.checkpoint.deepspeed.run_state import (
    hyperparameters,
    join_groups,
    number_groups,
    read_run,
    with_all_states,
)
from ucp_deepspeed.checkpoint.deepspeed.stage0_slots import Groups, stage0_form, stage0_slots, unnamed
from ucp_deepspeed.checkpoint.deepspeed.weights import (
    excluded,
    frozen_slots,
    module_slot,
    never_stored,
    tensors_in,
    tied_names,
    weight_slots,
    without_optimizer,
)
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import (
    described_numels,
    frozen_slice_slots,
    mapped_numels,
    zero_slots,
)
from ucp_deepspeed.checkpoint.differing import DifferingNumbers
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.expert_names import names_on, names_on_all
from ucp_deepspeed.checkpoint.extra_states import extra_states_in
from ucp_deepspeed.checkpoint.slots import HeldPart, Located, Slot
from ucp_deepspeed.checkpoint.tags import read_mark, unfinished
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, UniversalCheckpointError
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment

logger = logging.getLogger("ucp_deepspeed")


class DeepSpeedCheckpoint(Checkpoint):
    """A tag folder that DeepSpeed wrote. See `Checkpoint`. A long class, since its answers rest on one another and are kept.

    Opening reads the files that tell the topology. Asking for the parameters reads the metadata of each model-parallel rank's
    model_states file and of one optimizer file per model-parallel rank. Other optimizer files are opened when a fragment in them
    is asked for.

    Raises:
        DamagedCheckpointError: a file is missing, truncated, or disagrees with another.
        UnsupportedError: an unknown optimizer class, or experts whose distribution can't be told.
        MismatchError: there is no manifest, and the parameter order of stage 0 is ambiguous or a pipeline's, or several layers of
            a pipeline could be a tied module's; raised by ``parameters``.
    """

    def __init__(
        self,
        path: Path,
        files: DeepSpeedFiles | None = None,
        copies: Mapping[str, int] = MappingProxyType({}),
        verify: bool = True,
    ) -> None:
        """Args: copies: parameters that several pipeline stages hold → stage whose copy is read; by default the first."""
        self.path, self._copies = path, copies
        self.files = files or DeepSpeedFiles(path, verify)
        self.manifest, self.versions = self.files.manifest, self.files.versions
        self._slots = lru_cache(maxsize=None)(self._read_slots)
        self._stage0_slots = lru_cache(maxsize=None)(self._read_stage0_slots)
        self._where = lru_cache(maxsize=None)(self._read_where)
        self._settings = lru_cache(maxsize=None)(partial(hyperparameters, self.files))
        self.topology = self._read_whole_topology()
        self._firsts = range(0, self.topology.model_parallel, self.topology.tp)  # of each pipeline stage
        self.form = f"deepspeed {self.optimizer_form}"
        self.run = read_run(self.files)
        saved, place = self.files.model_states(0), self.files.model_states_path(0, 0)
        self._cut = read_autotp_layouts(saved.get("universal_checkpoint_info"), self.topology.tp, place)
        self._info = MegatronDeepSpeedInfo.read(saved, str(place))
        self.same_numbers = bool(self.manifest and self.manifest.same_numbers)
        self._numbers = DifferingNumbers(self.topology.tp, self.same_numbers)
        self.refused = self._cut.refused
        self.recorded_shapes: Mapping[str, Shape] = (self.manifest or self._cut).logical_shapes
        self.logical_names: Mapping[str, str] = self.manifest.logical_names if self.manifest else {}
        self.vocabulary_size = self.manifest.vocabulary_size if self.manifest else None
        if self.vocabulary_size is None and self._info is not None:
            self.vocabulary_size = self._info.vocabulary_size

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        for held in self._where(rank)[name]:
            first, last = max(local_start, held.start), min(local_stop, held.stop)
            flattening = held.slot.flattening_of(state)
            for part in flattening.slices(held.index, first - held.start, last - held.start) if first < last else ():
                extent = held.slot.extent(part.partition, state)
                yield Fragment(held.start + part.local_start, part.numel, extent, part.buffer_start)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`."""
        return str(self.files.model_states_path(rank, partition)), self.files.client_state(rank, partition)

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """See `Checkpoint.unreadable`."""
        return self.files.unreadable(rank, partition)

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`."""
        found: tuple[dict[str, Any], ...] = tuple({} for _ in range(self.topology.tp))
        if self.manifest is not None and self.manifest.has_extra_states is False:
            return found
        if self.files.is_pipeline:
            return tuple(self.layers.extra_states(rank) for rank in range(self.topology.tp))
        for rank in range(self.topology.model_parallel):
            module, path = self.files.model_states(rank)["module"], self.files.model_states_path(rank, 0)
            extra = extra_states_in(module, path)
            self.files.check_tensors(path, {key: module[key] for key in extra})
            found[rank % self.topology.tp].update(extra)
        return found

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`."""
        self.files.check_sizes(self.topology)

    @cached_property
    def optimizer_form(self) -> str:
        """Class of optimizer that wrote the state: ``plain``, ``fp16-fused``, …, ``zero-3``, or ``none``."""
        if self.files.partitioned or self.files.sliced:
            return self.files.optimizer_state(0, 0).form.name
        optimizer, path = self.files.whole_optimizer(0)
        return stage0_form(optimizer, path) if optimizer else "none"

    @cached_property
    def patterns(self) -> Mapping[str, Pattern]:  # type: ignore[override]
        """Patterns in the manifest; for other parameters, the patterns that AutoTP or Megatron-DeepSpeed recorded."""
        recorded = {**self._cut.patterns, **(self.manifest.patterns if self.manifest else {})}
        if self._info is None:
            return recorded
        unknown = {
            name: next(shape for shape in held.local_shapes if shape is not None)
            for name, held in self.parameters.items()
            if held.kind != "buffer" and name not in recorded
        }
        return {**self._info.patterns(unknown, str(self.files.model_states_path(0, 0))), **recorded}

    def trained_slots(self, rank: int) -> list[Slot]:
        """Return a model-parallel rank's slots with an optimizer state, in the order of the file."""
        return [slot for slot in self._slots(rank) if slot.kind == "trainable"]

    def local_shapes(self, rank: int) -> dict[str, Shape]:
        """Return the shape of each parameter and buffer on a model-parallel rank."""
        return {name: shape for slot in self._slots(rank) for name, shape in zip(slot.names, slot.shapes, strict=True)}

    def _read_where(self, rank: int) -> dict[str, list[HeldPart]]:
        """Find the parts of each parameter and buffer of a model-parallel rank: one slot each; AutoEP's experts have several.
        Compare names with the stage's first rank or the record, and shapes with the record."""
        where: dict[str, list[HeldPart]] = {}
        for slot in self._slots(rank):
            for index, name in enumerate(slot.names):
                where.setdefault(name, []).append(HeldPart(slot, index))
        where = {name: sorted(held, key=lambda each: each.start) for name, held in where.items()}
        stage, place = divmod(rank, self.topology.tp)
        expected, by, remedy = set(where), f"rank {rank - place}", ""
        if self._recorded_stages is not None:
            expected, by, remedy = set(self._recorded_stages[stage]), f"{MANIFEST_NAME} says", STALE_MANIFEST
        elif place:
            expected = set(self._where(rank - place))
        if where.keys() != expected:
            differing = sorted(where.keys() ^ expected)[:10]
            raise DamagedCheckpointError(
                f"{self.path}: model-parallel rank {rank} has other parameters than {by}: {differing}{remedy}"
            )
        recorded = self.manifest.local_shapes if self.manifest else {}
        for name, held in where.items():
            if name in recorded and held[0].shape != recorded[name][place]:
                raise DamagedCheckpointError(
                    f"{self.path}: {name} has local shape {held[0].shape} on model-parallel rank {rank}; {MANIFEST_NAME} "
                    f"says {recorded[name][place]}{STALE_MANIFEST}"
                )
        return where

    def _read_whole_topology(self) -> Topology:
        """Read the topology. Refuse a folder with the mark of an unfinished save, unless all files have been written since then:
        DeepSpeed alone may have saved the tag again."""
        if (mark := read_mark(self.path)) is None:
            return self._read_topology()
        try:
            topology = self._read_topology()
            names = sorted({*self.files.expected(topology), *self.files.further_names} & self.files.names)
            old = mark.unwritten(self.path, names)
            if not old:
                self.files.check_sizes(topology)
        except UniversalCheckpointError as error:
            raise unfinished(self.path, str(error)) from error
        if old:
            raise unfinished(self.path, f"{len(old)} of its {len(names)} files are from before it: {old[0]}, …")
        logger.warning(
            "%s: a save was not finished there, but all files have been written since it began, and are read as DeepSpeed alone "
            "writes them. If it did, remove %s",
            *(self.path, MARK_NAME),
        )
        return topology

    def _read_topology(self) -> Topology:
        saved = self.files.model_states(0)
        model_parallel, dp, pp = saved["mp_world_size"], saved["dp_world_size"], self.files.pipeline_stages
        told = None if self.manifest is None else self.manifest.topology
        if told is not None and (told.tp, told.pp) != (model_parallel // pp, pp):
            raise DamagedCheckpointError(
                f"{self.path} was saved on TP{model_parallel // pp}·PP{pp}; {MANIFEST_NAME} says TP{told.tp}·PP{told.pp}"
                f"{STALE_MANIFEST}"
            )
        stage = 3 if self.files.sliced else 0
        if not stage and self.files.param_shapes(0) is not None and self.files.partitioned:
            stage = int(self.files.optimizer_state(0, 0).saved.get("zero_stage", 1))
        topology = Topology(model_parallel // pp, pp, dp, stage)
        self.files.check_complete(topology)
        return replace(topology, ep=expert_parallel_size(self.files, topology))

    def _read_slots(self, rank: int) -> list[Slot]:
        slots = self._optimizer_slots(rank)
        known = {name for slot in slots for name in slot.names}
        saved, module = self.files.model_states(rank), self.weights(rank)
        buffers = [name for name in names_on_all(saved["buffer_names"], self.topology.ep) if name in module]
        if self.files.sliced:
            held = (saved.get("frozen_param_shapes") or {}).items()
            slots += frozen_slice_slots(
                {name: shape for name, shape in held if name not in known},
                self.topology.dp,
                lambda part: (self.files.model_states(rank, part), self.files.model_states_path(rank, part)),
            )
        elif self.files.is_pipeline:
            frozen = self._unclaimed if rank < self.topology.tp else ()
            slots += [module_slot(name, "frozen", *module[name]) for name in frozen if name in module]
        else:
            others = {*known, *self._aliases, *buffers}
            for name in (name for name in module if name not in others):
                slots += frozen_slots(self.files.autoep, name, *module[name], known)
        slots += [module_slot(name, "buffer", *module[name]) for name in buffers]
        return slots

    def _optimizer_slots(self, rank: int) -> list[Slot]:
        """Return the slots with an optimizer state."""
        open_partition = partial(self.files.optimizer_state, rank)
        param_shapes = self.files.param_shapes(rank)
        if param_shapes is not None and self.files.partitioned:
            spread = partial(shares_of_group, self.files, self.topology, rank)
            mapped = bool(self.files.config) and not self.files.reordered
            slots = zero_slots(param_shapes, self.topology.dp, open_partition, spread, mapped)
            return with_all_states(slots, self.files, rank)
        if self.files.partitioned:
            module = self.weights(rank)
            shapes = [
                {name: tuple(value_of(module, name, "the weight of", self.path)[0].shape) for name in group}
                for group in mapped_numels(self.topology.dp, open_partition)
            ]
            return with_all_states(zero_slots(shapes, self.topology.dp, open_partition), self.files, rank)
        if param_shapes is not None:
            trained = [name for group in param_shapes for name in group]
            return weight_slots(self.weights(rank), trained, self.files.model_states_path(rank, 0))
        return self._stage0_slots(rank)[0]

    def _read_stage0_slots(self, rank: int) -> tuple[list[Slot], MismatchError | None]:
        """Return the slots without ZeRO. If the optimizer's state can't be told: slots of weights alone, and the error."""
        optimizer, path = self.files.whole_optimizer(rank)
        if not (optimizer or self.files.lost_optimizer):
            return [], None
        buffers = frozenset(self.files.model_states(rank)["buffer_names"])
        owned = {
            name: located
            for name, located in self.weights(rank).items()
            if name not in self._aliases and name not in buffers
        }
        if not optimizer:
            return weight_slots(owned, owned, path), without_optimizer(self.files)
        try:
            return with_all_states(self._named_slots(rank, optimizer, owned, path), self.files, rank), None
        except MismatchError as error:
            return weight_slots(owned, owned, path), error

    def _named_slots(
        self, rank: int, optimizer: Mapping[str, Any], owned: Mapping[str, Located], path: Path
    ) -> list[Slot]:
        groups = self.recorded_groups(rank)
        if groups is None and self.files.is_pipeline:
            why = ", and which layers a pipeline stage held, or shared, isn't recorded"
            raise unnamed(path, why, list(owned))
        recorded = self.manifest.parameters if self.manifest else {}
        kinds = {name: entry.kind for name, entry in recorded.items()}
        if self.topology.ep == 1 and not self.files.autoep:
            return stage0_slots(optimizer, owned, groups, path, kinds)
        named = partial(self.recorded_groups, rank)
        return stage0_expert_slots(self.files, self.topology, rank, owned, named, kinds)

    @cached_property
    def lacking(self) -> MismatchError | None:  # type: ignore[override]
        """See `Checkpoint`."""
        if self.files.partitioned:
            return None
        if self.files.param_shapes(0) is not None:
            return without_optimizer(self.files)
        found = (self._stage0_slots(rank)[1] for rank in range(self.topology.model_parallel))
        return next((error for error in found if error is not None), None)

    @cached_property
    def unrecorded(self) -> Mapping[str, str]:  # type: ignore[override]
        """Parameters of ZeRO-3 of which the files hold only the names, with the reason."""
        if not self.files.sliced or self.files.autoep:
            return {}
        known = {*self._where(0), *self._aliases}
        return {name: never_stored(self.run.ds_version) for name in self.weights(0) if name not in known}

    @cached_property
    def excluded(self) -> Mapping[str, str]:  # type: ignore[override]
        """See `Checkpoint`. The manifest tells of them."""
        return excluded(None if self.files.autoep else self.manifest, {*self.parameters, *self.tied, *self.unrecorded})

    def weights(self, rank: int) -> Mapping[str, Located]:
        """Return the weights and buffers in a model-parallel rank's files; in a pipeline those of all stages."""
        saved, path = self.files.model_states(rank), self.files.model_states_path(rank, 0)
        pipeline = self.files.is_pipeline
        weights = self.layers.on(rank % self.topology.tp) if pipeline else tensors_in(saved["module"], path)
        found = {**weights, **tensors_in(saved.get(VALUES_KEY) or {}, path)}
        for expert in () if pipeline else self.files.expert_files(rank):
            found |= tensors_in(self.files.weights(expert), expert)
        return found

    @cached_property
    def layers(self) -> PipelineLayers:
        """The files of a pipeline's layers."""
        return PipelineLayers(self.files, self.topology, self._trained_numels)

    def _trained_numels(self) -> dict[str, int]:
        trained: dict[str, int] = {}
        for rank in self._firsts:
            groups = [described_numels(group) for group in self.files.param_shapes(rank) or ()]
            if not groups and self.files.partitioned:
                groups = mapped_numels(self.topology.dp, partial(self.files.optimizer_state, rank))
            trained |= {name: numel for group in groups for name, numel in group.items()}
        return trained

    @cached_property
    def _unclaimed(self) -> list[str]:
        """Frozen parameters: keys in a pipeline's layer files that no stage trains or has as a buffer."""
        if self._recorded_stages is not None:
            return [name for name, kind in self._recorded_stages[0].items() if kind == "frozen"]
        claimed = {name for rank in self._firsts for slot in self._optimizer_slots(rank) for name in slot.names}
        claimed |= {name for rank in self._firsts for name in self.files.model_states(rank)["buffer_names"]}
        recorded = self.manifest.parameters if self.manifest else self.layers.on(0)
        return [name for name in self.layers.on(0) if name not in claimed and name in recorded]

    def recorded_groups(self, rank: int, ep_rank: int = 0) -> Groups | None:
        """Return the names in the optimizer's order on one model- and expert-parallel rank. The manifest records the first's."""
        if self.manifest is None:
            return None
        groups = self.manifest.parameter_groups[rank // self.topology.tp]
        named = iter(names_on((name for group in groups for name in group if name is not None), ep_rank))
        return [[name if name is None else next(named) for name in group] for group in groups]

    @property
    def tied(self) -> Mapping[str, str]:  # type: ignore[override]
        """See `Checkpoint`."""
        return {str(alias): str(name) for alias, name in self._aliases.items()}

    @cached_property
    def _aliases(self) -> Mapping[str, str]:
        """Names of tied parameters under which no value is stored: DeepSpeed lists them under ZeRO, else shared storage tells."""
        return tied_names(self.files, {} if self.files.is_pipeline else self.weights(0))

    @cached_property
    def _recorded_stages(self) -> list[dict[str, Kind]] | None:
        """The content of each pipeline stage, if a manifest tells all of it; frozen parameters count as the first stage's."""
        described = self.files.param_shapes(0) is not None
        stages = self.manifest.stages if self.manifest and described and self.topology.pp > 1 else None
        if stages is None:
            return None
        saved = self.layers.on(0)  # frozen parameters may be missing from the files
        kinds: list[dict[str, Kind]] = [
            {name: kind for name, kind in held.items() if kind == "trainable" or (kind == "buffer" and name in saved)}
            for held in stages
        ]
        frozen = {name: kind for held in stages for name, kind in held.items() if kind == "frozen" and name in saved}
        return [kinds[0] | frozen, *kinds[1:]]

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:  # type: ignore[override]
        """See `Checkpoint`."""
        degree, firsts = self.topology.tp, self._firsts
        stages = [
            list(self._recorded_stages[stage] if self._recorded_stages is not None else self._where(first))
            for stage, first in enumerate(firsts)
        ]
        owners: dict[str, int] = {}
        for first, held in zip(firsts, stages, strict=True):
            owners = dict.fromkeys(held, first) | owners
        owners |= {name: stage * degree for name, stage in self._copies.items()}
        recorded = self.manifest.local_shapes if self.manifest else {}
        if owners.keys() <= recorded.keys():
            shares = [{name: recorded[name] for name in held} for held in stages]
        else:
            ranks = ([self._where(first + place) for place in range(degree)] for first in firsts)
            shares = [{name: tuple(where[name][0].shape for where in held) for name in held[0]} for held in ranks]
        nothing: HeldShapes = (None,) * degree
        parameters: dict[str, Parameter] = {}
        listed = self.layers.order() if self.files.is_pipeline else self.files.model_states(0)["module"]
        order = {name: index for index, name in enumerate(listed)}
        for name in sorted(owners, key=lambda name: order.get(name, len(order))):
            shapes: HeldShapes = tuple(shape for held in shares for shape in held.get(name, nothing))
            parameters[name] = self._parameter(name, owners[name], shapes)
        return parameters

    def parameter_on(self, name: str, stage: int) -> Parameter:
        """Return the copy of a parameter that a pipeline stage holds, according to that stage's files."""
        return self._parameter(name, stage * self.topology.tp, self.parameters[name].local_shapes)

    def _parameter(self, name: str, owner: int, shapes: HeldShapes) -> Parameter:
        """Describe a parameter by the files of a model-parallel rank. For a recorded stage they are read on demand."""
        stage = owner // self.topology.tp
        differing = Deferred(
            lambda: self._numbers.scalars(owner, lambda rank: [held.slot for held in self._where(rank)[name]])
        )
        if self._recorded_stages is None:
            slot, refused = self._where(owner)[name][0].slot, self._refused(name, owner)
            unsure = slot.kind == "frozen" and not self.files.tells_buffers
            return Parameter(name, slot.kind, shapes, slot.states, slot.scalars, refused, differing, unsure, stage)
        return Parameter(
            name,
            self._recorded_stages[stage][name],
            shapes,
            Deferred(lambda: self._where(owner)[name][0].slot.states),
            Deferred(lambda: self._where(owner)[name][0].slot.scalars),
            Deferred(lambda: self._refused(name, owner)),
            differing,
            stage=stage,
        )

    def _refused(self, name: str, owner: int) -> Mapping[str, str]:
        """Return states that can't be read, with the reason. States in which a parameter's parts differ are among them."""
        first, *others = (held.slot for held in self._where(owner)[name])
        if all(same_value((other.states, other.scalars), (first.states, first.scalars)) for other in others):
            return first.refused
        differing = "expert-parallel ranks have different states of it, or took different numbers of steps"
        return {**first.refused, "step": differing}

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:  # type: ignore[override]
        """Parameter groups of all pipeline stages. Each stage numbers its own, so that their content tells them apart."""
        firsts = self._firsts
        recorded = self.manifest.group_numbers if self.manifest and self._recorded_stages is not None else None
        if self.manifest is not None and recorded is not None and self._settings(0):
            named, numbers = self.manifest.trained_groups, list(map(list, recorded))
        else:
            named = [self._trained_groups(first) for first in firsts]
            numbers = number_groups(
                [
                    [settings if names else None for names, settings in zip(held, self._settings(first), strict=True)]
                    for first, held in zip(firsts, named, strict=True)
                ]
            )
        read = {name: parameter.stage for name, parameter in self.parameters.items()}
        return join_groups(
            firsts,
            named,
            numbers,
            read,
            lambda rank, group: item_of(self._settings(rank), group, "parameter groups", self.path),
            lambda first, group: self._numbers.settings(
                first, lambda rank: [slot for slot in self._slots(rank) if slot.group == group]
            ),
        )

    def _trained_groups(self, rank: int) -> list[list[str]]:
        """Return the names in each parameter group of a model-parallel rank; none for elastic files, without hyper-parameters."""
        named: list[list[str]] = [[] for _ in self._settings(rank)]
        for slot in self._slots(rank):
            if slot.group is not None and slot.group < len(named):
                named[slot.group] += slot.names
        return named
