"""The catalog of a folder that DeepSpeed's own ``ds_to_universal`` wrote (0.19.8, ``checkpoint/ds_to_universal.py``).

Beside copies of the run's model_states files it has, for each trained parameter, a folder with a file for each state. The tensor
in it is whole: put together from all ranks, without padding. From ZeRO-3 it is flat, and the steps are in the optimizer's file
alone. Buffers and frozen parameters are where the run had them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, PositiveInt, ValidationError

from ucp_deepspeed.checkpoint.bounds import check_inside
from ucp_deepspeed.checkpoint.checkpoint import MASTER, Checkpoint, FileExtent, Parameter, ParameterGroup
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.contents import CONSOLIDATED_OPTIMIZER, check_types, item_of, value_of
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.run_state import loss_scale_of
from ucp_deepspeed.checkpoint.deepspeed.written_names import TOLD_KEY
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import ZERO_3, ZeroFile
from ucp_deepspeed.checkpoint.slots import Slot, settings_in, split_states
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.safe_load import dtype_of, extent_of, open_torch_object, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError, FormatError, worded
from ucp_deepspeed.layout import Layout, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment

ATOMS_FOLDER, OPTIMIZER_NAME = "zero", "optimizer_state.pt"
"""The folder in the tag's folder, and the file in it with all of the optimizer's state that is of no parameter."""

PLAIN_NAME, SLICED_NAME = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
"""Names of the first file with the state of the run: engines look for the first one, with ZeRO-3 for the second."""

STEP = "step"
"""Name of the file, and the state, that counts a parameter's steps."""

TENSOR, VOCABULARY, EXPERTS, NUMBER_OF_EXPERTS = "param", "vocab_tensor", "is_expert_param", "ep_num_experts"
"""Keys in an atom's file: the tensor, and marks of those whose rows are the vocabulary, and of those of all experts."""

CAT_DIM, SUB_PARAMS, SUB_PARAM_SHAPE = "cat_dim", "param_n_sub_params", "sub_param_shape"
"""Keys that tell how tensor-parallel ranks share it: the dimension, and the tensors in it, if these are several."""


class Told(BaseModel):
    """Additions of this package to a folder that it writes, so that nothing is lost when it reads it again.

    Attributes:
        patterns: by name; no others are known.
        vocabulary_size: see `Checkpoint`.
        may_be_buffers: names; see `Parameter.may_be_buffer`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    patterns: Mapping[str, Annotated[Pattern, Discriminator("pattern")]]
    vocabulary_size: PositiveInt | None
    may_be_buffers: tuple[str, ...]

    @classmethod
    def read(cls, saved: Mapping[str, Any], path: Path) -> Told | None:
        """Read it from a model_states file; None if another program has written it.

        Raises:
            DamagedCheckpointError: it can't be parsed.
        """
        if TOLD_KEY not in saved:
            return None
        try:
            return cls.model_validate_json(saved[TOLD_KEY])
        except ValidationError as error:
            raise DamagedCheckpointError(
                f"{path}: {TOLD_KEY!r} can't be parsed: {worded(error.errors()[0])}; {REMEDY}"
            ) from error


def is_consolidated(folder: Path) -> bool:
    """Return whether ``ds_to_universal`` wrote a folder."""
    return (folder / ATOMS_FOLDER).is_dir() and not any(folder.glob("*_optim_states.pt"))


class _ModelStates(DeepSpeedFiles):
    """The model_states files, without those of an optimizer."""

    has_partitions = False

    @cached_property
    def names(self) -> frozenset[str]:
        """See `DeepSpeedFiles.names`. This package writes one file under two names, of which one counts."""
        found = super().names
        return found - {SLICED_NAME} if PLAIN_NAME in found and self.told is not None else found

    @cached_property
    def told(self) -> Told | None:
        """The additions of this package, if it wrote the folder."""
        path = self.path / PLAIN_NAME
        return Told.read(self.open(path), path) if path.is_file() else None

    def expert_files(self, rank: int) -> list[Path]:
        """See `DeepSpeedFiles.expert_files`: experts are consolidated too."""
        return []


class _Beside(DeepSpeedCheckpoint):
    """The content of the model_states files: buffers, frozen parameters, and the state of the run."""

    optimizer_form = "none"

    def _optimizer_slots(self, rank: int) -> list[Slot]:
        return []


@dataclass(frozen=True)
class _Atom:
    """The files of a trained parameter.

    Attributes:
        values: what each holds, by its name: tensors, and the step.
        has_shape: whether tensors have the parameter's shape; they are flat otherwise.
        is_vocabulary: whether the rows are the vocabulary, without padding.
        is_of_experts: whether it has the experts of all ranks.
    """

    values: Mapping[str, Any]
    has_shape: bool = False
    is_vocabulary: bool = False
    is_of_experts: bool = False

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The values that are tensors."""
        return {state: value for state, value in self.values.items() if isinstance(value, torch.Tensor)}


class ConsolidatedCheckpoint(Checkpoint):
    """A folder of ``ds_to_universal``; its topology is one rank. See `Checkpoint`.

    Opening reads the model_states files of the model-parallel ranks. Asking for the parameters opens the files of all atoms.

    Attributes:
        source: topology of the run it was made from.

    Raises:
        DamagedCheckpointError: a file is missing, truncated, or disagrees with another.
        FormatError: the run was a pipeline without ``param_shapes``.
    """

    form = "deepspeed universal"

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        self._files = _ModelStates(path, verify)
        self._beside = _Beside(path, self._files)
        self.versions, self.source, self.topology = self._files.versions, self._beside.topology, Topology()
        self._open = lru_cache(maxsize=None)(self._open_atom)
        place = path / ATOMS_FOLDER / OPTIMIZER_NAME
        saved = check_types(self._opened(place), CONSOLIDATED_OPTIMIZER, place, "the optimizer's state")
        self._optimizer = saved
        self._settings = [settings_in(group, place) for group in value_of(saved, "param_groups", "the key", place)]
        self._sub_groups = ZeroFile(saved, place) if ZERO_3.masters in saved else None
        scale = loss_scale_of(saved, place) if self._beside.run.precision == "fp16" else None
        self.run = replace(self._beside.run, loss_scale=scale)
        self.recorded_shapes: Mapping[str, Shape] = {}
        self.logical_names: Mapping[str, str] = {}
        self._told = self._files.told
        self.patterns = {} if self._files.is_pipeline else self._beside.patterns
        if self._told is not None:
            self.patterns = self._told.patterns

    def _opened(self, path: Path) -> Any:
        self.versions.note(path)
        return open_torch_object(path, owned=(TENSOR,))

    @cached_property
    def _trained(self) -> Mapping[str, tuple[int, Shape]]:
        """Names of trained parameters → the flat group and the local shape on a first tensor-parallel rank."""
        found: dict[str, tuple[int, Shape]] = {}
        for rank in range(0, self.source.model_parallel, self.source.tp):
            shapes = self._files.param_shapes(rank)
            if shapes is None:
                where = self._files.model_states_path(rank, 0)
                raise FormatError(f"{where} lacks 'param_shapes', which tell the trained parameters of {self.path}")
            for index, group in enumerate(shapes):
                found = {name: (index, tuple(shape)) for name, shape in group.items()} | found
        return found

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:  # type: ignore[override]
        """See `Checkpoint`."""
        order = [] if self._files.is_pipeline else list(self._files.model_states(0)["module"])
        names = [name for name in order if name in self._trained]
        atoms = {name: self._atom(name) for name in dict.fromkeys((*names, *self._trained))}
        beside = {name: self._whole(held) for name, held in self._others.items()}
        found = atoms | beside
        return {name: found[name] for name in dict.fromkeys((*order, *found)) if name in found}

    @cached_property
    def _others(self) -> Mapping[str, Parameter]:
        """Frozen parameters and buffers. A pipeline's were in files that aren't copied."""
        if self._files.is_pipeline:
            return {}
        return {name: held for name, held in self._beside.parameters.items() if name not in self._trained}

    @property
    def unrecorded(self) -> Mapping[str, str]:  # type: ignore[override]
        """See `Checkpoint`: buffers and frozen parameters of a pipeline."""
        if not self._files.is_pipeline:
            return {name: why for name, why in self._beside.unrecorded.items() if name not in self._trained}
        saved = [self._files.model_states(rank) for rank in range(0, self.source.model_parallel, self.source.tp)]
        names = [name for held in saved for name in (*held["buffer_names"], *(held.get("frozen_param_shapes") or ()))]
        return dict.fromkeys(names, "ds_to_universal doesn't copy a pipeline's layer files")

    def _whole(self, held: Parameter) -> Parameter:
        """Describe a buffer or frozen parameter as one rank's."""
        unsure = self._told is not None and held.name in self._told.may_be_buffers
        return replace(held, local_shapes=(self.layout(held.name).logical_shape,), stage=None, may_be_buffer=unsure)

    def _atom(self, name: str) -> Parameter:
        """Describe a trained parameter by its files, or raise DamagedCheckpointError where they don't fit together."""
        atom, (index, local) = self._open(name), self._trained[name]
        folder = self.path / ATOMS_FOLDER / name
        if MASTER not in atom.tensors:
            raise DamagedCheckpointError(f"{folder} lacks {MASTER}.pt; {REMEDY}")
        master = atom.tensors[MASTER]
        shape = tuple(master.shape) if atom.has_shape else local
        known = self.source.tp == 1 and not (atom.is_vocabulary or atom.is_of_experts)
        if master.numel() != prod(shape) or (known and shape != local):
            raise DamagedCheckpointError(
                f"{folder}/{MASTER}.pt has shape {tuple(master.shape)}; the model_states files say {local}: files of two runs; "
                f"{REMEDY}"
            )
        rest = {state: value for state, value in atom.values.items() if state != MASTER}
        found = split_states({**rest, **self._counted(index)}, master, folder)
        states = {state: dtype_of(atom.tensors[state], folder) for state in (MASTER, *found.states)}
        return Parameter(name, "trainable", (shape,), states, found.scalars, found.refused)

    def _counted(self, index: int) -> dict[str, float]:
        """Return the step of a flat group, if the optimizer's file has it."""
        if self._sub_groups is None:
            return {}
        step = self._sub_groups.state(index).get("step")
        return {} if step is None else {"step": scalar_of(step, self._sub_groups.path)}

    def _open_atom(self, name: str) -> _Atom:
        """Open the files of a trained parameter."""
        folder = self.path / ATOMS_FOLDER / name
        if Path(name).name != name or not folder.is_dir():
            raise DamagedCheckpointError(f"{folder} is no folder with the files of {name}; {REMEDY}")
        values: dict[str, Any] = {}
        marks: dict[str, bool] = {}
        for path in sorted(folder.glob("*.pt")):
            check_inside(path)
            held = self._opened(path)
            if isinstance(held, dict):
                marks = {
                    "has_shape": True,
                    "is_vocabulary": bool(held.get(VOCABULARY)),
                    "is_of_experts": bool(held.get(EXPERTS)),
                }
                held = value_of(held, TENSOR, "the key", path)
            if not isinstance(held, (torch.Tensor, int, float)):
                raise DamagedCheckpointError(
                    f"{path} holds a {type(held).__name__} where a tensor or a number is expected"
                )
            state = path.name.removesuffix(".pt")
            values[state] = scalar_of(held, path) if state == STEP else held
        return _Atom(values, **marks)

    def layout(self, name: str) -> Layout:
        """See `Checkpoint.layout`."""
        if name in self._trained:
            return Layout.whole(self.parameters[name].local_shapes[0] or ())
        held, degree = self._others[name], self.source.tp
        start = (held.stage or 0) * degree
        shapes = [shape for shape in held.local_shapes[start : start + degree] if shape is not None]
        pattern = self._beside.patterns.get(name)
        if pattern is None or degree == 1:
            return Layout.whole(shapes[0])
        return pattern.layout(pattern.logical_shape(shapes, self.vocabulary_size), shapes)

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        if name in self._trained:
            extent = extent_of(self._open(name).tensors[state], self.path / ATOMS_FOLDER / name / f"{state}.pt")
            yield Fragment(local_start, local_stop - local_start, extent, local_start)
        else:
            first = (self._others[name].stage or 0) * self.source.tp
            yield from self._beside.fragments(name, state, first + rank, local_start, local_stop)

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:  # type: ignore[override]
        """See `Checkpoint`."""
        number = self._sub_groups.group_of if self._sub_groups is not None else int
        names: list[list[str]] = [[] for _ in self._settings]
        for name, (index, _) in self._trained.items():
            item_of(names, number(index), "parameter groups", self.path / ATOMS_FOLDER / OPTIMIZER_NAME).append(name)
        return tuple(
            ParameterGroup(tuple(held), settings) for held, settings in zip(names, self._settings, strict=True)
        )

    @cached_property
    def vocabulary_size(self) -> int | None:  # type: ignore[override]
        """See `Checkpoint`."""
        if self._told is not None:
            return self._told.vocabulary_size
        marked = (name for name in self._trained if self._open(name).is_vocabulary)
        rows = next((self._open(name).tensors[MASTER].shape[0] for name in marked), None)
        return rows if rows is not None else self._beside.vocabulary_size

    @cached_property
    def refused(self) -> Mapping[str, str]:  # type: ignore[override]
        """See `Checkpoint`: frozen parameters of several tensor-parallel ranks."""
        unknown = {
            name: "nothing tells how tensor-parallel ranks have cut it"
            for name, held in self._others.items()
            if self.source.tp > 1 and held.kind == "frozen" and name not in self._beside.patterns
        }
        return unknown | {name: why for name, why in self._beside.refused.items() if name in self._others}

    @property
    def tied(self) -> Mapping[str, str]:  # type: ignore[override]
        """See `Checkpoint`."""
        return self._beside.tied

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`."""
        return self._beside.client_state(rank, partition)

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """See `Checkpoint.unreadable`."""
        return self._beside.unreadable(rank, partition)

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """See `Checkpoint.extra_states`."""
        return ({},) if self._files.is_pipeline else self._beside.extra_states()[:1]

    def check_sizes(self) -> None:
        """See `Checkpoint.check_sizes`."""
        self._beside.check_sizes()
