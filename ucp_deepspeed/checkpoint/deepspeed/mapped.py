"""A check of ZeRO-1/2's files against their names: ``param_slice_mappings`` tell which elements a rank had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import FlatGroup

OpenGroup = Callable[[int], tuple[dict[str, Any], Path, int]]
"""See `ucp_deepspeed.checkpoint.deepspeed.zero.OpenGroup`."""


def held_as_mapped(open_group: OpenGroup, names: Sequence[str], flattening: FlatGroup) -> OpenGroup:
    """Open groups like ``open_group``, but check each file's record of the elements in it. Before 0.7.4 there is no record.

    Raises:
        DamagedCheckpointError: a file that is opened records something else: files were exchanged, or one was copied.
    """

    @cache
    def opened(partition: int) -> tuple[dict[str, Any], Path, int]:
        saved, path, index = open_group(partition)
        mappings = saved.get("param_slice_mappings") or ()
        if index < len(mappings):  # torch's Adagrad has only the first group's
            found = {name: (address.start, address.numel) for name, address in mappings[index].items()}
            laid = {names[held.index]: (held.buffer_start, held.numel) for held in flattening.held_by(partition)}
            differing = [name for name in (*found, *laid) if found.get(name) != laid.get(name)]
            if differing and found.keys() <= set(names):
                raise DamagedCheckpointError(
                    f"{path} records that it holds {_told(found.get(differing[0]))} of {differing[0]}; partition {partition} of "
                    f"{flattening.partitions} has {_told(laid.get(differing[0]))}: this is another rank's file, or another run's"
                )
        return saved, path, index

    return opened


def _told(place: tuple[int, int] | None) -> str:
    return "nothing" if place is None else f"{place[1]} elements from position {place[0]} on"
