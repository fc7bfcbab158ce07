"""Retention: which checkpoints of a folder may go, and why the others stay. Nothing is removed here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt

from ucp_deepspeed.checkpoint.whole import FoundCheckpoint

PIN_NAME = ".keep"
"""An empty file of the user's in a checkpoint that no retention removes."""


class Keep(BaseModel):
    """The checkpoints that stay.

    Attributes:
        last: so many of the newest whole ones.
        every: also each whole one whose step is a multiple of this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    last: PositiveInt
    every: PositiveInt | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """A checkpoint and why it stays; None if it may go."""

    checkpoint: FoundCheckpoint
    stays: str | None


def fates(
    found: Sequence[FoundCheckpoint],
    keep: Keep,
    latest: Path | None = None,
    pinned: Collection[Path] = (),
    in_use: Callable[[Path], str | None] = lambda path: None,
) -> list[Fate]:
    """Return what becomes of each checkpoint. Without a whole one, all stay; so does whatever is newer than the newest whole one.

    Args:
        found: the checkpoints, newest first.
        latest: the one that the file ``latest`` names.
        pinned: further ones that stay, besides those with a file `PIN_NAME`.
        in_use: who uses one just now, in words; None if nobody does.
    """
    told: dict[Path, str] = {}
    for each in found:
        if (use := in_use(each.path)) is not None:
            told[each.path] = use
    whole = [each for each in found if each.problem is None and each.path not in told]
    place = {each.path: number for number, each in enumerate(whole)}
    newest = found.index(whole[0]) if whole else len(found)

    def stays(number: int, each: FoundCheckpoint) -> str | None:
        if each.path in told:
            return told[each.path]
        if each.path == latest:
            return "latest names it"
        if each.path in pinned or (each.path / PIN_NAME).exists():
            return "it is pinned"
        if not whole:
            return "none is whole"
        if each.path not in place:
            return "it isn't whole, and no newer one is" if number < newest else None
        if place[each.path] < keep.last:
            return "it is the newest whole one" if keep.last == 1 else f"it is one of the newest {keep.last} whole ones"
        if keep.every is not None and each.step >= 0 and each.step % keep.every == 0:
            return f"step {each.step} is a multiple of {keep.every}"
        return None

    return [Fate(each, stays(number, each)) for number, each in enumerate(found)]
