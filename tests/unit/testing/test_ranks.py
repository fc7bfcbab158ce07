"""The rank pool: results, failures, hangs and ends of real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ucp_deepspeed.testing.ranks import MOST_RANKS, RankError, RankPool, close_pools, fp16_on_cpu, get_pool

PARENT = """
import os, sys, time
from ucp_deepspeed.testing.ranks import get_pool

if __name__ == "__main__":
    print(*get_pool(2).run(os.getpid), flush=True)
    if sys.argv[1] == "hang":
        get_pool(2).run(time.sleep, 600)
"""


class OddError(Exception):
    """An exception that pickle can send but not make again."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


def describe(offset: int, *, factor: int) -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), (dist.get_rank() + offset) * factor


def sum_of_ranks() -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fail() -> None:
    raise LookupError(f"nothing on {dist.get_rank()}")


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise LookupError(f"nothing on {rank}")
    dist.barrier()


def fail_alone(rank: int) -> int:
    if dist.get_rank() == rank:
        raise LookupError(f"nothing on {rank}")
    return dist.get_rank()


def fail_oddly() -> None:
    raise OddError("odd", code=3)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    dist.barrier()


def wait_here() -> None:
    time.sleep(600)


def unpicklable() -> object:
    return lambda: None


def fp16_support() -> list[bool]:
    from deepspeed.accelerator import get_accelerator

    answers = [get_accelerator().is_fp16_supported()]
    with fp16_on_cpu():
        answers.append(get_accelerator().is_fp16_supported())
    return [bool(answer) for answer in [*answers, get_accelerator().is_fp16_supported()]]


@pytest.fixture(scope="module")
def own_pair() -> Iterator[RankPool]:
    """A pool of two that no other module uses: its ranks aren't renewed between two calls of a test."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture
def pair(own_pair: RankPool) -> Iterator[RankPool]:
    """A pool that must work after each test."""
    yield own_pair
    assert own_pair.run(sum_of_ranks) == [1, 1]


def alive(pid: int) -> bool:
    """Tell whether a process runs. One that has ended and only waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pids: list[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_results_come_in_rank_order(pair: RankPool) -> None:
    assert pair.run(describe, 5, factor=10) == [(0, 2, 50), (1, 2, 60)]


def test_ranks_stay_alive_between_calls(pair: RankPool) -> None:
    assert pair.run(os.getpid) == pair.run(os.getpid)


def test_exception_comes_back_with_rank_and_traceback_and_ranks_are_kept(pair: RankPool) -> None:
    pids = pair.run(os.getpid)
    with pytest.raises(RankError, match=r"fail failed on rank [01] of 2(?s:.)*in fail\n") as caught:
        pair.run(fail)
    assert isinstance(caught.value.original, LookupError)
    assert caught.value.original.args == (f"nothing on {caught.value.rank}",)
    assert pair.run(os.getpid) == pids


def test_rank_that_fails_while_others_wait_is_reported_quickly(pair: RankPool) -> None:
    pids = pair.run(os.getpid)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"nothing on 1(?s:.)*ranks \[0\] didn't finish(?s:.)*barrier") as caught:
        pair.run(fail_on, 1, timeout=120)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 30
    assert ended(pids)


def test_ranks_of_which_some_failed_are_replaced(pair: RankPool) -> None:
    pids = pair.run(os.getpid)
    with pytest.raises(RankError) as caught:
        pair.run(fail_alone, 0)
    assert caught.value.rank == 0
    assert ended(pids)


def test_rank_that_dies_is_reported_with_its_output(pair: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2:\nthe process died(?s:.)*last words") as caught:
        pair.run(die_on, 1)
    assert caught.value.original is None


def test_timeout_says_where_the_ranks_hang(pair: RankPool) -> None:
    pids = pair.run(os.getpid)
    with pytest.raises(RankError, match=r"took more than 1 s on ranks \[0, 1\] of 2(?s:.)*in wait_here") as caught:
        pair.run(wait_here, timeout=1)
    assert caught.value.rank is None
    assert ended(pids)


def test_exception_that_cannot_be_made_again_is_still_reported(pair: RankPool) -> None:
    with pytest.raises(RankError, match="OddError: odd") as caught:
        pair.run(fail_oddly)
    assert caught.value.original is None


def test_result_that_cannot_be_sent_is_an_error(pair: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?i)can't (pickle|get local object)"):
        pair.run(unpicklable)


def test_function_that_cannot_be_sent_leaves_the_ranks_alone(pair: RankPool) -> None:
    pids = pair.run(os.getpid)
    with pytest.raises((AttributeError, TypeError), match=r"(?i)pickle|local object"):
        pair.run(lambda: None)
    assert pair.run(os.getpid) == pids


def test_fp16_is_allowed_only_within_the_context(pair: RankPool) -> None:
    for before, within, after in pair.run(fp16_support):
        assert within
        assert after == before


def test_close_ends_the_ranks() -> None:
    pool = RankPool(1)
    pids = pool.run(os.getpid)
    pool.close()
    assert ended(pids)


def test_least_recently_used_pool_makes_room() -> None:
    close_pools()
    kept, closed = get_pool(1), get_pool(2)
    pids = closed.run(os.getpid)
    assert get_pool(1) is kept
    get_pool(MOST_RANKS - 1)
    assert ended(pids)
    assert get_pool(1) is kept
    close_pools()


@pytest.mark.parametrize("way", ["exit", "hang"])
def test_no_rank_outlives_its_parent(way: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script), way], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as output:
        pids = [int(pid) for pid in output.readline().split()]
        assert len(pids) == 2
        if way == "hang":
            time.sleep(0.5)  # until the ranks have got their call
            parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert ended(pids)
