"""Keys of a ``torch_dist`` folder, and the names of the model's parameters.

Megatron-Core stacks tensors that all layers have into one, with a dimension in front for the layer, and experts in the same way
(``transformer/transformer_block.py``, ``transformer/moe/experts.py``). Here each layer has its own tensor again, and each expert.
With ``singleton_local_shards`` nothing is stacked, but gate and up lie apart (``transformer/mlp.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from ucp_deepspeed.checkpoint.dcp.metadata import Metadata, Part, StoredTensor
from ucp_deepspeed.checkpoint.dcp.sorting import Sorted
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Box

_STACK = re.compile(r"(?:(?<=\.)|^)(?:layers|experts\.experts)\.")
"""A part of a key behind which a number stands, or else a dimension is stacked."""

_NUMBER = re.compile(r"\d+\.")

_HALVES = "_w", "_v"
"""Endings of the keys of gate and up, where these lie apart."""

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")

_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")
"""Beginning of the keys of buffers, in the forms of sharding that keep these as they are."""

_SHARD = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
"""Key of an object, of which each rank may have another one."""

MASTERS = ("param", "fp32_param")
"""Names of masters among the states: of the distributed optimizer, and of others."""

RANDOM = "rng_state"

SHARDING_HINT = (
    "save with distrib_optim_sharding_type='fully_reshardable' (Megatron-LM: --dist-ckpt-optim-fully-reshardable)"
)

EXTRA = "._extra_state"


@dataclass
class Keys(Sorted):
    """See `Sorted`. The keys of the tensors are those of `unstacked`.

    Attributes:
        buckets: keys of buffers of the distributed optimizer.
    """

    buckets: list[str] = field(default_factory=list)


def unstacked(metadata: Metadata) -> Metadata:
    """Return the metadata with a tensor for each layer and each expert, and gate and up in one.

    Raises:
        DamagedCheckpointError: what is stacked isn't whole, or the halves don't fit.
        UnsupportedError: a chunk holds several layers.
    """
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in metadata.tensors.items():
        for found, part in _taken_apart(metadata, key, tensor):
            if found in tensors:
                _refuse(metadata, f"holds {found!r:.80} twice")
            tensors[found] = part
    tensors = _joined(metadata, tensors)
    return replace(metadata, tensors=tensors, paths={key: (key,) for key in (*tensors, *metadata.objects)})


def _taken_apart(metadata: Metadata, key: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of single layers and experts that a tensor stacks."""
    for stack in _STACK.finditer(key):
        if _BUCKETS.match(key) or _NUMBER.match(key, stack.end()):
            continue
        if not tensor.shape:
            _refuse(metadata, f"has {key!r:.80} without the dimension of its layers")
        places: dict[int, dict[Box, Part]] = {number: {} for number in range(tensor.shape[0])}
        for box, part in tensor.chunks.items():
            if box.shape[0] != 1:
                told = f"{metadata.path} has {box.shape[0]} layers of {key!r:.80} in one chunk"
                raise UnsupportedError(f"{told}; save it again with Megatron-Core, which gives each layer its own")
            places[box.start[0]][Box(box.start[1:], box.stop[1:])] = part
        for number, chunks in places.items():
            name = f"{key[: stack.end()]}{number}.{key[stack.end() :]}"
            yield from _taken_apart(metadata, name, StoredTensor(tensor.dtype, tensor.shape[1:], chunks))
        return
    yield key, tensor


def _joined(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with gate and up, which lie apart, as rows of one."""
    first, second = _HALVES
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        whole = key[: -len(first)]
        others = [f"{whole}{ending}" for ending in _HALVES]
        if not key.endswith(_HALVES) or not all(other in tensors for other in others):
            found[key] = tensor
        elif key.endswith(second):
            gate, up = (tensors[other] for other in others)
            if (gate.dtype, gate.shape) != (up.dtype, up.shape) or not gate.shape:
                _refuse(metadata, f"has {whole!r:.80} in halves of different shapes")
            below = {_moved(box, gate.shape[0]): part for box, part in up.chunks.items()}
            shape = (gate.shape[0] + up.shape[0], *gate.shape[1:])
            found[whole] = StoredTensor(gate.dtype, shape, {**gate.chunks, **below})
    return found


def _moved(box: Box, rows: int) -> Box:
    return Box((box.start[0] + rows, *box.start[1:]), (box.stop[0] + rows, *box.stop[1:]))


def sort_keys(metadata: Metadata) -> Keys:
    """Sort the keys of `unstacked` metadata.

    Raises:
        DamagedCheckpointError: a parameter has two masters.
    """
    found = Keys()
    for key in metadata.tensors:
        if _BUCKETS.match(key):
            found.buckets.append(key)
        elif (state := _STATE.fullmatch(key)) is None:
            found.weights[_name(key)] = key
        elif state[1] in MASTERS:
            if (name := _name(state[2])) in found.masters:
                _refuse(metadata, f"holds two masters of {name!r:.80}")
            found.masters[name] = key
        else:
            found.states.setdefault(_name(state[2]), {})[state[1]] = key
    found.weights = {name: found.weights[name] for name in _in_order(found.weights)}
    for key in metadata.objects:
        name, _ = shard_of(key)
        if _BUCKETS.match(key):
            found.buckets.append(key)
        elif name.endswith(EXTRA):
            found.extra[_name(_numbered(key))] = key
        elif name != RANDOM:
            found.rest.append(key)
    found.strays = sorted(
        states[state] for name, states in found.states.items() if name not in found.weights for state in states
    )
    found.strays += [key for name, key in found.masters.items() if name not in found.weights]
    found.states = {name: states for name, states in found.states.items() if name in found.weights}
    return found


def shard_of(key: str) -> tuple[str, tuple[int, ...]]:
    """Return an object's name without the part that numbers it, and its number in each dimension."""
    match = _SHARD.fullmatch(key)
    return (key, ()) if match is None else (match[1], tuple(int(each) for each in match[2].split(".") if each))


def _numbered(key: str) -> str:
    """Return the name of a layer's object, whose number in the stack stands at its end."""
    name, numbers = shard_of(key)
    for number in numbers:
        stack = next((each for each in _STACK.finditer(name) if not _NUMBER.match(name, each.end())), None)
        if stack is not None:
            name = f"{name[: stack.end()]}{number}.{name[stack.end() :]}"
    return name


def _name(key: str) -> str:
    """Return the model's name: experts are modules in a list there."""
    return key.replace(".experts.experts.", ".experts.local_experts.")


def _in_order(names: Iterable[str]) -> list[str]:
    """Return names in the model's order: layer by layer, and in a layer as they stand."""
    first: dict[str, int] = {}

    def place(item: tuple[int, str]) -> tuple[int, int, int]:
        position, name = item
        stack = _STACK.search(name)
        number = None if stack is None else _NUMBER.match(name, stack.end())
        if stack is None or number is None:
            return position, 0, position
        return first.setdefault(name[: stack.end()], position), int(number[0][:-1]), position

    numbered = list(enumerate(names))
    places = {item: place(item) for item in numbered}
    return [name for _, name in sorted(numbered, key=places.__getitem__)]


def _refuse(metadata: Metadata, told: str) -> NoReturn:
    raise DamagedCheckpointError(f"{metadata.path} {told}; {REMEDY}")
