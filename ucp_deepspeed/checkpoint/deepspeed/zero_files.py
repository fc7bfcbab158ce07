"""The ZeRO optimizers' files (``*_optim_states.pt``): the classes that write them, and what each partition's file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER
from ucp_deepspeed.checkpoint.deepspeed.contents import ZERO, check_types, item_of, state_of, value_of
from ucp_deepspeed.checkpoint.slots import Located
from ucp_deepspeed.checkpoint.torch_files.reading import scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import FlatGroup, Flattening, SlicedGroup


@dataclass(frozen=True)
class ZeroForm:
    """The names that one ZeRO optimizer class uses in its file.

    Attributes:
        name: name for people and for comparing topologies.
        masters: key of the list of fp32 buffers.
        optimizer: key of the base optimizer's state.
    """

    name: str
    masters: str
    optimizer: str


ZERO_12 = ZeroForm("zero-1/2", "single_partition_of_fp32_groups", "base_optimizer_state")
BF16_OPTIMIZER = ZeroForm("bf16-optimizer", "single_partition_of_fp32_groups", "base_optimizer_state")
ZERO_3 = ZeroForm("zero-3", "fp32_flat_groups", "optimizer_state_dict")


NVME_FOLDER = "offloaded_tensors"
"""Folder to which DeepSpeed copies tensors from NVMe."""


class ZeroFile:
    """The state of a ZeRO optimizer in one partition's file.

    Attributes:
        path: the file.
        saved: its ``optimizer_state_dict``.
        form: the class that wrote it.
        masters: the fp32 buffers, one for each flat group.
        groups: the base optimizer's parameter groups; none in elastic files.

    Raises:
        DamagedCheckpointError: a value is missing, or of another type than DeepSpeed writes.
        UnsupportedError: the class isn't known, or the masters were on NVMe.
    """

    def __init__(self, saved: Any, path: Path) -> None:
        check_types(saved, ZERO, path, "optimizer_state_dict")
        self.path, self.saved = path, saved
        self.form = ZERO_3 if ZERO_3.masters in saved else ZERO_12 if "zero_stage" in saved else BF16_OPTIMIZER
        if self.form.masters not in saved:
            raise UnsupportedError(
                f"{path} was written by an optimizer class that isn't known: keys {sorted(map(str, saved))}"
            )
        self.masters: Sequence[torch.Tensor] = saved[self.form.masters]
        base = value_of(saved, self.form.optimizer, "the base optimizer's state", path)
        self._elastic: Sequence[Mapping[str, Any]] | None = base if isinstance(base, (list, tuple)) else None
        self.base: Mapping[str, Any] = {} if isinstance(base, (list, tuple)) else base
        self.groups: Sequence[Mapping[str, Any]] = self.base.get("param_groups", ())
        if self.form is ZERO_3:
            self._check_masters()

    def _check_masters(self) -> None:
        """Refuse sub-groups that DeepSpeed had swapped out.

        For these it writes an empty tensor, and copies its swap files to a folder (``runtime/engine.py::save_checkpoint``).
        """
        if (self.path.parent / NVME_FOLDER).is_dir() and any(master.numel() == 0 for master in self.masters):
            raise UnsupportedError(
                f"{self.path} holds no master weights: they were on NVMe (offload_optimizer.device: nvme) and are in "
                f"{NVME_FOLDER}/, which this release can't read; DeepSpeed itself can, on the same topology"
            )

    @property
    def is_elastic(self) -> bool:
        """Return whether states are a list, one entry for each flat group, without padding and hyper-parameters."""
        return self._elastic is not None

    @property
    def mappings(self) -> Sequence[Mapping[str, Any]] | None:
        """Positions of each parameter's elements, for each flat group; None if the file doesn't tell."""
        return self.saved.get("param_slice_mappings")

    def state(self, index: int) -> Mapping[str, Any]:
        """Return the base optimizer's state for a flat group; empty if no step was taken."""
        if self._elastic is None:
            number = self._numbers[index] if self.form is ZERO_3 else index
            return state_of(self.base.get("state", {}), number, self.path)
        held, step = item_of(self._elastic, index, "states of flat groups", self.path), "base_optimizer_state_step"
        return {**({"step": self.saved[step]} if self.saved.get(step) is not None else {}), **held}

    def group_of(self, index: int) -> int:
        """Return the parameter group of a flat group. ZeRO-1/2 has one flat group for each, ZeRO-3 lists its sub-groups."""
        if self.form is not ZERO_3:
            return index
        number = self._numbers[index]
        return next(group for group, listed in enumerate(self.groups) if number in listed["params"])

    @property
    def _numbers(self) -> list[int]:
        """Numbers of ZeRO-3's sub-groups in the base optimizer's state.

        They count from 0 on, except for an Adagrad that hasn't stepped: DeepSpeed then lists each sub-group twice.
        """
        numbers = list(dict.fromkeys(number for group in self.groups for number in group["params"]))
        if len(numbers) < len(self.masters):
            raise DamagedCheckpointError(
                f"{self.path} holds {len(self.masters)} flat groups, and {len(numbers)} in its parameter groups"
            )
        return numbers

    def sharing(self, index: int) -> Mapping[str, Any] | None:
        """Return ZeRO-3's record of the ranks that share a flat group; None if there is none."""
        listed = self.saved.get("ds_zero_partition_groups")
        return item_of(listed, index, "records of sharing ranks", self.path) if listed else None

    def partition_count(self, index: int, usual: int) -> int:
        """Return the number of ranks that share a flat group; ZeRO-3 lists it for experts (``stage3.py::_rigid_state_dict``)."""
        if (sharing := self.sharing(index)) is not None:
            return int(sharing["partition_count"])
        counts = self.saved.get("partition_count", usual)
        return int(counts if isinstance(counts, int) else item_of(counts, index, "partition counts", self.path))


OpenPartition = Callable[[int], ZeroFile]
"""Opens the file of a partition."""


@dataclass(frozen=True, slots=True)
class HeldGroup:
    """A flat group in one partition's file."""

    file: ZeroFile
    index: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def master(self) -> torch.Tensor:
        """The fp32 buffer."""
        return item_of(self.file.masters, self.index, "flat groups", self.path)

    @property
    def state(self) -> Mapping[str, Any]:
        """The base optimizer's state."""
        return self.file.state(self.index)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The parameter group; empty in elastic files."""
        groups, number = self.file.groups, self.file.group_of(self.index)
        return groups[number] if number < len(groups) else {}

    @property
    def steps(self) -> float | None:
        """Number of steps that the optimizer has taken with it, if the file tells."""
        step = self.state.get("step")
        if isinstance(step, torch.Tensor) and step.numel() == 1:
            return scalar_of(step, self.path)
        return step if isinstance(step, (int, float)) else None

    def flattening(self, numels: tuple[int, ...], partitions: int) -> Flattening:
        """Return the positions of the parameters' elements in the buffers."""
        if self.file.form is ZERO_3:
            return SlicedGroup(numels, partitions)
        gaps = self.file.saved.get("param_alignment_paddings")
        held = tuple(item_of(gaps, self.index, "lists of alignment gaps", self.path)) if gaps else ()
        if held and len(held) != len(numels):
            raise DamagedCheckpointError(f"{self.path} holds {len(held)} alignment gaps for {len(numels)} tensors")
        return FlatGroup(numels, partitions, held)

    def tensor(self, state: str) -> Located:
        """Return the buffer of a state, and the file."""
        held = self.master if state == MASTER else self.state.get(state)
        if not isinstance(held, torch.Tensor):
            raise DamagedCheckpointError(
                f"{self.path} lacks {state!r} of flat group {self.index}, which other ranks have"
            )
        return held, self.path

    def check_partitions(self, partitions: int) -> None:
        """Refuse a group that is cut over another number of ranks."""
        found = self.file.partition_count(self.index, partitions)
        if found != partitions:
            raise UnsupportedError(
                f"{self.path} holds group {self.index} cut over {found} ranks, where {partitions} hold it: which ranks these are "
                f"can't be told"
            )


OpenGroup = Callable[[int], HeldGroup]
"""Opens a flat group in the file of a partition."""
