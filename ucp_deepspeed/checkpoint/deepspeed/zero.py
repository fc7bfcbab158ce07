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
from ucp_deepspeed.checkpoint.deepspeed.mapped import held_as_mapped
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
from ucp_deepspeed.checkpoint.torch_files.reading import TORCH_DTYPES, scalar_of
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import FlatGroup, Flattening, OverlappingGroup, Shape, SlicedGroup

OpenPartition = Callable[[int], tuple[dict[str, Any], Path]]
"""``partition`` → (the file's ``optimizer_state_dict``, the file)."""

NamedShapes = Mapping[str, Sequence[int]]
"""Parameters of a flat group, in flat order, and their local shapes."""

OpenGroup = Callable[[int], tuple[dict[str, Any], Path, int]]
"""Like `OpenPartition`: ``partition`` → the state, the file, and the index of one flat group in this file."""


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

    def state_entry(self, saved: Mapping[str, Any], slot: int) -> Mapping[str, Any]:
        """Return the base optimizer's state for one slot; empty if no step was taken. Elastic files keep a list."""
        base = saved[self.optimizer]
        if isinstance(base, list):
            return dict(base[slot]) | {
                key: saved["base_optimizer_state_step"] for key in ("step",) if _lacks_step(saved, slot)
            }
        index = slot_indices(base["param_groups"])[slot] if self is ZERO_3 else slot
        entry: Mapping[str, Any] = base["state"].get(index, {})
        return entry

    def hyperparameters(self, saved: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the base optimizer's parameter groups; none for elastic files."""
        base = saved[self.optimizer]
        return [] if isinstance(base, list) else list(base["param_groups"])


ZERO_12 = ZeroForm("zero-1/2", "single_partition_of_fp32_groups", "base_optimizer_state")
BF16_OPTIMIZER = ZeroForm("bf16-optimizer", "single_partition_of_fp32_groups", "base_optimizer_state")
ZERO_3 = ZeroForm("zero-3", "fp32_flat_groups", "optimizer_state_dict")


NVME_FOLDER = "offloaded_tensors"
"""Folder to which DeepSpeed copies tensors from NVMe."""

MOMENTUM = "momentum_buffer"
"""State of matrices under Muon."""


def slot_indices(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each sub-group of ZeRO-3 its index in the base optimizer's state.

    The indices are the sub-groups' numbers, except for an Adagrad that hasn't stepped: DeepSpeed then lists each sub-group twice.
    """
    return list(dict.fromkeys(index for group in groups for index in group["params"]))


def recognise(saved: Mapping[str, Any], path: Path) -> ZeroForm:
    """Return the class that wrote an ``optimizer_state_dict``.

    Raises:
        UnsupportedError: the class isn't known, or the masters were on NVMe.
    """
    if ZERO_3.masters in saved:
        _check_masters(saved[ZERO_3.masters], path)
        return ZERO_3
    if ZERO_12.masters in saved:
        return ZERO_12 if "zero_stage" in saved else BF16_OPTIMIZER
    raise UnsupportedError(f"{path} was written by an optimizer class that isn't known: keys {sorted(map(str, saved))}")


def _check_masters(masters: Sequence[torch.Tensor], path: Path) -> None:
    """Refuse sub-groups that DeepSpeed had swapped out.

    For these it writes an empty tensor, and copies its swap files to a folder (``runtime/engine.py::save_checkpoint``).
    """
    if (path.parent / NVME_FOLDER).is_dir() and any(master.numel() == 0 for master in masters):
        raise UnsupportedError(
            f"{path} holds no master weights: they were on NVMe (offload_optimizer.device: nvme) and are in {NVME_FOLDER}/, "
            f"which this release can't read; DeepSpeed itself can, on the same topology"
        )


def zero_slots(
    param_shapes: Sequence[Mapping[str, Sequence[int]]],
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
    saved, path = open_partition(0)
    form = recognise(saved, path)
    masters = saved[form.masters]
    if len(masters) != len(param_shapes):
        raise DamagedCheckpointError(
            f"{path} holds {len(masters)} flat groups; model_states describes {len(param_shapes)}"
        )
    slots: list[Slot] = []
    for index, named in enumerate(param_shapes):
        whole = Share(tuple(named), partitions, open_partition)
        place = _place_among_named(form, saved, index)
        first, *others = spread(index, named) if spread else (whole,)
        open_first = _open_group(first.open_partition, place)
        slot = _zero_slot(form, index, first, open_first, shapes_of(named), mapped and not others)
        slots.append(slot)
        for share in others:
            open_group = _open_group(share.open_partition, place)
            if share.parts:  # AutoEP's shares: their parts begin at different positions
                slots.append(_zero_slot(form, index, share, open_group, shapes_of(named)))
            else:
                slots.append(_like_first(form, slot, share, open_group))
    return slots


def described_numels(named: NamedShapes) -> dict[str, int]:
    """Return the names of a flat group in order, with their elements."""
    return dict(zip(named, numels_of(shapes_of(named)), strict=True))


def in_flat_groups(named: NamedShapes, partitions: Sequence[Mapping[str, Any]], path: Path) -> list[NamedShapes]:
    """Split names in flat order into groups, by the groups' sizes. Early releases didn't record which group has which name.

    Args:
        partitions: ``optimizer_state_dict`` of each partition's file.

    Raises:
        DamagedCheckpointError: the sizes don't fit the names.
    """
    form, numels = recognise(partitions[0], path), described_numels(named)
    masters = [[buffer.numel() for buffer in saved[form.masters]] for saved in partitions]
    sizes = masters[0] if form is ZERO_3 else [sum(held) for held in zip(*masters, strict=True)]
    if form is ZERO_3:  # each rank has a part of each parameter
        numels = {name: -(-numel // len(partitions)) for name, numel in numels.items()}
    groups: list[dict[str, Sequence[int]]] = []
    left = 0
    for name, numel in numels.items():
        if left == 0 and (numel or not groups) and len(groups) < len(sizes):
            groups.append({})
            left = sizes[len(groups) - 1]
        left -= numel
        groups[-1][name] = named[name]
    if left or len(groups) != len(sizes):
        raise DamagedCheckpointError(f"{path}: param_shapes doesn't fit flat groups of {sizes} elements")
    return list(groups)


def mapped_numels(partitions: int, open_partition: OpenPartition) -> list[dict[str, int]]:
    """Read names in flat order and their elements from ``param_slice_mappings``. A stage-0 pipeline has no ``param_shapes``."""
    groups: list[dict[str, int]] = []
    for partition in range(partitions):
        saved, _ = open_partition(partition)
        for index, mapping in enumerate(saved["param_slice_mappings"]):
            groups += [{}] if index == len(groups) else []
            for name, address in sorted(mapping.items(), key=lambda entry: entry[1].start):
                groups[index][name] = groups[index].get(name, 0) + address.numel
    return groups


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a flat group in any file: the ``number``-th of the groups called ``name``, else ``index``."""

    form: ZeroForm
    index: int
    name: str | None
    number: int

    def index_in(self, saved: Mapping[str, Any]) -> int:
        named = _indices_of_named(self.form, saved, self.name)
        return named[self.number] if self.number < len(named) else self.index


def _place_among_named(form: ZeroForm, saved: Mapping[str, Any], index: int) -> _Place:
    """Return the place of a group that has ``index`` in one of the files.

    DeepSpeed takes the groups of experts of several expert-parallel sizes from a set (``moe/utils.py``). Each rank's file may
    therefore have an order of its own.
    """
    groups = form.hyperparameters(saved)
    name = groups[index].get("name") if form is not ZERO_3 and index < len(groups) else None
    named = _indices_of_named(form, saved, name)
    return _Place(form, index, name, named.index(index) if named else 0)


def _indices_of_named(form: ZeroForm, saved: Mapping[str, Any], name: str | None) -> list[int]:
    if name is None:
        return []
    return [index for index, group in enumerate(form.hyperparameters(saved)) if group.get("name") == name]


def _open_group(open_partition: OpenPartition, place: _Place) -> OpenGroup:
    def opened(partition: int) -> tuple[dict[str, Any], Path, int]:
        saved, path = open_partition(partition)
        return saved, path, place.index_in(saved)

    return opened


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
    form: ZeroForm,
    group: int,
    share: Share,
    open_group: OpenGroup,
    shapes: tuple[Shape, ...],
    mapped: bool = False,
) -> Slot:
    saved, path, index = open_group(0)
    _check_partitions(saved, index, share.partitions, path)
    flattening = _flattening(form, saved, index, numels_of(shapes), share.partitions)
    overlapping = _overlapping(form, flattening, open_group)
    found = _held_states(form, flattening, overlapping, open_group)
    open_sound = _of_one_save(form, open_group)
    if mapped and isinstance(flattening, FlatGroup) and not share.parts:
        open_sound = held_as_mapped(open_sound, share.names, flattening)
    return Slot(
        share.names,
        tuple(part.shape for part in share.parts) or shapes,
        "trainable",
        flattening,
        _locator(form, open_sound),
        found.states,
        found.scalars,
        found.refused,
        _group_of(form, saved, group),
        overlapping,
        tuple(part.start for part in share.parts),
        _numbers(form, share.partitions, open_sound),
    )


def _numbers(form: ZeroForm, partitions: int, open_group: OpenGroup) -> dict[str, NumbersReader]:
    """See `Slot.numbers`."""

    def read(partition: int) -> Numbers:
        saved, path, index = open_group(partition)
        groups, group = form.hyperparameters(saved), _group_of(form, saved, index)
        settings = settings_in(groups[group], path) if group < len(groups) else {}
        found = split_states(form.state_entry(saved, index), torch.empty(0, device="meta"), path)
        return Numbers(found.scalars, settings)

    return {place_of("partition", partition): cache(partial(read, partition)) for partition in range(partitions)}


def _held_states(
    form: ZeroForm, flattening: Flattening, overlapping: frozenset[str], open_group: OpenGroup
) -> SplitStates:
    """Return master and optimizer state of a flat group as in its first partition's file."""
    saved, path, index = open_group(0)
    master = saved[form.masters][index]
    buffer = torch.empty(flattening.buffer_numel(0), device="meta")
    if isinstance(saved[form.optimizer], list):
        buffer = master
    entry = form.state_entry(saved, index)
    found = split_states({key: value for key, value in entry.items() if key not in overlapping}, buffer, path)
    whole = {key: TORCH_DTYPES[entry[key].dtype] for key in overlapping}
    return replace(found, states={MASTER: TORCH_DTYPES[master.dtype], **found.states, **whole})


def _of_one_save(form: ZeroForm, open_group: OpenGroup) -> OpenGroup:
    """Open groups like ``open_group``, but check that all partitions' optimizers have taken as many steps as the first one's.

    Raises:
        DamagedCheckpointError: a file that is opened has not: a second save under the tag was interrupted, or files were mixed.
    """

    @cache
    def opened(partition: int) -> tuple[dict[str, Any], Path, int]:
        saved, path, index = open_group(partition)
        found, (expected, first) = _step_of(form, saved, path, index), first_step()
        if found is not None and expected is not None and found != expected:
            raise DamagedCheckpointError(
                f"{path} is at step {found:g} of flat group {index}, and {first} at step {expected:g}: "
                "these are files of two saves"
            )
        return saved, path, index

    @cache
    def first_step() -> tuple[float | None, Path]:
        saved, path, index = open_group(0)
        return _step_of(form, saved, path, index), path

    return opened


def _step_of(form: ZeroForm, saved: Mapping[str, Any], path: Path, index: int) -> float | None:
    """Return the number of steps that the optimizer has taken with a flat group, if the file tells."""
    step = form.state_entry(saved, index).get("step")
    each = isinstance(step, torch.Tensor) and step.numel() != 1
    return None if step is None or each else scalar_of(step, path)


def _like_first(form: ZeroForm, first: Slot, share: Share, open_group: OpenGroup) -> Slot:
    """Return the slot of ranks that hold other experts, as many and cut in the same way. Their files stay closed until needed.

    Raises:
        DamagedCheckpointError: a file that is opened is cut in another way.
    """
    numels = numels_of(first.shapes)

    @cache
    def opened(partition: int) -> tuple[dict[str, Any], Path, int]:
        saved, path, index = open_group(partition)
        _check_partitions(saved, index, share.partitions, path)
        if _flattening(form, saved, index, numels, share.partitions) != first.flattening:
            raise DamagedCheckpointError(f"{path} holds group {index} in another order than the first ranks do")
        return saved, path, index

    found = lru_cache(maxsize=1)(lambda: _held_states(form, first.flattening, first.overlapping, opened))
    open_sound = _of_one_save(form, opened)
    return replace(
        first,
        names=share.names,
        tensor=_locator(form, open_sound),
        numbers=_numbers(form, share.partitions, open_sound),
        states=Deferred(lambda: found().states),
        scalars=Deferred(lambda: found().scalars),
        refused=Deferred(lambda: found().refused),
    )


def _overlapping(form: ZeroForm, flattening: Flattening, open_group: OpenGroup) -> frozenset[str]:
    """See `Slot.overlapping`: under ZeRO-1/2 the momentum of Muon's groups, unless it was offloaded.

    The two ways differ first in the first partition whose own elements aren't exactly its whole tensors; before it they agree.
    """
    saved, _, index = open_group(0)
    if form is not ZERO_12 or not isinstance(flattening, FlatGroup) or MOMENTUM not in form.state_entry(saved, index):
        return frozenset()
    if not any(group.get("use_muon") for group in form.hyperparameters(saved)[index : index + 1]):
        return frozenset()
    whole = OverlappingGroup(flattening)
    for partition in range(flattening.partitions):
        numel = whole.buffer_numel(partition)
        if numel != flattening.partition_numel:
            saved, _, index = open_group(partition)
            momentum = form.state_entry(saved, index).get(MOMENTUM)
            held = 0 if momentum is None else momentum.numel()
            return frozenset((MOMENTUM,)) if held == numel else frozenset()
    return frozenset()


def frozen_slice_slots(
    shapes: Mapping[str, Sequence[int]],
    partitions: int,
    open_model_states: Callable[[int], tuple[dict[str, Any], Path]],
) -> list[Slot]:
    """Return frozen parameters of ZeRO-3. Each is cut over the ranks' own model_states files (``frozen_param_fragments``)."""

    def tensor_of(name: str) -> Callable[[int, str], Located]:
        def tensor(partition: int, state: str) -> Located:
            saved, path = open_model_states(partition)
            try:
                return saved["frozen_param_fragments"][name], path
            except (KeyError, TypeError) as error:
                raise DamagedCheckpointError(f"{path} lacks the fragment of frozen parameter {name}") from error

        return tensor

    slots: list[Slot] = []
    for (name, _), shape in zip(shapes.items(), shapes_of(shapes), strict=True):
        tensor = tensor_of(name)
        dtype = TORCH_DTYPES[tensor(0, WEIGHT)[0].dtype]
        flattening = SlicedGroup(numels_of([shape]), partitions)
        slots.append(Slot((name,), (shape,), "frozen", flattening, tensor, {WEIGHT: dtype}, {}, {}, None))
    return slots


def _lacks_step(saved: Mapping[str, Any], slot: int) -> bool:
    return "step" not in saved["base_optimizer_state"][slot] and saved.get("base_optimizer_state_step") is not None


def partition_count(saved: Mapping[str, Any], index: int, usual: int) -> int:
    """Return the number of ranks that share a flat group; ZeRO-3 lists it for experts (``stage3.py::_rigid_state_dict``)."""
    if listed := saved.get("ds_zero_partition_groups"):
        return int(listed[index]["partition_count"])
    counts = saved.get("partition_count", usual)
    return int(counts if isinstance(counts, int) else counts[index])


def _check_partitions(saved: Mapping[str, Any], index: int, partitions: int, path: Path) -> None:
    found = partition_count(saved, index, partitions)
    if found != partitions:
        raise UnsupportedError(
            f"{path} holds group {index} cut over {found} ranks, where {partitions} hold it: which ranks these are can't be told"
        )


def _flattening(
    form: ZeroForm, saved: Mapping[str, Any], index: int, numels: tuple[int, ...], partitions: int
) -> Flattening:
    if form is ZERO_3:
        return SlicedGroup(numels, partitions)
    gaps = saved.get("param_alignment_paddings")
    return FlatGroup(numels, partitions, tuple(gaps[index]) if gaps else ())


def _locator(form: ZeroForm, open_group: OpenGroup) -> Callable[[int, str], Located]:
    def tensor(partition: int, state: str) -> Located:
        saved, path, index = open_group(partition)
        try:
            if state == MASTER:
                return saved[form.masters][index], path
            return form.state_entry(saved, index)[state], path
        except (KeyError, IndexError) as error:
            raise DamagedCheckpointError(
                f"{path} lacks {state!r} of flat group {index}, which other ranks have"
            ) from error

    return tensor


def _group_of(form: ZeroForm, saved: Mapping[str, Any], slot: int) -> int:
    """Return the parameter group of a slot. ZeRO-1/2 has one slot per group, ZeRO-3 lists its sub-groups in ``param_groups``."""
    if form is ZERO_3:
        groups = form.hyperparameters(saved)
        index = slot_indices(groups)[slot]
        return next(group for group, entry in enumerate(groups) if index in entry["params"])
    return slot
