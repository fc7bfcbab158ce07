"""The proof that a plan writes each wanted element exactly once. Compares boxes and intervals, never elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from ucp_deepspeed.layout.box import Box
from ucp_deepspeed.layout.layout import overlapping
from ucp_deepspeed.plan.fragment import Fragment

B = TypeVar("B")


def prove_cover(wanted: Box, found: Sequence[Box]) -> None:
    """Check that ``found`` tiles ``wanted``: all boxes inside, no two with a common element, and as many elements in all.

    Raises:
        ValueError: names the number of missing elements, or the first two boxes that overlap.
    """
    if len(found) == 1 and found[0] == wanted:
        return
    if any(not wanted.contains(box) for box in found):
        raise ValueError(f"a source box leaves the wanted box {wanted}")
    if overlap := overlapping(found):
        raise ValueError(f"the checkpoint holds elements twice: {overlap[0]} and {overlap[1]}")
    missing = wanted.numel - sum(box.numel for box in found)
    if missing:
        raise ValueError(
            f"{missing} of {wanted.numel} elements of {wanted.start}..{wanted.stop} are not in the checkpoint"
        )


def overlapping_fragments(fragments: Iterable[Fragment[B]]) -> tuple[Fragment[B], Fragment[B]] | None:
    """Return two fragments that claim the same element of the same buffer, or None.

    A target whose fragments pass this check can't be written twice by copies that `prove_cover` accepted one by one.
    """
    by_buffer: dict[B, list[Fragment[B]]] = {}
    for fragment in fragments:
        by_buffer.setdefault(fragment.buffer, []).append(fragment)
    for held in by_buffer.values():
        held.sort(key=lambda fragment: fragment.buffer_start)
        for before, after in pairwise(held):
            if before.buffer_start + before.numel > after.buffer_start:
                return before, after
    return None
