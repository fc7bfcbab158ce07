"""The model to load into, as a plan sees it: a live engine's, or the one that a checkpoint was saved of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, Kind
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern


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
