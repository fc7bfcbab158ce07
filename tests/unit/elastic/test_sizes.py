"""Numbers of ranks that fit, and micro-batches, against a search over all of them."""

from __future__ import annotations

import itertools

import pytest

from ucp_deepspeed.elastic.job import Job
from ucp_deepspeed.elastic.launch import agent_arguments
from ucp_deepspeed.elastic.sizes import Range, Sizes, micro_batch
from ucp_deepspeed.errors import ConfigError


@pytest.mark.parametrize("batch", [None, 1, 12, 30])
@pytest.mark.parametrize(("tensor", "pipeline", "least"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 3, 1)])
def test_numbers_of_ranks(batch: int | None, tensor: int, pipeline: int, least: int) -> None:
    sizes = Sizes(batch, tensor, pipeline, least)
    fitting = [
        tensor * pipeline * data
        for data in range(1, 40)
        if data >= least and (batch is None or any(data * share == batch for share in range(1, 40)))
    ]
    for ranks in range(1, 40):
        assert (sizes.data_parallel(ranks) is not None) == (ranks in fitting)
        assert sizes.largest(ranks) == max((size for size in fitting if size <= ranks), default=None)
        assert [*sizes.up_to(ranks)] == [size for size in fitting if size <= ranks][::-1]


def test_micro_batches() -> None:
    for batch, largest, data in itertools.product(range(1, 25), range(1, 9), range(1, 9)):
        able = [
            micro
            for micro in range(1, largest + 1)
            if any(micro * parts * data == batch for parts in range(1, batch + 1))
        ]
        assert micro_batch(batch, largest, data) == max(able, default=None)


@pytest.mark.parametrize("text", ["", "0", "4:2", "a", "1:2:3", "-1"])
def test_what_is_no_range_of_nodes(text: str) -> None:
    with pytest.raises(ConfigError, match="--nodes takes a number or a range"):
        Range.parse("--nodes", text)


def test_the_agents_arguments() -> None:
    job = Job("mine", "host0:29400", "a", Sizes())
    words = agent_arguments(job, Range.parse("--nodes", "1:4"), 8, 7, ["train.py", "--lr", "1"])
    assert words[words.index("-m") :] == ["-m", "ucp_deepspeed.elastic.worker", "train.py", "--lr", "1"]
    assert "SIGUSR1" in words[words.index("--signals-to-handle") + 1].split(",")
    assert words[: words.index("--signals-to-handle")] == [
        *("--nnodes", "1:4", "--nproc-per-node", "8", "--max-restarts", "7"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "mine"),
    ]
