"""Tensors of the files: parts of parameters that one rank holds, and zeros where it has padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT
from ucp_deepspeed.checkpoint.output import Region, StoredTensor
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import FlatGroup, Layout
from ucp_deepspeed.transfer.planning.target import TargetSlot


@dataclass(frozen=True)
class Tensors:
    """Makes the tensors of one model-parallel rank.

    Attributes:
        view: the checkpoint's.
        layouts: the target's layouts, by logical name.
        rank: the model-parallel rank.
    """

    view: UniversalView
    layouts: Mapping[str, Layout]
    rank: int

    def local_shape(self, name: str) -> torch.Size:
        """Shape of the rank's local tensor."""
        return torch.Size(self.layouts[name].locals[self.rank].shape)

    def weight(self, name: str, dtype: str) -> StoredTensor:
        """Return the rank's local tensor of a weight: of a trained one the master, rounded to a type."""
        state = MASTER if self.view.parameters[name].kind == "trainable" else WEIGHT
        return StoredTensor.of(self._region(name, state, dtype, 0, prod(self.local_shape(name))))

    def buffer(self, slot: TargetSlot, state: str, dtype: str, numel: int | None = None) -> StoredTensor:
        """Return a flat buffer of a rank, or its first elements."""
        starts, regions = [], []
        numel = slot.numel(state) if numel is None else numel
        for name, part in slot.fragments(state):
            starts.append(part.buffer_start)
            regions.append(self._region(name, state, dtype, part.local_start, part.numel))
        return StoredTensor((numel,), tuple(regions), tuple(starts), dtype)

    def states(self, slot: TargetSlot, state: str) -> StoredTensor:
        """Return a state of a parameter that has a slot of its own, in the parameter's shape, in fp32."""
        (name,) = slot.names
        return StoredTensor.of(self._region(name, state, "F32", 0, prod(self.local_shape(name))))

    def shapes(self, slot: TargetSlot, names: Mapping[str, str]) -> OrderedDict[str, torch.Size]:
        """Return the local shapes of a slot's parameters in buffer order, under the names of the files."""
        return OrderedDict((names[name], self.local_shape(name)) for name in slot.names)

    def _region(self, name: str, state: str, dtype: str, start: int, numel: int) -> Region:
        return Region(name, state, dtype, self.layouts[name], self.rank, start, numel)


def unpadded(slot: TargetSlot) -> int:
    """Return how many elements of a partition lie before the group's end padding."""
    assert isinstance(slot.flattening, FlatGroup)
    return slot.flattening.unpadded_numel(slot.partition)
