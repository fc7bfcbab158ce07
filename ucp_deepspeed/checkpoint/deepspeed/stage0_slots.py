"""Slots of stage 0: the optimizer's state lies in the model_states file and names no parameters.

Three classes write it: the plain torch optimizer (fp32), ``FP16_UnfusedOptimizer`` (one tensor per parameter) and
``FP16_Optimizer`` (one flat buffer per group). The wrappers step once in their constructor, so that their Adam ``step`` is one
more than the number of steps taken. The run's bias correction uses this value, and it is carried over as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, MASTER, WEIGHT, WEIGHTS_HINT, Kind
from ucp_deepspeed.checkpoint.deepspeed.contents import state_of, value_of
from ucp_deepspeed.checkpoint.slots import Located, Slot, settings_in, split_states, whole_slot
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, UnsupportedError
from ucp_deepspeed.layout import Shape

Groups = list[list[str | None]]
"""Names of each parameter group in the optimizer's order; None for an index that belongs to no parameter of the model."""

Expected = Sequence[Sequence[frozenset[Shape]]]
"""Shapes that each parameter of each group may have; an empty set if the file doesn't tell."""


def stage0_form(optimizer: Mapping[str, Any], path: Path) -> str:
    """Return ``fp16-fused``, ``fp16-unfused`` or ``plain``.

    Raises:
        UnsupportedError: it is none of them.
    """
    for key, form in (("fp32_groups_flat", "fp16-fused"), ("fp32_groups", "fp16-unfused"), ("state", "plain")):
        if key in optimizer:
            return form
    raise UnsupportedError(f"{path} holds an optimizer of a class that isn't known: keys {sorted(map(str, optimizer))}")


def stage0_slots(
    optimizer: Mapping[str, Any],
    module: Mapping[str, Located],
    groups: Groups | None,
    path: Path,
    kinds: Mapping[str, Kind | None],
) -> list[Slot]:
    """Return the slots of one model-parallel rank.

    Args:
        optimizer: value under ``optimizer`` in the model_states file.
        module: the model's parameters (no buffers, no tied duplicates), in the model's order, each with its file.
        groups: names as the manifest records them; None to map through the model's order.
        path: the model_states file.
        kinds: kinds as the manifest records them. Without a record, a parameter counts as frozen if a plain optimizer has state
            for others but not for it. A parameter without elements always does; an optimizer's state of it is ignored, since no
            other stage has any.

    Raises:
        MismatchError: there are no names, and the order leaves more than one way to assign them.
        UnsupportedError: an optimizer class that isn't known.
    """
    form = stage0_form(optimizer, path)
    base = optimizer if form == "plain" else value_of(optimizer, "optimizer_state_dict", "the key", path)
    states, entries = (value_of(base, key, "the optimizer's", path) for key in ("state", "param_groups"))
    masters = optimizer.get("fp32_groups_flat" if form == "fp16-fused" else "fp32_groups", ())
    if form != "plain" and len(masters) != len(entries):
        raise DamagedCheckpointError(f"{path} holds masters of {len(masters)} parameter groups, of {len(entries)}")
    if groups is not None:
        _check_groups(groups, entries, module, form, path)
    if form == "plain":
        groups = groups or assign_names(
            module,
            [[_state_shapes(state_of(states, index, path)) for index in entry["params"]] for entry in entries],
            path,
        )
        return _plain_slots(states, entries, module, groups, path, kinds)
    if form == "fp16-unfused":
        groups = groups or assign_names(module, [[frozenset([tuple(m.shape)]) for m in held] for held in masters], path)
    else:
        groups = groups or _fused_groups(masters, module, path)
    return _wrapper_slots(masters, states, entries, module, groups, path, form == "fp16-fused")


def _check_groups(
    groups: Groups, entries: Sequence[Mapping[str, Any]], module: Mapping[str, Located], form: str, path: Path
) -> None:
    """Check that the manifest's names are the model's, and as many as the optimizer has."""
    counts, named = [len(entry["params"]) for entry in entries], [len(group) for group in groups]
    if form == "fp16-fused":  # one flat tensor for each group
        counts, named = [len(entries)], [len(groups)]
    if counts != named:
        raise DamagedCheckpointError(f"{path} holds parameter groups of {counts}; the manifest names {named}")
    strange = [
        name for group in groups for name in group if name not in module and (name is not None or form != "plain")
    ]
    if strange:
        raise DamagedCheckpointError(f"{path} holds the optimizer state of {strange[0]}, whose weight is in no file")


def _plain_slots(
    states: Mapping[Any, Any],
    entries: Sequence[Mapping[str, Any]],
    module: Mapping[str, Located],
    groups: Groups,
    path: Path,
    kinds: Mapping[str, Kind | None],
) -> list[Slot]:
    slots: list[Slot] = []
    for group, (entry, names) in enumerate(zip(entries, groups, strict=True)):
        settings, counted = settings_in(entry, path), _counted_by_one(entry, states, path)
        for index, name in zip(entry["params"], names, strict=True):
            if name is None or name not in module:
                continue  # only the optimizer had it, and DeepSpeed wasn't told to save it
            master, home = module[name]
            raw = state_of(states, index, path) if master.numel() else {}
            raw = {**raw, **counted} if raw else raw
            found = split_states(raw, master, path)
            trained = raw or (not states and master.numel())
            kind: Kind = kinds.get(name) or ("trainable" if trained else "frozen")
            tensors = {MASTER if kind == "trainable" else WEIGHT: (master, home)}
            tensors |= {key: (raw[key], path) for key in found.states}
            own = group if kind == "trainable" else None
            slots.append(whole_slot({name: tuple(master.shape)}, kind, tensors, found, own, settings))
    return slots


def _counted_by_one(entry: Mapping[str, Any], states: Mapping[Any, Any], path: Path) -> dict[str, int]:
    """Return the step of a group of DeepSpeed's ``FusedAdam`` or ``FusedLion``; nothing for other groups. These count for all
    tensors that they step on, but only in the last of them (``ops/adam/fused_adam.py``). The group's own step stays 0."""
    if not ("betas" in entry and entry.get(GROUP_STEP) == 0):
        return {}
    found = (state_of(states, index, path).get("step") for index in entry["params"])
    steps = [step for step in found if step is not None]
    return {"step": max(steps)} if steps and all(type(step) is int for step in steps) else {}


def _wrapper_slots(
    masters: Sequence[Any],
    states: Mapping[Any, Any],
    entries: Sequence[Mapping[str, Any]],
    module: Mapping[str, Located],
    groups: Groups,
    path: Path,
    fused: bool,
) -> list[Slot]:
    """Return the slots of a 16-bit wrapper: one for each group if it is fused, else one for each parameter."""
    slots: list[Slot] = []
    for group, (entry, held, names) in enumerate(zip(entries, masters, groups, strict=True)):
        settings, counted = settings_in(entry, path), _counted_by_one(entry, states, path)
        if fused:
            named = {name: tuple(module[name][0].shape) for name in names if name is not None}
            buffers = [(group, held, named)]
        elif len(held) == len(entry["params"]) == len(names):
            each = zip(entry["params"], held, names, strict=True)
            buffers = [(index, master, {str(name): tuple(master.shape)}) for index, master, name in each]
        else:
            raise DamagedCheckpointError(
                f"{path} holds {len(held)} masters of group {group}, of {len(names)} parameters"
            )
        for index, master, named in buffers:
            raw = state_of(states, index, path)
            raw = {**raw, **counted} if raw else raw
            found = split_states(raw, master, path)
            tensors = {MASTER: (master, path)} | {key: (raw[key], path) for key in found.states}
            slots.append(whole_slot(named, "trainable", tensors, found, group, settings))
    return slots


def _state_shapes(entry: Mapping[str, Any]) -> frozenset[Shape]:
    """Return the shapes of a parameter's states. If any state is element-wise, one is the parameter's. Scalars tell nothing."""
    tensors = (value for key, value in entry.items() if key != "step" and isinstance(value, torch.Tensor))
    return frozenset(tuple(tensor.shape) for tensor in tensors if tensor.ndim)


def _fused_groups(masters: Sequence[torch.Tensor], module: Mapping[str, Located], path: Path) -> Groups:
    if len(masters) == 1 and masters[0].numel() == sum(tensor.numel() for tensor, _ in module.values()):
        return [list(module)]
    sizes = [master.numel() for master in masters]
    raise _ambiguous(path, list(module), f"{len(masters)} flat groups of {sizes} elements")


def assign_names(module: Mapping[str, Located], expected: Expected, path: Path) -> Groups:
    """Assign names to each group's parameters, if the model's order leaves exactly one way.

    Each group is assumed to list its parameters in the model's order. The search looks for two assignments; if both exist, the
    parameters on which they differ are ambiguous.

    Raises:
        MismatchError: there is no assignment, or more than one; lists the parameters concerned.
    """
    names = list(module)
    shapes = [tuple(tensor.shape) for tensor, _ in module.values()]
    found = _assignments(shapes, expected)
    first = next(found, None)
    groups = f"{len(expected)} groups of {[len(group) for group in expected]} parameters"
    if first is None:
        raise _ambiguous(path, names, groups)
    second = next(found, None)
    if second is not None:
        differing = [name for name, one, two in zip(names, first, second, strict=True) if one != two]
        raise _ambiguous(path, differing, groups)
    assigned: Groups = [[] for _ in expected]
    for name, group in zip(names, first, strict=True):
        if group is not None:
            assigned[group].append(name)
    return assigned


def _assignments(shapes: Sequence[Shape], expected: Expected) -> Iterator[tuple[int | None, ...]]:
    """Yield the ways to hand the model's parameters, in order, to the groups (None: to no group)."""
    full = tuple(map(len, expected))
    layers: list[set[_Taken]] = [{(0,) * len(expected)}]
    for shape in shapes:
        layers.append({after for taken in layers[-1] for _, after in _moves(shape, expected, taken)})
        if sum(map(len, layers)) > tunables.MOST_STATES:
            return
    alive = [layers[-1] & {full}]  # states from which the rest can be handed out
    for layer, shape in zip(reversed(layers[:-1]), reversed(shapes), strict=True):
        alive.append(
            {taken for taken in layer if any(after in alive[-1] for _, after in _moves(shape, expected, taken))}
        )
    alive.reverse()
    # Depth first; every state that is alive leads to an assignment, so that the first two are found without backtracking.
    stack: list[tuple[_Taken, tuple[int | None, ...]]] = [(taken, ()) for taken in alive[0]]
    while stack:
        taken, choice = stack.pop()
        if len(choice) == len(shapes):
            yield choice
            continue
        moves = _moves(shapes[len(choice)], expected, taken)
        stack += [(after, (*choice, group)) for group, after in moves if after in alive[len(choice) + 1]]


_Taken = tuple[int, ...]
"""Number of parameters that each group has been handed so far."""


def _moves(shape: Shape, expected: Expected, taken: _Taken) -> Iterator[tuple[int | None, _Taken]]:
    """Yield the groups whose next parameter may have this shape, and no group."""
    yield None, taken
    for group, position in enumerate(taken):
        if position < len(expected[group]) and (not expected[group][position] or shape in expected[group][position]):
            yield group, (*taken[:group], position + 1, *taken[group + 1 :])


def _ambiguous(path: Path, names: Sequence[str], groups: str) -> MismatchError:
    return unnamed(path, f" ({groups}) and the model's order doesn't tell which is which", names)


def unnamed(path: Path, why: str, names: Sequence[str]) -> MismatchError:
    """Return the error for an optimizer state whose parameters can't be named."""
    return MismatchError(
        f"{path} names no parameters in its optimizer state{why}. DeepSpeed alone can load it, on the topology that saved it: do "
        f"so and save with ucp_deepspeed enabled, which records the names; then change. Of this one {WEIGHTS_HINT}. Parameters "
        f"that could be mixed up",
        names,
    )
