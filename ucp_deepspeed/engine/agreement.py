"""Rounds in which all ranks tell one another what they have, or why they failed, so that none goes on alone or waits for ever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deepspeed import comm as dist

from ucp_deepspeed.errors import ConfigError, UniversalCheckpointError

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """Return the values of all ranks. Collective over these, unless the process group is gone: then it is this rank's alone."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass
class Round:
    """Values that ranks tell one another at the end of an `agreement`.

    Attributes:
        mine: this rank's value; set within the block.
        values: all ranks' values; there after the block.
    """

    mine: Any = None
    values: list[Any] = field(default_factory=list)


@contextmanager
def agreement() -> Iterator[Round]:
    """Raise an error of one rank on every rank, so that none goes on alone. Collective over all ranks, once, at the end of the
    block.

    Raises:
        Exception: this rank's own error.
        UniversalCheckpointError: another rank's error, with its rank in the message unless it lists parameters.
    """
    told, error = Round(), None
    try:
        yield told
    except Exception as caught:
        error = caught
    answers = gathered((None if error is None else portable(error), told.mine))
    raise_first(error, enumerate(failed for failed, _ in answers))
    told.values = [value for _, value in answers]


def raise_first(own: Exception | None, of_ranks: Iterable[tuple[int, UniversalCheckpointError | None]]) -> None:
    """Raise this rank's own error, or else the first of these ranks' that has one; see `agreement`."""
    if own is not None:
        raise own
    for rank, error in of_ranks:
        if error is not None:
            raise error if getattr(error, "problems", ()) else type(error)(f"rank {rank}: {error}")


def portable(error: Exception) -> UniversalCheckpointError:
    """Return an error that other ranks can unpickle."""
    if isinstance(error, UniversalCheckpointError):
        return error
    return UniversalCheckpointError(f"{type(error).__name__}: {error}")


def check_same(what: str, of_ranks: Sequence[Mapping[str, Any]]) -> None:
    """Check settings that all ranks must share: with different ones, ranks would wait for one another, or end in different
    states.

    Args:
        what: the owner of the settings, for the message.
        of_ranks: the settings of each rank.

    Raises:
        ConfigError: lists the settings that differ.
    """
    first = of_ranks[0]
    differing = [
        f"{key} is {first[key]!r} on rank 0 and {other[key]!r} on rank {rank}"
        for rank, other in enumerate(of_ranks)
        for key in first
        if other[key] != first[key]
    ]
    if differing:
        more = f", and so on ({len(differing)} differences)" if len(differing) > 1 else ""
        raise ConfigError(f"{what!r} must be the same on all ranks: {differing[0]}{more}")
