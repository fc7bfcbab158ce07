"""Whether a file of ZeRO-1/2's is the one that its name says: ``param_slice_mappings`` tell which elements a rank had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import FlatGroup

OpenGroup = Callable[[int], tuple[dict[str, Any], Path, int]]
"""See `ucp_deepspeed.checkpoint.deepspeed_zero.OpenGroup`."""


def held_as_mapped(open_group: OpenGroup, names: Sequence[str], flattening: FlatGroup) -> OpenGroup:
    """The same, for partitions whose files record that they hold what lies there; before 0.7.4 they record nothing.

    Raises:
        DamagedCheckpointError: when one is opened that records something else: files were exchanged, or one was copied.
    """

    @cache
    def opened(partition: int) -> tuple[dict[str, Any], Path, int]:
        saved, path, index = open_group(partition)
        mappings = saved.get("param_slice_mappings") or ()
        if index < len(mappings):  # of torch's Adagrad only the first group's are there
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
