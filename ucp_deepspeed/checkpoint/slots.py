"""Slots: what the families of DeepSpeed's optimizers have in common.

Every family keeps its tensors in *slots*: a flat buffer for each partition, holding some parameters end to end, and with it one
buffer of the same layout per optimizer state. ZeRO-1/2 has one slot per parameter group, ZeRO-3 one per sub-group, the stage-0
fp16/bf16 wrapper one per group or one per parameter, a plain torch optimizer one per parameter. Only where a slot's buffer is
found in the files differs; that is the `tensor` function each family gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent, Kind
from ucp_deepspeed.checkpoint.torch_files import TORCH_DTYPES, extent_of, read_tensors, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import FlatGroup, Flattening, OverlappingGroup, Shape

Located = tuple[torch.Tensor, Path]
"""A described tensor and the file it is in."""

NAMING_KEYS = ("params", "param_names")
"""Of a parameter group: what is in it."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one partition's optimizer keeps beside tensors.

    Attributes:
        scalars: states of a slot that are one number.
        settings: hyper-parameters of its group; none in elastic files.
    """

    scalars: Mapping[str, float]
    settings: Mapping[str, Any]


NumbersReader = Callable[[], Numbers]
"""Reads the numbers in the file of one rank."""


def place_of(kind: Literal["partition", "expert-parallel rank"], number: int) -> str:
    """A rank whose optimizer keeps numbers of its own, in words."""
    return f"{kind} {number}"


def settings_in(group: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Hyper-parameters of a saved parameter group, without names; rates that are tensors as numbers."""
    return {key: _as_number(value, path) for key, value in group.items() if key not in NAMING_KEYS}


def _as_number(value: Any, path: Path) -> Any:
    return (
        scalar_of(value, path) if isinstance(value, torch.Tensor) and value.numel() == 1 else read_tensors(value, path)
    )


@dataclass(frozen=True)
class Slot:
    """Some parameters of one model-parallel rank, laid end to end.

    Attributes:
        names: the parameters, in buffer order.
        shapes: their local shapes; of a part of the experts of an AutoEP layer that of all.
        kind: see `ucp_deepspeed.checkpoint.checkpoint.Kind`.
        flattening: where their elements lie in the buffers of the partitions.
        tensor: ``(partition, state)`` → the buffer; raises `DamagedCheckpointError` when its file lacks it.
        states: element-wise states → dtype.
        scalars: states that are one number.
        refused: states that are neither → why.
        group: index of the optimizer's parameter group; None for frozen parameters and buffers.
        overlapping: states of which each partition has whole every parameter that it has a part of; see `OverlappingGroup`.
        numbers: for each partition, or without ZeRO each expert-parallel rank, what reads the numbers that its file has, by
            `place_of`; none for frozen parameters and buffers.
        starts: where in the local tensor what the slot has of each parameter begins, in elements; none where it has all of them.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    kind: Kind
    flattening: Flattening
    tensor: Callable[[int, str], Located]
    states: Mapping[str, str]
    scalars: Mapping[str, float]
    refused: Mapping[str, str]
    group: int | None
    overlapping: frozenset[str] = frozenset()
    starts: tuple[int, ...] = ()
    numbers: Mapping[str, NumbersReader] = field(default_factory=dict)

    def start(self, index: int) -> int:
        """Where in its local tensor what the slot has of a parameter begins, in elements."""
        return self.starts[index] if self.starts else 0

    def flattening_of(self, state: str) -> Flattening:
        """Where the elements of a state lie: as those of the masters do, but for ``overlapping``."""
        if state in self.overlapping and isinstance(self.flattening, FlatGroup):
            return OverlappingGroup(self.flattening)
        return self.flattening

    def extent(self, partition: int, state: str) -> FileExtent:
        """The file range of one partition's buffer. Elastic files lack the padding; before DeepSpeed 0.7 they lack some of it,
        which was counted for buffers cut into half as many parts.

        Raises:
            DamagedCheckpointError: the buffer is shorter or longer than the parameters in it need.
        """
        tensor, path = self.tensor(partition, state)
        extent = extent_of(tensor, path)
        flattening = self.flattening_of(state)
        padded = flattening.buffer_numel(partition)
        lean = flattening.unpadded_numel(partition) if isinstance(flattening, FlatGroup) else padded
        if not lean <= extent.numel <= padded:
            raise DamagedCheckpointError(
                f"{path} holds {extent.numel} elements of {state!r} for partition {partition} of "
                f"{self.names[0] if self.names else 'an empty group'}, …; expected {padded}"
                + (f", or down to {lean} with less padding" if lean != padded else "")
            )
        return extent


@dataclass(frozen=True, slots=True)
class HeldPart:
    """What a slot has of a parameter: all of it, or of AutoEP's experts some."""

    slot: Slot
    index: int

    @property
    def shape(self) -> Shape:
        """Of the whole local tensor."""
        return self.slot.shapes[self.index]

    @property
    def start(self) -> int:
        """Position in the local tensor of the first element."""
        return self.slot.start(self.index)

    @property
    def stop(self) -> int:
        """Position behind the last element."""
        return self.start + self.slot.flattening.numels[self.index]


@dataclass(frozen=True)
class SplitStates:
    """One optimizer state entry; see the fields of `Slot`."""

    states: Mapping[str, str]
    scalars: Mapping[str, float]
    refused: Mapping[str, str]


def split_states(raw: Mapping[str, Any], buffer: torch.Tensor, path: Path) -> SplitStates:
    """Sort one optimizer state entry into element-wise states (→ dtype), scalars, and what is neither.

    Args:
        raw: the optimizer's ``state[i]``.
        buffer: the tensor that the optimizer stepped on; an element-wise state has its number of elements.
    """
    states: dict[str, str] = {}
    scalars: dict[str, float] = {}
    refused: dict[str, str] = {}
    for key, value in raw.items():
        if isinstance(value, (bool, int, float)):
            scalars[key] = value
        elif isinstance(value, torch.Tensor) and is_number_in_tensor(key, value, buffer):
            scalars[key] = scalar_of(value, path)
        elif isinstance(value, torch.Tensor) and _is_elementwise(value, buffer) and value.dtype in TORCH_DTYPES:
            states[key] = TORCH_DTYPES[value.dtype]
        elif value is not None:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            refused[key] = (
                f"optimizer state {key!r} isn't element-wise: {found} where the buffer has shape {tuple(buffer.shape)} ({path})"
            )
    return SplitStates(states, scalars, refused)


def is_number_in_tensor(key: str, state: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether a state is one number, and no element of the buffer: it has no axes where that has some, or it counts steps."""
    if key == "step":
        return state.numel() == 1 and (state.ndim == 0 or state.shape != buffer.shape)
    return state.ndim == 0 and buffer.ndim > 0


def _is_elementwise(state: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether each element of a state belongs to the buffer's at its place; flat ones hold the elements of any shape in order."""
    flat = 1 in (state.ndim, buffer.ndim)
    return state.shape == buffer.shape or (flat and state.numel() == buffer.numel())


def whole_tensor_slot(
    name: str,
    kind: Kind,
    tensor: Callable[[int, str], Located],
    *,
    shape: Shape,
    states: Mapping[str, str],
    scalars: Mapping[str, float] | None = None,
    refused: Mapping[str, str] | None = None,
    group: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Slot:
    """A slot that holds one tensor, uncut and unpadded; with the ``settings`` of its group, where it has one."""
    numel = torch.Size(shape).numel()
    flattening = FlatGroup((numel,), partitions=1, alignment=1)
    numbers = {} if group is None else {place_of("partition", 0): lambda: Numbers(scalars or {}, settings or {})}
    return Slot(
        (name,), (shape,), kind, flattening, tensor, states, scalars or {}, refused or {}, group, numbers=numbers
    )


def shapes_of(named: Mapping[str, Sequence[int]]) -> tuple[Shape, ...]:
    """Shapes as tuples of int, from ``torch.Size`` or tuple."""
    return tuple(tuple(int(extent) for extent in shape) for shape in named.values())


def numels_of(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Elements of each shape."""
    return tuple(torch.Size(shape).numel() for shape in shapes)
