"""Rounds in which all ranks tell one another what they have, or why they failed, so that none goes on alone or waits for ever.

They go over a process group of the package's own, on the hosts (gloo): objects needn't pass through an accelerator's memory, and
a rank may wait for a slow writer for longer than training may wait for a rank.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.engine.replaced import replaced
from ucp_deepspeed.errors import ConfigError, ListingError, UniversalCheckpointError

logger = logging.getLogger("ucp_deepspeed")

T = TypeVar("T")

_made: tuple[Any, Any] = None, None
"""The default process group, and the group of the package's own beside it."""


def control_group() -> Any:
    """Return the process group for all that isn't tensors; None, the default one, where hosts can't connect over gloo.

    The first call makes it. Collective over all ranks.
    """
    global _made
    if _made[0] is not dist.group.WORLD:
        _made = dist.group.WORLD, _make_control_group()
    return _made[1]


def _make_control_group() -> Any:
    failure = None
    try:
        probe = dist.new_group(backend="gloo", timeout=timedelta(seconds=tunables.CONNECT_SECONDS))
        dist.destroy_process_group(probe)
    except Exception as error:  # such as a host whose name leads to an address that others don't reach
        failure = f"{type(error).__name__}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
    if not failed:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=tunables.CONTROL_SECONDS))
    if dist.get_rank() == 0:
        logger.warning(
            "ranks can't connect over gloo, and tell one another what they need to over %s; GLOO_SOCKET_IFNAME names the network "
            "interface for gloo: %s",
            dist.get_backend(),
            failed[0],
        )
    return None


def gathered(value: T) -> list[T]:
    """Return the values of all ranks. Collective over these, unless the process group is gone: then it is this rank's alone."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def gathered_in(group: Any, value: T) -> list[T]:
    """Return the values of a process group's ranks, in their order. Collective over that group alone."""
    ranks, control = dist.get_process_group_ranks(group), _made[1] if _made[0] is dist.group.WORLD else None
    if control is None:
        values: list[Any] = [None] * len(ranks)
        dist.all_gather_object(values, value, group=group)
        return values
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size, others = torch.tensor([mine.numel()], device="cpu"), [rank for rank in ranks if rank != dist.get_rank()]
    sizes = _swapped(size, {rank: torch.empty_like(size) for rank in others}, control)
    held = _swapped(
        mine, {rank: torch.empty(int(numel), dtype=torch.uint8, device="cpu") for rank, numel in sizes.items()}, control
    )
    return [pickle.loads(held[rank].numpy().tobytes()) if rank in held else value for rank in ranks]


def _swapped(mine: torch.Tensor, held: dict[int, torch.Tensor], group: Any) -> dict[int, torch.Tensor]:
    """Send one tensor to other ranks, and fill ``held`` with theirs."""
    works: list[Any] = [dist.irecv(tensor, rank, group=group) for rank, tensor in held.items()]
    works += [dist.isend(mine, rank, group=group) for rank in held]
    for work in works:
        work.wait(timedelta(seconds=tunables.CONTROL_SECONDS))
    return held


def any_failed(mine: bool) -> bool:
    """Return whether any rank has failed; it costs much less than to gather errors. Collective over all ranks."""
    if not dist.is_initialized() or (control := control_group()) is None:
        return any(gathered(mine))
    flag = torch.tensor(mine, dtype=torch.int32, device="cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
    return bool(flag)


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
def agreement(tells: bool = False) -> Iterator[Round]:
    """Raise an error of one rank on every rank, so that none goes on alone. Collective over all ranks, once, at the end of the
    block; twice if a rank fails.

    Args:
        tells: whether ranks tell one another values too; the same on all of them.

    Raises:
        Exception: this rank's own error.
        UniversalCheckpointError: another rank's error, with its rank in the message unless it lists parameters.
    """
    told, error = Round(), None
    try:
        yield told
    except Exception as caught:
        error = caught
    assert tells or told.mine is None, "only a round that tells has values"
    try:
        if not tells and not any_failed(error is not None):
            return
        answers = gathered((None if error is None else portable(error), told.mine))
    except Exception as failed:
        if error is not None:  # ranks that are gone don't hide it
            raise error from failed
        raise
    raise_first(error, enumerate(failed for failed, _ in answers))
    told.values = [value for _, value in answers]


@contextmanager
def agreement_before(*methods: tuple[Any, str], after: Sequence[tuple[Any, str]] = ()) -> Iterator[None]:
    """Raise an error of one rank on every rank, as `agreement` does; in the block the ranks meet at the begin of methods of
    DeepSpeed's too, in which those that are well would wait for ever. Collective at the end of the block.

    Args:
        methods: objects and the names of their methods, which have a collective in them and which all ranks call, equally often;
            those that an object doesn't have are left out.
        after: methods that have none, and which a collective follows; here ranks meet at the end.
    """
    told: list[Exception] = []

    def meeting(method: Callable[..., Any], runs_alone: bool) -> Callable[..., Any]:
        def met(*args: Any, **kwargs: Any) -> Any:
            try:
                with agreement():  # a rank that has failed is at the end of the block: it is the same round
                    if runs_alone:
                        return method(*args, **kwargs)
            except Exception as error:
                told.append(error)
                raise
            return method(*args, **kwargs)

        return met

    error = None
    try:
        with ExitStack() as stack:
            for owner, name in (*methods, *after):
                if (method := getattr(owner, name, None)) is not None:
                    stack.enter_context(replaced(owner, **{name: meeting(method, (owner, name) in after)}))
            yield
    except Exception as caught:
        error = caught
    if told:  # the ranks have met for the last time
        raise told[0]
    with agreement():
        if error is not None:
            raise error


def raise_first(own: Exception | None, of_ranks: Iterable[tuple[int, UniversalCheckpointError | None]]) -> None:
    """Raise this rank's own error, or else the first of these ranks' that has one; see `agreement`."""
    if own is not None:
        raise own
    for rank, error in of_ranks:
        if error is not None:
            raise error if getattr(error, "problems", ()) else type(error)(f"rank {rank}: {error}")


def portable(error: Exception) -> UniversalCheckpointError:
    """Return an error that other ranks can unpickle, short enough to come from thousands of ranks."""
    if isinstance(error, ListingError) and len(error.problems) > (most := tunables.TOLD_PROBLEMS):
        more = f"and {len(error.problems) - most} more"
        return type(error)(error.heading, (*error.problems[:most], more), error.remedy)
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
