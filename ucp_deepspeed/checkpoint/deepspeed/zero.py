"""Slots of the ZeRO optimizers' files (``*_optim_states.pt``); formulas in `ucp_deepspeed.layout.zero`.

The order of a flat group is that of ``param_shapes``, never of ``param_slice_mappings``: the mappings are wrong with
``round_robin_gradients``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT
from ucp_deepspeed.checkpoint.deepspeed.autoep import Part
from ucp_deepspeed.checkpoint.deepspeed.contents import value_of
from ucp_deepspeed.checkpoint.deepspeed.zero_files import ZERO_3, ZERO_12, HeldGroup, OpenGroup, OpenPartition, ZeroFile
from ucp_deepspeed.checkpoint.deferred import Deferred
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
from ucp_deepspeed.checkpoint.torch_files.reading import dtype_of
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import FlatGroup, Flattening, OverlappingGroup, Shape, SlicedGroup

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
        place = _place_among_named(file, index)
        slot = _zero_slot(index, first, partial(_open_group, first, place), shapes_of(named), mapped and not others)
        slots.append(slot)
        for share in others:
            open_group = partial(_open_group, share, place)
            if share.parts:  # AutoEP's shares: their parts begin at different positions
                slots.append(_zero_slot(index, share, open_group, shapes_of(named)))
            else:
                slots.append(_like_first(slot, share, open_group))
    return slots


def described_numels(named: NamedShapes) -> dict[str, int]:
    """Return the names of a flat group in order, with their elements."""
    return dict(zip(named, numels_of(shapes_of(named)), strict=True))


def in_flat_groups(named: NamedShapes, partitions: Sequence[ZeroFile]) -> list[NamedShapes]:
    """Split names in flat order into groups, by the groups' sizes. Early releases didn't record which group has which name.

    Raises:
        DamagedCheckpointError: the sizes don't fit the names.
    """
    first, numels = partitions[0], described_numels(named)
    masters = [[buffer.numel() for buffer in file.masters] for file in partitions]
    sizes = masters[0]
    if first.form is ZERO_3:  # each rank has a part of each parameter
        numels = {name: -(-numel // len(partitions)) for name, numel in numels.items()}
    elif all(len(held) == len(sizes) for held in masters):
        sizes = [sum(held) for held in zip(*masters, strict=True)]
    groups: list[dict[str, Sequence[int]]] = []
    left = 0
    for name, numel in numels.items():
        if left == 0 and (numel or not groups) and len(groups) < len(sizes):
            groups.append({})
            left = sizes[len(groups) - 1]
        left -= numel
        if groups:
            groups[-1][name] = named[name]
    if left or len(groups) != len(sizes):
        raise DamagedCheckpointError(f"{first.path}: param_shapes doesn't fit flat groups of {sizes} elements")
    return list(groups)


def mapped_numels(partitions: int, open_partition: OpenPartition) -> list[dict[str, int]]:
    """Read names in flat order and their elements from ``param_slice_mappings``. A stage-0 pipeline has no ``param_shapes``."""
    groups: list[dict[str, int]] = []
    for partition in range(partitions):
        file = open_partition(partition)
        for index, mapping in enumerate(value_of(file.saved, "param_slice_mappings", "the record", file.path) or ()):
            groups += [{}] if index == len(groups) else []
            for name, address in sorted(mapping.items(), key=lambda entry: entry[1].start):
                groups[index][name] = groups[index].get(name, 0) + address.numel
    return groups


def _place_among_named(file: ZeroFile, index: int) -> tuple[int, str | None, int]:
    """Return the place of a group in any file: it is the third number's of the groups with this name, else ``index``.

    DeepSpeed takes the groups of experts of several expert-parallel sizes from a set (``moe/utils.py``). Each rank's file may
    therefore have an order of its own.
    """
    name = file.groups[index].get("name") if file.form is not ZERO_3 and index < len(file.groups) else None
    named = _indices_of_named(file, name)
    return index, name, named.index(index) if named else 0


def _indices_of_named(file: ZeroFile, name: str | None) -> list[int]:
    return [index for index, group in enumerate(file.groups) if name is not None and group.get("name") == name]


def _open_group(share: Share, place: tuple[int, str | None, int], partition: int) -> HeldGroup:
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
        tuple(part.shape for part in share.parts) or shapes,
        "trainable",
        lambda partition, state: open_sound(partition).tensor(state),
        found.states,
        found.scalars,
        found.refused,
        held.file.group_of(group),
        _numbers(share.partitions, open_sound),
        overlapping=overlapping,
        starts=tuple(part.start for part in share.parts),
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
    buffer = held.master if held.file.is_elastic else torch.empty(flattening.buffer_numel(0), device="meta")
    state = held.state
    found = split_states({key: value for key, value in state.items() if key not in overlapping}, buffer, held.path)
    whole = {key: dtype_of(state[key], held.path) for key in overlapping}
    return replace(found, states={MASTER: dtype_of(held.master, held.path), **found.states, **whole})


def _of_one_save(open_group: OpenGroup) -> OpenGroup:
    """Open groups like ``open_group``, but check that all partitions' optimizers have taken as many steps as the first one's.

    Raises:
        DamagedCheckpointError: a file that is opened has not: a second save under the tag was interrupted, or files were mixed.
    """

    @cache
    def opened(partition: int) -> HeldGroup:
        held = open_group(partition)
        found, (expected, first) = held.steps, first_step()
        if found is not None and expected is not None and found != expected:
            raise DamagedCheckpointError(
                f"{held.path} is at step {found:g} of flat group {held.index}, and {first} at step {expected:g}: "
                "these are files of two saves"
            )
        return held

    @cache
    def first_step() -> tuple[float | None, Path]:
        held = open_group(0)
        return held.steps, held.path

    return opened


def _held_as_mapped(open_group: OpenGroup, names: Sequence[str], flattening: FlatGroup) -> OpenGroup:
    """Open groups like ``open_group``, but check that each ZeRO-1/2 file holds the elements that its name says, by its
    ``param_slice_mappings``. Before 0.7.4 there is no record.

    Raises:
        DamagedCheckpointError: a file that is opened records something else: files were exchanged, or one was copied.
    """

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
    """Return the slot of ranks that hold other experts, as many and cut in the same way. Their files stay closed until needed.

    Raises:
        DamagedCheckpointError: a file that is opened is cut in another way.
    """
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

    found = lru_cache(maxsize=1)(lambda: _held_states(first.flattening, first.overlapping, opened(0)))
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
    if held.file.form is not ZERO_12 or not isinstance(flattening, FlatGroup) or MOMENTUM not in held.state:
        return frozenset()
    if not held.settings.get("use_muon"):
        return frozenset()
    whole = OverlappingGroup(flattening)
    for partition in range(flattening.partitions):
        numel = whole.buffer_numel(partition)
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

    slots: list[Slot] = []
    for name, shape in zip(shapes, shapes_of(shapes), strict=True):
        located = partial(tensor, name)
        states = {WEIGHT: dtype_of(*located(0, WEIGHT))}
        flattening = SlicedGroup(numels_of([shape]), partitions)
        slots.append(Slot((name,), flattening, (shape,), "frozen", located, states, {}, {}, None))
    return slots
