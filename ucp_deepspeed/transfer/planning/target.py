"""The target of a load: its model, and what each of its ranks keeps, whether an engine runs there already or not."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ucp_deepspeed.checkpoint.checkpoint import MASTER, HeldShapes, Kind
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Shape, SlotLayout, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment


@dataclass(frozen=True)
class ModelTensor:
    """A parameter or persistent buffer.

    Attributes:
        name: the first name under which the model has it.
        kind: see `ucp_deepspeed.checkpoint.checkpoint.Kind`.
        local_shapes: over the model-parallel ranks, the shapes of the whole local tensor, also where ZeRO-3 or AutoEP has
            partitioned it. They are all None where nothing tells how it would be cut.
        idle: trainable, and needs a gradient on no rank for now: an optimizer with a slot for each parameter skips it.
    """

    name: str
    kind: Kind
    local_shapes: HeldShapes
    idle: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The target of a load, the same for all of its ranks.

    Attributes:
        topology: the target's.
        tensors: tensors of all pipeline stages, by name, in the model's order.
        inferred: patterns that the model itself tells, by name: from attributes of parameters (Megatron-Core, AutoTP), or from
            the checkpoint that stands for the model.
        exact: whether they tell the whole cut, as AutoTP's do.
        refused: parameters that AutoTP has partitioned in a way that can't be told, and why.
        spec: the spec that the user named.
        vocabulary_size: rows of the unpadded vocabulary, as the user says.
        tied: further names of parameters → the first name.
        logical_names: logical names that are known already.
    """

    topology: Topology
    tensors: Mapping[str, ModelTensor]
    inferred: Mapping[str, Pattern] = field(default_factory=dict)
    exact: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    spec: Spec | None = None
    vocabulary_size: int | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    logical_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def local_shapes(self) -> dict[str, Shape]:
        """Local shapes of the tensors that the first model-parallel rank holds."""
        first = {name: tensor.local_shapes[0] for name, tensor in self.tensors.items()}
        return {name: shape for name, shape in first.items() if shape is not None}

    def named(self, *kinds: Kind) -> list[str]:
        """Return names of the tensors of some kinds, in the model's order."""
        return [name for name, tensor in self.tensors.items() if tensor.kind in kinds]


PlaceOfSteps = Literal["state", "last state", "group"]
"""``state``: a ``step`` for each tensor, as torch's optimizers do. ``last state``: the last tensor's in a
group counts for all. ``group``: one in the parameter group; see `GROUP_STEP`."""


@dataclass(frozen=True)
class KeptStates:
    """The states that an optimizer keeps for each tensor that it steps on, by name.

    Attributes:
        elementwise: states with a value for each element.
        scalars: states that are one number.
        from_zero: element-wise states that begin at zero.
        names: names of all states, also of those that are neither.
        steps: where it counts steps; None where that can't be told, it counts in both places, or in none.
    """

    elementwise: frozenset[str]
    scalars: frozenset[str]
    from_zero: frozenset[str]
    names: frozenset[str]
    steps: PlaceOfSteps | None = None


@dataclass(frozen=True)
class TargetSlot(SlotLayout):
    """Parameters that one rank keeps in one buffer: a partition of master weights, or one frozen weight or buffer.

    Attributes:
        partition: the partition that the rank holds.
        group: index of the optimizer's parameter group; -1 for frozen parameters and buffers.
        replicas: names the ranks that hold the whole buffer as this rank does; None where there are none.
        itemsize: bytes of an element.
        divisible: whether ranks may read parts of the buffer for one another: its elements lie in row-major order.
        exchangeable: whether tensor-parallel ranks can send one another parts of it.
    """

    partition: int
    group: int = -1
    replicas: Hashable | None = None
    itemsize: int = 4
    divisible: bool = True
    exchangeable: bool = True

    def fragments(self, state: str = MASTER) -> Iterator[tuple[str, Fragment[None]]]:
        """Yield the parameter's name and the place in the buffer for each run of elements of a state that the rank holds."""
        for part in self.flattening_of(state).held_by(self.partition):
            start = self.start(part.index)
            yield self.names[part.index], Fragment(start + part.local_start, part.numel, None, part.buffer_start)

    def numel(self, state: str = MASTER) -> int:
        """Return the number of elements of a state's buffer, padding included."""
        return self.flattening_of(state).buffer_numel(self.partition)


@dataclass(frozen=True)
class TargetRank:
    """A rank of the target.

    Attributes:
        model_parallel_rank: pipeline stage times tensor-parallel size plus tensor-parallel rank.
        data_parallel_rank: number of the rank's replica of the model, or of its partition.
        slots: trained parameters.
        weights: frozen parameters and buffers, each by itself.
        replicas: for each ``replicas`` of a slot the number of ranks, and this rank's number among them.
    """

    model_parallel_rank: int
    data_parallel_rank: int
    slots: tuple[TargetSlot, ...]
    weights: tuple[TargetSlot, ...]
    replicas: Mapping[Hashable, tuple[int, int]] = field(default_factory=dict)
