"""What every form of checkpoint offers: the types of the catalog."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment

Kind = Literal["trainable", "frozen", "buffer"]
"""``trainable`` parameters have an fp32 master weight and optimizer states; the others one state, ``weight``."""

Precision = Literal["fp32", "bf16", "fp16"]

OnUnreadable = Literal["error", "drop"]
"""What to do about what files hold and nobody can read, or ought to hold and don't: refuse the checkpoint, or leave it out."""

MASTER = "fp32"
"""Name of the state that holds a trainable parameter's master weight."""

WEIGHT = "weight"
"""Name of the one state of a frozen parameter or a buffer."""


WEIGHTS_HINT = (
    'load_module_only=True or load_optimizer_states=False loads the weights, "optimizer_states": "reset" those and the rest, '
    "with the optimizer's state as before a first step"
)
"""The way on where a checkpoint's optimizer state is out of reach."""

IMPLEMENTATION_SWITCHES = frozenset(("foreach", "fused", "capturable", "differentiable", "name", "moe", "param_names"))
"""Hyper-parameters that choose how a machine computes, not what: each side keeps its own, and all others are restored.
``name`` and ``moe`` are DeepSpeed's marks on groups of experts, which say over which ranks they are cut. ``param_names`` is
torch's list of what is in the group."""

GROUP_STEP = "step"
"""Where some optimizers count steps in a parameter group, from the first step on: Apex's and Transformer Engine's ``FusedAdam``.
In DeepSpeed's it stays 0, and each parameter has its own."""


@dataclass(frozen=True, slots=True)
class FileExtent:
    """A one-dimensional run of elements in a file.

    Attributes:
        path: the file.
        file_offset: position of the first element, in bytes.
        dtype: a key of `ucp_deepspeed.dtypes.ITEMSIZE`.
        numel: length, in elements.
    """

    path: str
    file_offset: int
    dtype: str
    numel: int


Differing = Mapping[str, Mapping[str, Any]]
"""Numbers that aren't the same on all partitions of a checkpoint, by name → for each partition, in words, its value."""

HeldShapes = tuple[Shape | None, ...]
"""Shape of each model-parallel rank's local tensor, stage by stage; None where a pipeline stage holds none."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter or buffer of the model.

    Attributes:
        name: as in the model's ``state_dict``.
        kind: see `Kind`.
        local_shapes: see `HeldShapes`.
        states: element-wise states that the checkpoint holds → their dtype.
        scalars: states that are one number (``step``).
        refused: states that can't be restored → why: of no element-wise form, such as factored moments, or of another dtype than
            `ucp_deepspeed.dtypes` lists.
        differing: of the scalars, which are the first partition's, those that other partitions have other values of.
        may_be_buffer: it counts as frozen, and nothing tells whether it is a buffer.
        stage: the pipeline stage whose copy is read, where several may hold one; None for the first that does.
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

    @property
    def idle(self) -> bool:
        """False: a checkpoint tells what was trained, and not what needs no gradient for now."""
        return False


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """One parameter group of the optimizer: hyper-parameters follow the names in it, not its position.

    Attributes:
        names: its parameters.
        hyperparameters: as on the first partition.
        differing: those of them that other partitions have other values of.
    """

    names: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    differing: Differing = field(default_factory=dict)


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
    """Where the run stood, besides its tensors."""

    precision: Precision
    global_steps: int
    global_samples: int | None
    skipped_steps: int
    lr_scheduler: Mapping[str, Any] | None
    loss_scale: LossScale | None
    ds_version: str


SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
"""Values of a `LossScale` that every class keeps."""


class Checkpoint(ABC):
    """A catalog. Created by `open_checkpoint` on any rank; all ranks see the same.

    Attributes:
        path: the tag folder.
        form: what wrote it, for people: ``deepspeed zero-3``, ``universal 1``, …
        topology: of the run that saved it.
        run: counters, scheduler and loss scale.
        parameters: by name, in the model's order.
        groups: the optimizer's parameter groups.
        patterns: pattern of each parameter in the run that saved, as far as the checkpoint records it.
        refused: parameters of which it records that their layout can't be told, and why.
        lacking: why the optimizer's state is in no file, or nobody can tell whose it is; for whoever needs it to raise. Weights
            then stand for the masters.
        unrecorded: parameters that the model had and whose value is in no file, and why; they aren't among ``parameters``.
        recorded_shapes: whole shape of each parameter, as a manifest or AutoTP records it of the files beside it.
        logical_names: name that a spec gave to each parameter when saving, where it isn't its own.
        vocabulary_size: rows of the unpadded vocabulary, where recorded.
        tied: further names of parameters → the name that each has here, as far as the checkpoint tells.
        copies: parameters that are tied to others in the files, and not in the model that they are for → those others.
        versions: of the files that have been opened; whoever reads others notes them too, and checks in the end.
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
        """Where the flat interval of a model-parallel rank's local tensor lies, in local order.

        Raises:
            KeyError: no such parameter or state.
            DamagedCheckpointError: a file that holds a part of it is missing, truncated or of another size than expected.
        """

    @abstractmethod
    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        """What ``engine.load_checkpoint`` returns: the path of the file with the common state, and that state's top level.

        Args:
            rank: model-parallel rank; a native checkpoint has such a file for each.
            partition: data-parallel rank; with ZeRO-3 a native checkpoint has such a file for each.
        """

    def unreadable(self, rank: int = 0, partition: int = 0) -> Mapping[str, str]:
        """Keys of the client state that are left out, since they can't be read without running code of a class → that class.

        Args: as of `client_state`.
        """
        return {}

    @abstractmethod
    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """For each tensor-parallel rank what modules' ``get_extra_state`` returned, but None, by key of the ``state_dict``."""

    def check_sizes(self) -> None:
        """Compare the sizes of all files with what is recorded of them; a load checks those that it opens.

        Raises:
            DamagedCheckpointError: a file is truncated, or isn't the one that was recorded.
        """
