"""Numbers of an optimizer that differ between partitions of a checkpoint, and their fate if the target has other partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES, Differing
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.slots import Numbers, Slot

OnDiffering = Literal["error", "first", "last", "mean", "max"]
"""Policy for a target with other partitions: refuse, or make one number of them. It also applies to copies of a parameter
that several pipeline stages hold, if nothing tells which was trained: ``last`` takes the last copy, all others the first."""

DIFFERING_HINT = (
    'the topology that saved it gives each its own back, and "on_differing": "first", "last", "mean" or "max" makes one of '
    "them"
)

MOST_TOLD = 8
"""Number of partitions whose values one message lists."""


class DifferingNumbers:
    """Finds differing numbers in the files of the tensor-parallel ranks of a pipeline stage, once."""

    def __init__(self, tp: int, recorded_same: bool) -> None:
        """Args: recorded_same: the numbers are recorded to be the same, so that no file is opened."""
        self._tp = 0 if recorded_same else tp
        self._known: dict[tuple[int, ...], Differing] = {}

    def scalars(self, first: int, slots_of: Callable[[int], Sequence[Slot]]) -> Differing:
        """Return states that are one number and differ, in the slots of the stage whose first rank is ``first``."""
        slots = self._slots(first, slots_of)
        key = tuple(id(slot) for _, slot in slots)
        if key not in self._known:
            self._known[key] = _differing(_by_place((place, read().scalars) for place, read in _numbers(slots)))
        return self._known[key]

    def settings(self, first: int, slots_of: Callable[[int], Sequence[Slot]]) -> Differing:
        """Return differing hyper-parameters of the slots' group, without switches of the implementation."""
        slots = self._slots(first, slots_of)
        return _differing(_by_place((place, _meant(read().settings)) for place, read in _numbers(slots)))

    def _slots(self, first: int, slots_of: Callable[[int], Sequence[Slot]]) -> list[tuple[str, Slot]]:
        place = "tensor-parallel rank {}, " if self._tp > 1 else ""
        return [(place.format(rank), slot) for rank in range(self._tp) for slot in slots_of(first + rank)]


def _numbers(slots: Iterable[tuple[str, Slot]]) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    for place, slot in slots:
        for part, read in slot.numbers.items():
            yield f"{place}{part}", read


def _meant(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in IMPLEMENTATION_SWITCHES}


def _by_place(values: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """Merge values of the same place. Spread experts have several files for a place; files that differ get a number each."""
    found: dict[str, Mapping[str, Any]] = {}
    for place, held in values:
        number, name = 1, place
        while name in found and not same_value(found[name], held):
            number += 1
            name = f"{place} ({number})"
        found[name] = held
    return found


def _differing(found: Mapping[str, Mapping[str, Any]]) -> Differing:
    keys = dict.fromkeys(key for values in found.values() for key in values)
    by_key = {key: {place: values.get(key) for place, values in found.items()} for key in keys}
    return {key: held for key, held in by_key.items() if not all_same(list(held.values()))}


def all_same(values: Sequence[Any]) -> bool:
    """Return whether all values are the same, as `same_value` tells."""
    return all(same_value(value, values[0]) for value in values[1:])


def made_one(
    values: Mapping[str, Any], differing: Differing, how: OnDiffering
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace differing values by one value each. Return the values, and those that can't be made one, in words."""
    found, refused = dict(values), {}
    for key, held in differing.items():
        try:
            found[key] = _one_of(list(held.values()), how)
        except ValueError:
            refused[key] = in_words(held)
    return found, refused


def in_words(held: Mapping[str, Any]) -> str:
    """The values of a number, with the partitions that have them."""
    told = [f"{value!r} on {place}" for place, value in list(held.items())[:MOST_TOLD]]
    return ", ".join(told) + (f" and others on {len(held) - MOST_TOLD} more" if len(held) > MOST_TOLD else "")


def _one_of(values: Sequence[Any], how: OnDiffering) -> Any:
    if how in ("first", "last"):
        return values[0 if how == "first" else -1]
    if how == "error" or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(how)
    if how == "max":
        return max(values)
    mean = sum(values) / len(values)
    return int(mean) if all(type(value) is int for value in values) and mean.is_integer() else mean
