"""The common interface of all forms of checkpoint: the types of the catalog."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from operator import mul
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Layout, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment, Source, Target, plan_tensor

T = TypeVar("T")

Kind = Literal["trainable", "frozen", "buffer"]
"""``trainable`` parameters have an fp32 master weight and optimizer states; the others one state, ``weight``."""

Precision = Literal["fp32", "bf16", "fp16"]

OnUnreadable = Literal["error", "drop"]
"""Policy for data that can't be read, or that files lack but should hold: refuse the checkpoint, or leave the data out."""

MASTER = "fp32"
"""Name of the state that holds a trainable parameter's master weight."""

WEIGHT = "weight"
"""Name of the one state of a frozen parameter or a buffer."""

WEIGHTS_HINT = (
    'load_module_only=True or load_optimizer_states=False loads the weights, "optimizer_states": "reset" those and the rest, '
    "with the optimizer's state as before a first step"
)
"""The user's options if a checkpoint's optimizer state is out of reach."""

IMPLEMENTATION_SWITCHES = frozenset(("foreach", "fused", "capturable", "differentiable", "name", "moe", "param_names"))
"""Hyper-parameters that choose how a machine computes, not the result: each side keeps its own, and all others are restored.
``name`` and ``moe`` are DeepSpeed's marks on groups of experts, ``param_names`` is torch's list of the group's parameters."""

GROUP_STEP = "step"
"""Key of a parameter group in which Apex's and Transformer Engine's ``FusedAdam`` count steps, from the first step on. Other
optimizers count under this key in each parameter's state; in DeepSpeed's ``FusedAdam`` the group's stays 0."""


@dataclass(frozen=True, slots=True)
class FileExtent:
    """A run of ``numel`` elements in a file, from a byte on; ``dtype`` is a key of `ucp_deepspeed.dtypes.ITEMSIZE`."""

    path: str
    file_offset: int
    dtype: str
    numel: int


Differing = Mapping[str, Mapping[str, Any]]
"""Numbers that differ between partitions of a checkpoint, by name → for each partition, in words, its value."""

HeldShapes = tuple[Shape | None, ...]
"""Shape of each model-parallel rank's local tensor, stage by stage; None if a pipeline stage holds none."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of the model.

    Attributes:
        name: name in the model's ``state_dict``.
        kind: see `Kind`.
        local_shapes: see `HeldShapes`.
        states: element-wise states that the checkpoint holds → their dtype.
        scalars: states that are one number (``step``).
        refused: states that can't be restored → why: they aren't element-wise, such as factored moments, or their dtype isn't in
            `ucp_deepspeed.dtypes`.
        differing: scalars for which other partitions have other values; ``scalars`` holds the first partition's.
        may_be_buffer: it counts as frozen, but nothing tells whether it is a buffer.
        stage: pipeline stage whose copy is read, if several may hold one; None for the first that holds it.
    """

    name: str
    kind: Kind
    local_shapes: HeldShapes
    states: Mapping[str, str]
    scalars: Mapping[str, float]
    refused: Mapping[str, str] = field(default_factory=dict)
    differing: Differing = field(default_factory=dict)
    may_be_buffer: bool = False
    stage: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A parameter group of the optimizer: hyper-parameters belong to the names in it, not to its position.

    They are the first partition's; ``differing`` has those for which other partitions have other values.
    """

    names: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    differing: Differing = field(default_factory=dict)


def step_in_group(parameter: Parameter, hyperparameters: Mapping[str, Any]) -> float | None:
    """Return the step of a parameter whose group alone counts; None if the parameter has a count, or no step was taken."""
    step, stepped = hyperparameters.get(GROUP_STEP), parameter.states.keys() - {MASTER, WEIGHT} or parameter.scalars
    if not stepped or GROUP_STEP in parameter.scalars or not isinstance(step, (int, float)) or step <= 0:
        return None
    return step


@dataclass(frozen=True, slots=True)
class LossScale:
    """State of fp16 loss scaling, under the names of DeepSpeed's ``DynamicLossScaler``.

    Attributes:
        dynamic: whether the scale adapts.
        values: ``cur_scale`` and, when dynamic, ``cur_iter``, ``last_overflow_iter``, ``scale_factor``, ``scale_window`` and
            whatever else the source's scaler keeps.
    """

    dynamic: bool
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of the run, besides its tensors."""

    precision: Precision
    global_steps: int
    global_samples: int | None
    skipped_steps: int
    lr_scheduler: Mapping[str, Any] | None
    loss_scale: LossScale | None
    ds_version: str


SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
"""Values of a `LossScale` that every class keeps."""


class Deferred(Mapping[str, T]):
    """The mapping that a function returns, such as one that opens files. The first look into it calls the function."""

    def __init__(self, read: Callable[[], Mapping[str, T]]) -> None:
        self._read = read

    @cached_property
    def _held(self) -> Mapping[str, T]:
        return self._read()

    def __getitem__(self, key: str) -> T:
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(self._held)


class Checkpoint(ABC):
    """A catalog. Created by `open_checkpoint` on any rank; all ranks see the same.

    Attributes:
        path: the tag folder.
        form: name of the writer and form, for people: ``deepspeed zero-3``, ``universal 2``, …
        topology: topology of the run that saved it.
        parameters: parameters and buffers by name, in the model's order.
        patterns: pattern of each parameter in the run that saved, if the checkpoint records it.
        refused: parameters whose layout can't be told, according to the checkpoint, with the reason.
        lacking: why no file holds the optimizer's state, or why its owner can't be told; code that needs the state raises it. The
            weights then replace the masters.
        unrecorded: parameters that the model had but whose value is in no file, and why; they aren't among ``parameters``.
        excluded: parameters that the save left out on demand, with the reason; to a load they are missing.
        recorded_shapes: whole shape of each parameter, as a manifest or AutoTP records it for the files beside it.
        logical_names: name that a spec gave to each parameter when saving, if it isn't its own.
        vocabulary_size: rows of the unpadded vocabulary, if recorded.
        tied: further names of parameters → the name that each has here, if the checkpoint tells.
        copies: parameters that are tied to others in the files, but not in the target model → those others.
        versions: versions of the opened files; code that reads other files notes them too, and checks all at the end.
    """

    path: Path
    form: str
    topology: Topology
    run: RunState
    parameters: Mapping[str, Parameter]
    groups: tuple[ParameterGroup, ...]
    patterns: Mapping[str, Pattern]
    refused: Mapping[str, str] = {}
    lacking: MismatchError | None = None
    unrecorded: Mapping[str, str] = {}
    excluded: Mapping[str, str] = {}
    recorded_shapes: Mapping[str, Shape]
    logical_names: Mapping[str, str]
    vocabulary_size: int | None
    tied: Mapping[str, str] = MappingProxyType({})
    copies: Mapping[str, str] = MappingProxyType({})
    versions: FileVersions

    @abstractmethod
    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """Yield the file ranges of a flat interval of a model-parallel rank's local tensor, in local order.

        Args:
            rank: the model-parallel rank; of a parameter with a `layout`, the number of one of its boxes.

        Raises:
            KeyError: no such parameter or state.
            DamagedCheckpointError: a file that holds a part of it is missing, truncated or of another size than expected.
        """

    def layout(self, name: str) -> Layout | None:
        """Return which boxes of a whole tensor the files hold, for forms that know boxes and not patterns.

        Each box is a local tensor of the layout, whichever rank wrote it; all states are cut alike. To the form's users the
        parameter is whole: its topology is that of one rank, whose local shape is the whole shape.

        Returns:
            None for forms whose boxes follow from ranks, local shapes and patterns.

        Raises:
            ValueError: the boxes don't cover the tensor, or overlap without being equal.
        """
        return None

    def local_fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """Yield `fragments` of a model-parallel rank's local tensor, also of a parameter with a `layout`: there, row by row."""
        layout = self.layout(name)
        if layout is None:
            yield from self.fragments(name, state, rank, local_start, local_stop)
            return
        source = Source(layout, lambda box, start, stop: self.fragments(name, state, box, start, stop))
        wanted = Fragment(local_start, local_stop - local_start, None, local_start)
        rows: list[Fragment[FileExtent]] = []
        for copy in plan_tensor(source, Target(Layout.whole(layout.logical_shape), 0, (wanted,)), state):
            (view,), numel = copy.sources, copy.shape[-1] if copy.shape else 1
            for row in product(*map(range, copy.shape[:-1])):
                steps = [sum(map(mul, row, strides)) for strides in (copy.target.strides, view.strides)]
                rows.append(Fragment(copy.target.start + steps[0], numel, view.buffer, view.start + steps[1]))
        yield from sorted(rows, key=lambda row: row.local_start)

    @abstractmethod
    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """Return the result of ``engine.load_checkpoint``: path of the file with the common state, and that state's top level.

        Args:
            rank: model-parallel rank; a native checkpoint has such a file for each.
            partition: data-parallel rank; with ZeRO-3 a native checkpoint has such a file for each.
        """

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """Keys of `client_state` that are left out because reading them would run code of a class → that class."""
        return {}

    @abstractmethod
    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """Return for each tensor-parallel rank the results of ``get_extra_state``, except None, by key of the ``state_dict``."""

    def check_sizes(self) -> None:
        """Raise a DamagedCheckpointError if some file hasn't the recorded size; a load checks the files that it opens."""
