"""Sorting the keys of a DCP folder into the model's weights, the optimizer's states and groups, and the rest.

A key is a path in the state that was saved. Where model and optimizer lie in it is up to the program: at the top, as ``model``
and ``optim``, in an ``app``. The optimizer is found by its ``param_groups`` or ``state``, the model by the optimizer's names. The
optimizer's keys have two forms: that of ``get_optimizer_state_dict``, with numbered groups that list names, and the flattened
one, where each parameter has hyper-parameters of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp_deepspeed.checkpoint.dcp.entries import Entries
from ucp_deepspeed.checkpoint.dcp.metadata import Metadata
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.language.schemes import plain_name

_GROUPS = re.compile(r"^((?:[^.]+\.)*?)param_groups(?:\.|$)")
_STATE = re.compile(r"^((?:[^.]+\.)*?optim\w*\.)state\.")

_MODELS = ("model", "module", "state_dict", "model_state_dict")
"""Names that programs give to the model, where nothing else tells it from other tensors."""

LAYOUT_HINT = (
    'save the model and the optimizer as {"model": get_model_state_dict(…), "optim": get_optimizer_state_dict(…)}'
)


@dataclass(frozen=True)
class StoredGroup:
    """A parameter group: the names in it, and the key of each hyper-parameter."""

    names: tuple[str, ...]
    keys: Mapping[str, str]


@dataclass
class Sorted:
    """The keys by what they are.

    Attributes:
        weights: key of each parameter and buffer, by name.
        states: keys of the optimizer's states, by name and state.
        masters: key of each master that isn't the weight itself, by name.
        groups: the parameter groups; in flattened form one for each parameter.
        strays: optimizer states of no parameter.
        by_position: whether the optimizer numbers its parameters instead of naming them.
        extra: keys of the modules' extra states, by their key in the ``state_dict``.
        rest: all other keys.
    """

    weights: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    masters: dict[str, str] = field(default_factory=dict)
    groups: list[StoredGroup] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    by_position: bool = False
    extra: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def sort_keys(entries: Entries) -> Sorted:
    """Sort the keys.

    Raises:
        UnsupportedError: there are several optimizers, or nothing tells which tensors are the model's.
    """
    metadata, found = entries.metadata, Sorted()
    keys = [*metadata.tensors, *metadata.objects]
    home = _optimizer_home(metadata, keys)
    held = [] if home is None else [key for key in keys if key.startswith((f"{home}param_groups", f"{home}state."))]
    optimizers = frozenset(held)
    named = [] if home is None else _read_groups(entries, found, held, f"{home}param_groups.")
    others = [key for key in metadata.tensors if key not in optimizers]
    model = _model_home(metadata, others, named)
    for key in keys:
        if key in optimizers:
            continue
        name, inside = key[len(model) :].removeprefix("."), model in _homes(metadata, key)
        if inside and name.rpartition(".")[2] == "_extra_state":
            found.extra[name] = key
        elif inside and key in metadata.tensors:
            found.weights[name] = key
        else:
            found.rest.append(key)
    if home is not None:
        _sort_states(metadata, found, [key for key in held if key.startswith(f"{home}state.")], f"{home}state.")
    _use_weights_names(found)
    return found


def _optimizer_home(metadata: Metadata, keys: Iterable[str]) -> str | None:
    """Return the beginning of the optimizer's keys; None if there is no optimizer."""
    for pattern in (_GROUPS, _STATE):
        homes = sorted({match[1] for match in map(pattern.match, keys) if match})
        if len(homes) > 1:
            told = f"{metadata.path} holds {len(homes)} optimizers"
            raise UnsupportedError(told, homes, f"one optimizer is read: {LAYOUT_HINT}")
        if homes:
            return homes[0]
    return None


def _read_groups(entries: Entries, found: Sorted, held: list[str], start: str) -> list[str]:
    """Sort the keys of groups, and return the names that they tell."""
    groups: dict[Any, dict[str, str]] = {}
    flattened: dict[str, dict[str, str]] = {}
    paths, has_paths = entries.metadata.paths, entries.metadata.has_paths
    # Parameters of a sequence have names that begin with a number too.
    numbers = {key[len(start) :].partition(".")[0] for key in held if re.fullmatch(r"\d+\.params", key[len(start) :])}
    for key in held:
        first, _, rest = key.removeprefix(start).partition(".")
        if not key.startswith(start):
            continue
        if rest and (any(type(part) is int for part in paths[key]) if has_paths else first in numbers):
            groups.setdefault(int(first), {})[rest] = key
        else:
            name, _, setting = key.removeprefix(start).rpartition(".")
            flattened.setdefault(name, {})[setting] = key
    if not groups:  # both forms may be there
        found.groups = [StoredGroup((name,), keys) for name, keys in flattened.items()]
    for _, keys in sorted(groups.items()):
        names: list[str] = []
        for naming in ("param_names", "params"):
            told = entries.value(keys[naming]) if naming in keys and not names else None
            if isinstance(told, list | tuple) and all(isinstance(each, str) for each in told):
                names = list(told)
        found.by_position = found.by_position or not names
        settings = {setting: key for setting, key in keys.items() if setting not in ("param_names", "params")}
        found.groups.append(StoredGroup(tuple(names), settings))
    return [name for group in found.groups for name in group.names]


def _model_home(metadata: Metadata, others: Collection[str], named: Collection[str]) -> str:
    """Return where in the saved state the model is, by the names that the optimizer tells, or by what programs call it.

    Args:
        others: keys of all tensors that aren't the optimizer's.
    """
    homes: Counter[str] = Counter()
    plain = set(map(plain_name, named))
    for key in others:
        for home in _homes(metadata, key):
            homes[home] += not plain or plain_name(key[len(home) :].removeprefix(".")) in plain
    found = [home for home in homes if homes[home] == max(homes.values()) > 0]
    if len(found) > 1:  # an average of the weights beside the model has the same names
        found = [home for home in found if home.rpartition(".")[2] in _MODELS] or found
    if not plain:
        every = [home for home in homes if homes[home] == len(others)] if not metadata.has_paths else list(homes)
        called = [home for home in every if home.rpartition(".")[2] in _MODELS]
        found = called or [home for home in every if not home] or every
    if len(found) != 1 and others:
        told = f"{metadata.path} doesn't tell which tensors are the model's; they may lie in"
        raise UnsupportedError(told, sorted(home or "(the top)" for home in homes), LAYOUT_HINT)
    return found[0] if found else ""


def _homes(metadata: Metadata, key: str) -> list[str]:
    """Return where a state dict that holds this key may lie: where its path says, or at any dot."""
    if metadata.has_paths:
        return [".".join(map(str, metadata.paths[key][:-1]))]
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _sort_states(metadata: Metadata, found: Sorted, held: list[str], start: str) -> None:
    names = {name for group in found.groups for name in group.names} | found.weights.keys()
    plain = {plain_name(name): name for name in names}
    for key in held:
        parts = key.removeprefix(start).split(".")
        places = [(".".join(parts[:count]), ".".join(parts[count:])) for count in range(len(parts) - 1, 0, -1)]
        owner = next(((name, state) for name, state in places if name in names), None) or next(
            ((plain[plain_name(name)], state) for name, state in places if plain_name(name) in plain), None
        )
        if owner is not None:
            found.states.setdefault(owner[0], {})[owner[1]] = key
        elif parts[0].isdigit():
            found.by_position = True
        else:
            found.strays.append(key)


def _use_weights_names(found: Sorted) -> None:
    """Give the optimizer's parameters the names that the weights have, which may have parts of wrappers that they lack."""
    plain = {plain_name(name): name for name in found.weights}

    def of(name: str) -> str:
        return name if name in found.weights else plain.get(plain_name(name), name)

    found.states = {of(name): states for name, states in found.states.items()}
    found.groups = [StoredGroup(tuple(map(of, group.names)), group.keys) for group in found.groups]
