"""Ranks tell one another what they need over a process group of the package's own, and share the cores of a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.engine import agreement
from ucp_deepspeed.engine.loading.filling import Cores, own_cores, share_of_cores
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankPool

Ranks = Callable[[int], RankPool]


def tell(connects: bool) -> tuple[bool, list[Any], list[Any]]:
    """On one of three ranks: whether there is a group beside the default one, and what all ranks and ranks 1 and 2 have told;
    rank 1 comes later than the time to connect."""
    pair = dist.new_group([1, 2])
    plain = dist.new_group

    def new_group(*arguments: Any, **settings: Any) -> Any:
        if not connects and dist.get_rank() == 2:
            raise RuntimeError("no route to host")
        return plain(*arguments, **settings)

    with (
        mock.patch.object(agreement, "_made", (None, None)),
        mock.patch.object(tunables, "CONNECT_SECONDS", 1.0),
        mock.patch.object(dist, "new_group", new_group),
    ):
        group = agreement.control_group()
        assert not agreement.any_failed(False) and agreement.any_failed(dist.get_rank() == 1)
        if dist.get_rank() == 1:
            time.sleep(2)
        mine = "x" * 10 ** dist.get_rank()
        told = agreement.gathered(mine)
        if dist.get_rank() == 1:
            time.sleep(2)
        of_pair = agreement.gathered_in(pair, mine) if dist.get_rank() else []
    return group is not None, [len(each) for each in told], [len(each) for each in of_pair]


@pytest.mark.parametrize("connects", [True, False])
def test_ranks_tell_one_another(connects: bool, device: str) -> None:
    """Without a way over gloo they do so by the default group. The ranks have made different groups then, and serve no other
    test."""
    pool = RankPool(3, device=device)
    try:
        for rank, (own, told, of_pair) in enumerate(pool.run(tell, connects)):
            assert own == connects and told == [1, 10, 100] and of_pair == ([10, 100] if rank else [])
    finally:
        pool.close()


def fail_among_lost_ranks() -> str:
    """On a rank: the error of a rank that fails while the others are gone."""
    lost = mock.patch.object(agreement, "any_failed", side_effect=RuntimeError("Connection closed by peer"))
    with lost, pytest.raises(KeyError) as caught, agreement.agreement():
        raise KeyError("its own")
    return f"{caught.value!r} from {caught.value.__cause__!r}"


def test_ranks_that_are_gone_hide_no_error(ranks: Ranks) -> None:
    assert set(ranks(2).run(fail_among_lost_ranks)) == {
        "KeyError('its own') from RuntimeError('Connection closed by peer')"
    }


def long_list() -> list[tuple[int, str]]:
    """On a rank: how many problems it lists, of its own or of rank 1, and the last one."""
    found = []
    for failing in (dist.get_rank(), 1):
        with pytest.raises(MismatchError) as caught, agreement.agreement():
            if dist.get_rank() == failing:
                raise MismatchError("unlike", [f"{number}: no" for number in range(1000)], "do so")
        found.append((len(caught.value.problems), caught.value.problems[-1]))
    return found


def test_of_a_long_list_other_ranks_hear_the_beginning(ranks: Ranks) -> None:
    cut, whole = (101, "and 900 more"), (1000, "999: no")
    assert ranks(2).run(long_list) == [[whole, cut], [whole, whole]]


def cores(machine: str, *numbers: int) -> Cores:
    return machine, frozenset(numbers)


@pytest.mark.parametrize(
    ("of_ranks", "shares"),
    [
        ([cores("a", *range(8))] * 4, [2] * 4),  # torchrun: all of a machine's for every rank
        ([cores("a", 0, 1), cores("a", 2, 3), cores("a", 4, 5)], [2] * 3),  # each is bound to its own
        ([cores("a", *range(4)), cores("b", *range(4)), cores("b", *range(4))], [4, 2, 2]),
        ([cores("a", 0, 1), cores("a", 0, 1), cores("a", 2, 3)], [1, 1, 2]),
        ([cores("a", 0)] * 3, [1] * 3),
        ([cores("a", *range(7))] * 2, [3] * 2),
    ],
)
def test_ranks_share_cores(of_ranks: list[Cores], shares: list[int]) -> None:
    assert [share_of_cores(mine, of_ranks) for mine in of_ranks] == shares


def test_cores_of_a_rank(ranks: Ranks) -> None:
    first, second = ranks(2).run(own_cores)
    assert first == second and first[1]
