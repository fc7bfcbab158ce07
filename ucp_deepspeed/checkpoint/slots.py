"""Slots: the common part of the families of DeepSpeed's optimizers.

A slot is a flat buffer for each partition, holding some parameters end to end, and one buffer of the same layout per optimizer
state. The families differ only in where the files hold a slot's buffer: each gives the function `tensor` for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent, Kind
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES, dtype_of, extent_of, read_tensors, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import FlatGroup, Shape, SlotLayout

Located = tuple[torch.Tensor, Path]
"""A described tensor and the file it is in."""

OFFLOAD_COPY = "_offload_buffer"
"""Ending of the names under which ``engine.offload_states`` keeps copies of ZeRO-3's states beside these, also when they are back
(``runtime/zero/offload_states.py``); then they are out of date."""

NAMING_KEYS = ("params", "param_names")
"""Keys of a parameter group that list its parameters."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """States of a slot that are one number, on one partition, and its group's hyper-parameters (none in elastic files)."""

    scalars: Mapping[str, float]
    settings: Mapping[str, Any]


NumbersReader = Callable[[], Numbers]
"""Reads the numbers in the file of one rank."""


def place_of(kind: Literal["partition", "expert-parallel rank"], number: int) -> str:
    """Name a rank whose optimizer keeps numbers of its own, in words."""
    return f"{kind} {number}"


def settings_in(group: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the hyper-parameters of a saved parameter group, without names. Rates in tensors become numbers."""
    found = {key: value for key, value in group.items() if key not in NAMING_KEYS}
    numbers = {key for key, value in found.items() if isinstance(value, torch.Tensor) and value.numel() == 1}
    return {key: (scalar_of if key in numbers else read_tensors)(value, path) for key, value in found.items()}


@dataclass(frozen=True)
class Slot(SlotLayout):
    """Some parameters of one model-parallel rank, and the files that hold them.

    Attributes:
        shapes: local shapes; for a part of the experts of an AutoEP layer, the shape of all experts.
        kind: see `ucp_deepspeed.checkpoint.checkpoint.Kind`.
        tensor: ``(partition, state)`` → the buffer; raises `DamagedCheckpointError` when its file lacks it.
        states: element-wise states → dtype.
        scalars: states that are one number.
        refused: states that are neither → why.
        group: index of the optimizer's parameter group; None for frozen parameters and buffers.
        numbers: readers of the numbers in each partition's file, or without ZeRO in each expert-parallel rank's, by `place_of`;
            none for frozen parameters and buffers.
    """

    shapes: tuple[Shape, ...]
    kind: Kind
    tensor: Callable[[int, str], Located]
    states: Mapping[str, str]
    scalars: Mapping[str, float]
    refused: Mapping[str, str]
    group: int | None
    numbers: Mapping[str, NumbersReader] = field(default_factory=dict)

    def extent(self, partition: int, state: str) -> FileExtent:
        """Return the file range of one partition's buffer.

        Elastic files lack the padding. Before DeepSpeed 0.7 they lack only some of it, counted for half as many partitions.

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
    """The part of a parameter in a slot: all of it, or some of AutoEP's experts."""

    slot: Slot
    index: int

    @property
    def shape(self) -> Shape:
        """Shape of the whole local tensor."""
        return self.slot.shapes[self.index]

    @property
    def start(self) -> int:
        """Position of the first element in the local tensor."""
        return self.slot.start(self.index)

    @property
    def stop(self) -> int:
        """Position behind the last element in the local tensor."""
        return self.start + self.slot.flattening.numels[self.index]


@dataclass(frozen=True)
class SplitStates:
    """An optimizer state entry; see the fields of `Slot`."""

    states: Mapping[str, str]
    scalars: Mapping[str, float]
    refused: Mapping[str, str]


def split_states(raw: Mapping[str, Any], buffer: torch.Tensor, path: Path) -> SplitStates:
    """Sort one optimizer state entry into element-wise states (→ dtype), scalars, and others.

    Args:
        raw: the optimizer's ``state[i]``.
        buffer: the tensor that the optimizer stepped on; an element-wise state has its number of elements.
    """
    states: dict[str, str] = {}
    scalars: dict[str, float] = {}
    refused: dict[str, str] = {}
    for key, value in raw.items():
        if str(key).endswith(OFFLOAD_COPY):
            continue
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
    """Return whether a state is a number, and no element of the buffer: it alone has no axes, or it counts steps."""
    if key == "step":
        return state.numel() == 1 and (state.ndim == 0 or state.shape != buffer.shape)
    return state.ndim == 0 and buffer.ndim > 0


def in_tensor(value: float) -> torch.Tensor:
    """Return a number as torch's optimizers keep it; in double precision if single would round it."""
    single = torch.tensor(float(value), dtype=torch.float32)
    return single if single.item() == value else torch.tensor(float(value), dtype=torch.float64)


def number_as_kept(value: float) -> float | torch.Tensor:
    """Return a scalar of a state as the optimizer that made it keeps it: those of torch's in tensors, which tell fractions."""
    return in_tensor(value) if isinstance(value, float) else value


def _is_elementwise(state: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Return whether a state's elements match the buffer's. Flat tensors hold the elements of any shape in order."""
    flat = 1 in (state.ndim, buffer.ndim)
    return state.shape == buffer.shape or (flat and state.numel() == buffer.numel())


def whole_slot(
    named: Mapping[str, Shape],
    kind: Kind,
    tensors: Mapping[str, Located],
    found: SplitStates,
    group: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Slot:
    """Return a slot whose parameters lie end to end, uncut and unpadded.

    Args:
        tensors: the tensor of each state, and its file.
        found: gives numbers and what is refused.
        settings: of its group, if it has one.
    """
    shapes, states = tuple(named.values()), {state: dtype_of(*located) for state, located in tensors.items()}
    flattening = FlatGroup(numels_of(shapes), partitions=1, alignment=1)
    numbers = {} if group is None else {place_of("partition", 0): partial(Numbers, found.scalars, settings)}

    def locate(partition: int, state: str) -> Located:
        if state not in tensors:  # the file of another rank, which holds the same parameters, tells of it
            places = dict.fromkeys(str(path) for _, path in tensors.values())
            raise DamagedCheckpointError(f"{', '.join(places)}: {', '.join(named)} has no state {state!r}")
        return tensors[state]

    held = found.scalars, found.refused, group
    return Slot(tuple(named), flattening, shapes, kind, locate, states, *held, numbers)


def shapes_of(named: Mapping[str, Sequence[int]]) -> tuple[Shape, ...]:
    """Return shapes as tuples of int, from ``torch.Size`` or tuple."""
    return tuple(tuple(int(extent) for extent in shape) for shape in named.values())


def numels_of(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Return the number of elements of each shape."""
    return tuple(torch.Size(shape).numel() for shape in shapes)
