"""Slots of the ZeRO optimizers' files (``*_optim_states.pt``); formulas in `ucp_deepspeed.layout.zero`.

The order of a flat group is that of ``param_shapes``, never of ``param_slice_mappings``: the mappings are wrong with
``round_robin_gradients``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Deferred
from ucp_deepspeed.checkpoint.deepspeed.autoep import Part
from ucp_deepspeed.checkpoint.deepspeed.contents import ZERO, check_types, item_of, state_of, value_of
from ucp_deepspeed.checkpoint.slots import (
    Located,
    Numbers,
    NumbersReader,
    Slot,
    SplitStates,
    numels_of,
    place_of,
    settings_in,
    shapes_of,
    split_states,
)
from ucp_deepspeed.checkpoint.torch_files.safe_load import dtype_of, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import FlatGroup, Flattening, OverlappingGroup, Shape, SlicedGroup


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
"""Folder to which DeepSpeed copies tensors from NVMe; the file has empty ones (``runtime/engine.py::save_checkpoint``)."""


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
        swapped = self.form is ZERO_3 and any(master.numel() == 0 for master in self.masters)
        if swapped and (path.parent / NVME_FOLDER).is_dir():
            raise UnsupportedError(
                f"{path} holds no master weights: they were on NVMe (offload_optimizer.device: nvme) and are in "
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
        """Numbers of ZeRO-3's sub-groups in the base optimizer's state. An Adagrad that hasn't stepped lists each twice."""
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


NamedShapes = Mapping[str, Sequence[int]]
"""Parameters of a flat group, in flat order, and their local shapes."""


MOMENTUM = "momentum_buffer"
"""State of matrices under Muon."""


def zero_slots(
    param_shapes: Sequence[NamedShapes],
    partitions: int,
    open_partition: OpenPartition,
    spread: Callable[[int, NamedShapes], Sequence[Share]] | None = None,
    mapped: bool = False,
) -> list[Slot]:
    """Return the slots of one model-parallel rank.

    Args:
        param_shapes: from the model_states file; one mapping per slot, in buffer order.
        partitions: data-parallel size.
        open_partition: see `OpenPartition`.
        spread: returns the shares of a group (index, shapes by name), if ranks hold different parameters under the same names, or
            different parts: experts.
        mapped: ``param_slice_mappings`` are right, and opened files are compared with them.

    Raises:
        DamagedCheckpointError: the two files disagree on the number of slots.
        UnsupportedError: a group is partitioned over another number of ranks.
    """
    file = open_partition(0)
    if len(file.masters) != len(param_shapes):
        raise DamagedCheckpointError(
            f"{file.path} holds {len(file.masters)} flat groups; model_states describes {len(param_shapes)}"
        )
    slots: list[Slot] = []
    for index, named in enumerate(param_shapes):
        whole = Share(tuple(named), partitions, open_partition)
        first, *others = spread(index, named) if spread else (whole,)
        group = file.groups[index] if file.form is not ZERO_3 and index < len(file.groups) else {}
        alike = _indices_of_named(file, group.get("name"))
        place = index, group.get("name"), alike.index(index) if alike else 0
        slot = _zero_slot(index, first, partial(_open_group, place, first), shapes_of(named), mapped and not others)
        slots.append(slot)
        for share in others:
            open_group = partial(_open_group, place, share)
            if share.parts:  # AutoEP's shares: their parts begin at different positions
                slots.append(_zero_slot(index, share, open_group, shapes_of(named)))
            else:
                slots.append(_like_first(slot, share, open_group))
    return slots


def described_numels(named: NamedShapes) -> dict[str, int]:
    """Return the names of a flat group in order, with their elements."""
    return dict(zip(named, numels_of(shapes_of(named)), strict=True))


def mapped_numels(partitions: int, open_partition: OpenPartition) -> list[dict[str, int]]:
    """Read names in flat order and their elements from ``param_slice_mappings``. A stage-0 pipeline has no ``param_shapes``."""
    groups: list[dict[str, int]] = []
    for file in map(open_partition, range(partitions)):
        for index, mapping in enumerate(value_of(file.saved, "param_slice_mappings", "the record", file.path) or ()):
            groups += [{}] if index == len(groups) else []
            for name, address in sorted(mapping.items(), key=lambda entry: entry[1].start):
                groups[index][name] = groups[index].get(name, 0) + address.numel
    return groups


def _indices_of_named(file: ZeroFile, name: str | None) -> list[int]:
    return [index for index, group in enumerate(file.groups) if name is not None and group.get("name") == name]


def _open_group(place: tuple[int, str | None, int], share: Share, partition: int) -> HeldGroup:
    """Open a group at its place in any file: the third number's of the groups with this name, else the first number's.

    DeepSpeed takes groups of experts of several sizes from a set (``moe/utils.py``): each rank's file may have its own order.
    """
    file, (index, name, number) = share.open_partition(partition), place
    named = _indices_of_named(file, name)
    return HeldGroup(file, named[number] if number < len(named) else index)


@dataclass(frozen=True)
class Share:
    """The part of a flat group that some ranks hold.

    Attributes:
        names: its parameters.
        partitions: number of these ranks.
        open_partition: their files.
        parts: the parts of the parameters, if these ranks hold a part of each; else empty.
    """

    names: tuple[str, ...]
    partitions: int
    open_partition: OpenPartition
    parts: tuple[Part, ...] = ()


def _zero_slot(
    group: int, share: Share, open_group: OpenGroup, shapes: tuple[Shape, ...], mapped: bool = False
) -> Slot:
    held = open_group(0)
    held.check_partitions(share.partitions)
    flattening = held.flattening(numels_of(shapes), share.partitions)
    overlapping = _overlapping(flattening, open_group)
    found = _held_states(flattening, overlapping, held)
    open_sound = _of_one_save(open_group)
    if mapped and isinstance(flattening, FlatGroup) and not share.parts:
        open_sound = _held_as_mapped(open_sound, share.names, flattening)
    return Slot(
        share.names,
        flattening,
        tuple(shape for shape, _ in share.parts) or shapes,
        "trainable",
        lambda partition, state: open_sound(partition).tensor(state),
        found.states,
        found.scalars,
        found.refused,
        held.file.group_of(group),
        _numbers(share.partitions, open_sound),
        overlapping=overlapping,
        starts=tuple(start for _, start in share.parts),
    )


def _numbers(partitions: int, open_group: OpenGroup) -> dict[str, NumbersReader]:
    """See `Slot.numbers`."""

    def read(partition: int) -> Numbers:
        held = open_group(partition)
        found = split_states(held.state, torch.empty(0, device="meta"), held.path)
        return Numbers(found.scalars, settings_in(held.settings, held.path))

    return {place_of("partition", partition): cache(partial(read, partition)) for partition in range(partitions)}


def _held_states(flattening: Flattening, overlapping: frozenset[str], held: HeldGroup) -> SplitStates:
    """Return master and optimizer state of a flat group as in its first partition's file."""
    if (numel := flattening.buffer_numel(0)) >= 2**60:
        raise DamagedCheckpointError(f"{held.path} tells of a buffer that no machine has: {numel} elements")
    buffer = held.master if held.file.is_elastic else torch.empty(numel, device="meta")
    state = held.state
    found = split_states({key: value for key, value in state.items() if key not in overlapping}, buffer, held.path)
    whole = {key: dtype_of(state[key], held.path) for key in overlapping}
    return replace(found, states={MASTER: dtype_of(held.master, held.path), **found.states, **whole})


def _of_one_save(open_group: OpenGroup) -> OpenGroup:
    """Open groups like ``open_group``, but refuse one whose optimizer has taken other steps than the first partition's: a second
    save under the tag was interrupted, or files were mixed."""

    steps = cache(lambda partition: open_group(partition).steps)

    @cache
    def opened(partition: int) -> HeldGroup:
        held, found, expected = open_group(partition), steps(partition), steps(0)
        if found is not None and expected is not None and found != expected:
            raise DamagedCheckpointError(
                f"{held.path} is at step {found:g} of flat group {held.index}, and {open_group(0).path} at step {expected:g}: "
                "these are files of two saves"
            )
        return held

    return opened


def _held_as_mapped(open_group: OpenGroup, names: Sequence[str], flattening: FlatGroup) -> OpenGroup:
    """Open groups like ``open_group``, but refuse a ZeRO-1/2 file whose ``param_slice_mappings`` record other elements than its
    name says: files were exchanged, or one was copied. Before 0.7.4 there is no record."""

    def told(place: tuple[int, int] | None) -> str:
        return "nothing" if place is None else f"{place[1]} elements from position {place[0]} on"

    @cache
    def opened(partition: int) -> HeldGroup:
        held = open_group(partition)
        mappings = held.file.mappings or ()
        if held.index < len(mappings):  # torch's Adagrad has only the first group's
            found = {name: (address.start, address.numel) for name, address in mappings[held.index].items()}
            laid = {names[part.index]: (part.buffer_start, part.numel) for part in flattening.held_by(partition)}
            differing = [name for name in (*found, *laid) if found.get(name) != laid.get(name)]
            if differing and found.keys() <= set(names):
                recorded, expected = (told(places.get(differing[0])) for places in (found, laid))
                raise DamagedCheckpointError(
                    f"{held.path} records that it holds {recorded} of {differing[0]}; partition {partition} of "
                    f"{flattening.partitions} has {expected}: this is another rank's file, or another run's"
                )
        return held

    return opened


def _like_first(first: Slot, share: Share, open_group: OpenGroup) -> Slot:
    """Return the slot of ranks that hold other experts, as many and cut in the same way. Their files stay closed until needed."""
    numels = numels_of(first.shapes)

    @cache
    def opened(partition: int) -> HeldGroup:
        held = open_group(partition)
        held.check_partitions(share.partitions)
        if held.flattening(numels, share.partitions) != first.flattening:
            raise DamagedCheckpointError(
                f"{held.path} holds group {held.index} in another order than the first ranks do"
            )
        return held

    found = cache(lambda: _held_states(first.flattening, first.overlapping, opened(0)))
    open_sound = _of_one_save(opened)
    return replace(
        first,
        names=share.names,
        tensor=lambda partition, state: open_sound(partition).tensor(state),
        numbers=_numbers(share.partitions, open_sound),
        states=Deferred(lambda: found().states),
        scalars=Deferred(lambda: found().scalars),
        refused=Deferred(lambda: found().refused),
    )


def _overlapping(flattening: Flattening, open_group: OpenGroup) -> frozenset[str]:
    """See `Slot.overlapping`: under ZeRO-1/2 the momentum of Muon's groups, unless it was offloaded.

    The two ways differ first in the first partition whose own elements aren't exactly its whole tensors; before it they agree.
    """
    held = open_group(0)
    muon = held.file.form is ZERO_12 and MOMENTUM in held.state and held.settings.get("use_muon")
    if not muon or not isinstance(flattening, FlatGroup):
        return frozenset()
    for partition in range(flattening.partitions):
        numel = OverlappingGroup(flattening).buffer_numel(partition)
        if numel != flattening.partition_numel:
            momentum = open_group(partition).state.get(MOMENTUM)
            found = momentum.numel() if isinstance(momentum, torch.Tensor) else 0
            return frozenset((MOMENTUM,)) if found == numel else frozenset()
    return frozenset()


def frozen_slice_slots(
    shapes: Mapping[str, Sequence[int]],
    partitions: int,
    open_model_states: Callable[[int], tuple[Mapping[str, Any], Path]],
) -> list[Slot]:
    """Return frozen parameters of ZeRO-3. Each is cut over the ranks' own model_states files (``frozen_param_fragments``)."""

    def tensor(name: str, partition: int, state: str) -> Located:
        saved, path = open_model_states(partition)
        return value_of(saved.get("frozen_param_fragments") or {}, name, "the fragment of frozen parameter", path), path

    def slot(name: str) -> Slot:
        located, (shape,) = partial(tensor, name), shapes_of({name: shapes[name]})
        states, flattening = {WEIGHT: dtype_of(*located(0, WEIGHT))}, SlicedGroup(numels_of([shape]), partitions)
        return Slot((name,), flattening, (shape,), "frozen", located, states, {}, {}, None)

    return list(map(slot, shapes))
