"""DeepSpeed's own universal folder as an output: what an engine without this package loads with ``"load_universal": true``.

Names and keys: DeepSpeed 0.19.8, ``checkpoint/ds_to_universal.py`` (which writes such folders from DeepSpeed's own files),
``checkpoint/universal_checkpoint.py``, ``runtime/base_optimizer.py`` and ``runtime/zero/stage3.py`` (which load them).
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint import random_files
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, OnUnreadable, RunState
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.dcp.record import Record
from ucp_deepspeed.checkpoint.deepspeed.autoep import is_stacked
from ucp_deepspeed.checkpoint.deepspeed.consolidated import (
    ATOMS_FOLDER,
    CAT_DIM,
    EXPERTS,
    NUMBER_OF_EXPERTS,
    OPTIMIZER_NAME,
    PLAIN_NAME,
    SLICED_NAME,
    STEP,
    SUB_PARAM_SHAPE,
    SUB_PARAMS,
    TENSOR,
    VOCABULARY,
    Told,
)
from ucp_deepspeed.checkpoint.deepspeed.run_state import scaler_of
from ucp_deepspeed.checkpoint.deepspeed.written_names import TOLD_KEY
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.expert_names import expert_of, mixes_experts
from ucp_deepspeed.checkpoint.output import Output, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.slots import number_as_kept
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS, open_torch_file
from ucp_deepspeed.checkpoint.torch_files.unpickling import SubparamShape
from ucp_deepspeed.checkpoint.torch_files.writing import ArchiveFile, value_archive, write_sums
from ucp_deepspeed.checkpoint.universal.atoms_output import describe
from ucp_deepspeed.checkpoint.universal.index import Index
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MAX_LISTED, UnsupportedError
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.pattern import AnyPattern, Replicate, Shard, ShardGrid, Unique

FORM_VERSION = "0.19.8"
"""Version of DeepSpeed whose form is written."""

LOADED_AT_STAGE_3 = frozenset(("exp_avg", "exp_avg_sq"))
"""The states that ZeRO-3 loads, and whose files it needs."""

LONGEST_NAME = 255
"""Most bytes in the name of a folder."""

OTHER_FORMS = "--to universal and --to dcp keep it"


@dataclass(frozen=True)
class ConsolidatedOutput(Output):
    """See `Output`, and `ucp_deepspeed.checkpoint.universal.atoms_output.describe`.

    Attributes:
        own_names: whether parameters have the names of the model that was trained, as DeepSpeed's own tool gives them; else those
            of the view, which a spec may have given.
        bare: whether the files of states hold flat tensors alone, as DeepSpeed's tool does for ZeRO-3, which before 0.19.4
            loads no others. ZeRO-1 and 2, and tensor parallelism, need more than that.
    """

    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"
    own_names: bool = True
    bare: bool = False

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`, and `describe` for further errors."""
        view = self._named(view)
        homes = {(name, state): "" for name, each in view.parameters.items() for state in each.states}
        index, tensors = describe(view, homes, self.drop_client_state, self.on_unreadable, self.on_differing)
        record = Record(view.checkpoint.path, index, tensors)
        _check_form(view, record)
        files = [
            *_atoms(view, record, self.bare),
            value_archive(f"{ATOMS_FOLDER}/{OPTIMIZER_NAME}", _optimizer(view, record)),
            value_archive(PLAIN_NAME, _model_states(view, record)),
        ]
        archives = tuple(each.file for each in files)
        return OutputPlan(archives, _finish, finish_records=partial(write_sums, files), view=view)

    def _named(self, view: UniversalView) -> UniversalView:
        names = (*view.logical_of, *view.checkpoint.tied)
        return view.under({name: name for name in names}) if self.own_names else view

    def notes(self, view: UniversalView) -> list[str]:
        """See `Output.notes`."""
        view = self._named(view)
        return [*_lost(view), *_otherwise_at_stage_3(view), *(() if self.bare else _unknown_layouts(view))]


def _finish(folder: Path, sums: Sequence[FileSums]) -> None:
    """Give the file with the run's state its second name. Open what isn't a parameter's: what can't be opened isn't committed."""
    try:
        os.link(folder / PLAIN_NAME, folder / SLICED_NAME)
    except OSError:  # a file system without links
        shutil.copyfile(folder / PLAIN_NAME, folder / SLICED_NAME)
    for name in (PLAIN_NAME, f"{ATOMS_FOLDER}/{OPTIMIZER_NAME}"):
        open_torch_file(folder / name)


def _trained(view: UniversalView) -> list[str]:
    return [name for name, parameter in view.parameters.items() if parameter.kind == "trainable"]


def _atoms(view: UniversalView, record: Record, bare: bool) -> Iterator[ArchiveFile]:
    """Yield the files of each trained parameter, one for each state."""
    for name in _trained(view):
        marks = marks_of(name, view.patterns[name], view.logical_shape(name))
        for state in view.parameters[name].states:
            region = Region.whole(view, name, state)
            held = StoredTensor((region.numel,), (region,)) if bare else {**marks, TENSOR: StoredTensor.of(region)}
            yield value_archive(f"{ATOMS_FOLDER}/{name}/{state}.pt", held)
        if STEP in (scalars := record.scalars(name)):
            yield value_archive(f"{ATOMS_FOLDER}/{name}/{STEP}.pt", number_as_kept(scalars[STEP]))


def marks_of(name: str, pattern: AnyPattern, shape: Shape) -> dict[str, Any]:
    """Return what an atom's file says of the parameter beside its tensor: how tensor-parallel ranks share it, and experts.

    Args:
        shape: of the whole parameter.
    """
    if is_stacked(name, shape):
        return {CAT_DIM: 0, EXPERTS: True, NUMBER_OF_EXPERTS: shape[0]}
    if not isinstance(pattern, Shard):
        return {}
    if len(pattern.parts) == 1:
        return {CAT_DIM: pattern.dim, **({VOCABULARY: True} if pattern.vocabulary else {})}
    if len(set(pattern.parts)) == 1:
        return {CAT_DIM: pattern.dim, SUB_PARAMS: len(pattern.parts)}
    unit = shape[pattern.dim] // sum(pattern.parts)
    sizes = tuple(unit * part for part in pattern.parts)
    extents = tuple(sizes if dim == pattern.dim else extent for dim, extent in enumerate(shape))
    return {SUB_PARAM_SHAPE: SubparamShape([], extents, pattern.dim)}


def _optimizer(view: UniversalView, record: Record) -> dict[str, Any]:
    """Return what the optimizer keeps beside the states of parameters: under ZeRO-1's and 2's keys, and under ZeRO-3's."""
    groups = [{**group.hyperparameters, "params": [number]} for number, group in enumerate(record.groups)]
    scale = record.run.loss_scale
    config = record.values("client_state").get("ds_config")
    scaling = {} if scale is None else {"loss_scaler": scaler_of(scale, config), "dynamic_loss_scale": scale.dynamic}
    steps = (record.scalars(name) for name in _trained(view))
    step = next((held[STEP] for held in steps if STEP in held), None)
    state = {} if step is None else {STEP: number_as_kept(step)}
    base = {"state": {0: state}, "param_groups": groups}
    return {**scaling, "ds_version": FORM_VERSION, "param_groups": groups, "optimizer_state_dict": base}


def _model_states(view: UniversalView, record: Record) -> dict[str, Any]:
    """Return the state of the run, as ``runtime/engine.py::_common_checkpoint_state`` has it."""
    run, shapes = record.run, {name: torch.Size(view.logical_shape(name)) for name in view.parameters}
    buffers = [name for name, parameter in view.parameters.items() if parameter.kind == "buffer"]
    client_state = record.values("client_state")
    return {
        "module": {**_module(view), **record.values("extra_states")},
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [OrderedDict((name, shapes[name]) for name in group.names) for group in record.groups],
        "shared_params": dict(view.tied),
        "lr_scheduler": None if run.lr_scheduler is None else dict(run.lr_scheduler),
        **_counters(run),
        "dp_world_size": record.index.source.dp,
        "mp_world_size": 1,
        "ds_version": run.ds_version,
        **client_state,
        TOLD_KEY: _told(record.index).model_dump_json(),
    }


def _told(index: Index) -> Told:
    unsure = tuple(name for name, entry in index.parameters.items() if entry.may_be_buffer)
    return Told(patterns=index.told_patterns, vocabulary_size=index.vocabulary_size, may_be_buffers=unsure)


def _module(view: UniversalView) -> dict[str, Any]:
    """Return the module's tensors: as with ZeRO-3, trained ones are empty, since their values lie in the atoms."""
    empty = torch.empty(0, dtype=PRECISIONS[view.checkpoint.run.precision])
    return {
        name: empty if parameter.kind == "trainable" else StoredTensor.of(Region.whole(view, name, WEIGHT))
        for name, parameter in view.parameters.items()
    }


def _counters(run: RunState) -> dict[str, int]:
    found = {"skipped_steps": run.skipped_steps, "global_steps": run.global_steps}
    return found if run.global_samples is None else {**found, "global_samples": run.global_samples}


def _check_form(view: UniversalView, record: Record) -> None:
    """Check that the form can hold what makes the run go on as it was.

    Raises:
        UnsupportedError: it can't; lists the parameters.
    """
    problems = [*_unfit_scale(record), *_unfit_names(view), *_unfit_numbers(view, record), *_unfit_groups(view, record)]
    if problems:
        told = f"{view.checkpoint.path} doesn't fit into DeepSpeed's universal folder, {OTHER_FORMS}"
        raise UnsupportedError("\n  ".join([f"{told}:", *problems[:MAX_LISTED]]))


def _unfit_scale(record: Record) -> Iterator[str]:
    if record.run.precision == "fp16" and record.run.loss_scale is None:
        yield "it has no loss scale, with which DeepSpeed resumes in fp16"


def _unfit_names(view: UniversalView) -> Iterator[str]:
    for name in _trained(view):
        if "/" in name or name in (".", "..") or len(name.encode()) > LONGEST_NAME:
            yield f"{name}: no folder can have this name"


def _unfit_numbers(view: UniversalView, record: Record) -> Iterator[str]:
    for name in _trained(view):
        for key in record.scalars(name).keys() - {STEP}:
            yield f"{name}: its optimizer's state has the number {key!r}, for which there is no place"


def _unfit_groups(view: UniversalView, record: Record) -> Iterator[str]:
    """Yield the groups that DeepSpeed can't load: it takes states and steps of all parameters in a group as the same."""
    listed = {name for group in record.groups for name in group.names}
    for name in _trained(view):
        if name not in listed:
            yield f"{name}: it is in no parameter group"
    for number, group in enumerate(record.groups):
        if mixes_experts(group.names):
            yield f"parameter group {number} has experts and others, as engines with ZeRO, which load the folder, can't have"
        held = {
            (tuple(sorted(view.parameters[name].states)), record.scalars(name).get(STEP)): name for name in group.names
        }
        if len(held) > 1:
            names = list(held.values())
            yield f"{names[0]} and {names[1]}, both of parameter group {number}, have different states or numbers of steps"


def _lost(view: UniversalView) -> Iterator[str]:
    """Yield what the folder has no place for, or what DeepSpeed's load doesn't look at."""
    yield from random_files.left_out(view.checkpoint)
    aside = [name for name, parameter in view.parameters.items() if parameter.kind != "trainable"]
    if aside:
        yield (
            f"buffers and frozen parameters, {len(aside)} in all, are in the folder; DeepSpeed by itself doesn't load them, "
            f"and the model keeps its own"
        )
    if any(expert_of(name) for name in view.parameters):
        yield "DeepSpeed by itself loads experts of its MoE layers with an expert-parallel size of 1 alone"
    renamed = next((pair for pair in view.logical_of.items() if pair[0] != pair[1]), None)
    if renamed is not None:
        yield f"names are those that the spec gives, such as {renamed[1]} for {renamed[0]}: the model must have them"


def _otherwise_at_stage_3(view: UniversalView) -> Iterator[str]:
    """Yield the differences between DeepSpeed's load into a ZeRO-3 engine and that into others."""
    states = {state for name in _trained(view) for state in view.parameters[name].states} - {MASTER}
    if states != LOADED_AT_STAGE_3:
        found = ", ".join(sorted(states)) or "none"
        yield f"DeepSpeed by itself loads Adam's states alone into a ZeRO-3 engine, and here are: {found}"
    counted = [[view.parameters[name].scalars.get(STEP) for name in group.names] for group in view.groups]
    kept = [(dict(group.hyperparameters), steps[:1]) for group, steps in zip(view.groups, counted, strict=True)]
    if any(each != kept[0] for each in kept):
        yield (
            f"DeepSpeed by itself gives all {len(kept)} groups of a ZeRO-3 engine the hyper-parameters and steps of the first"
        )


def _unknown_layouts(view: UniversalView) -> Iterator[str]:
    """Yield the parameters that DeepSpeed would cut wrongly for tensor-parallel ranks. AutoTP knows its own layouts."""
    unknown = [name for name in _trained(view) if isinstance(view.patterns[name], Unique)]
    if unknown:
        yield (
            f"for an engine with tensor parallelism other than AutoTP's, convert with --spec: nothing tells how its ranks would "
            f"share {len(unknown)} parameters, such as {unknown[0]}"
        )
    others = [name for name in _trained(view) if _is_beyond(view.patterns[name])]
    if others:
        yield f"DeepSpeed by itself can't share {len(others)} parameters among tensor-parallel ranks, such as {others[0]}"


def _is_beyond(pattern: AnyPattern) -> bool:
    """Return whether the marks of an atom can't express a pattern."""
    scaled = isinstance(pattern, Replicate) and pattern.scale is not None
    return scaled or isinstance(pattern, ShardGrid) or (isinstance(pattern, Shard) and pattern.widths is not None)
