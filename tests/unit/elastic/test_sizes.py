"""Numbers of ranks that fit, and micro-batches, against a search over all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.run import parse_args

from ucp_deepspeed.elastic.job import Job
from ucp_deepspeed.elastic.launch import agent_arguments, agree, run
from ucp_deepspeed.elastic.sizes import Auto, Range, Sizes, micro_batch
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
    """torch's parser leaves a script's options alone, also beginnings of its own, such as those of ``--log-dir``."""
    script = ["train.py", "--log", "1"]
    job = Job("mine", "host0:29400", "a", Sizes())
    words = agent_arguments(job, Range.parse("--nodes", "1:4"), 8, 7, script)
    assert words[words.index("-m") :] == ["-m", "--", "ucp_deepspeed.elastic.worker", *script]
    assert parse_args(words).training_script_args == script
    assert "SIGUSR1" in words[words.index("--signals-to-handle") + 1].split(",")
    assert words[: words.index("--signals-to-handle")] == [
        *("--nnodes", "1:4", "--nproc-per-node", "8", "--max-restarts", "7"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "mine"),
    ]


@pytest.mark.parametrize(
    ("store", "script", "reason"),
    [
        ("host0", "train.py", "--store takes HOST:PORT, such as host0:29400, not 'host0'"),
        ("host0:", "train.py", "not 'host0:'"),
        ("host0:http", "train.py", "not 'host0:http'"),
        (":29400", "train.py", "not ':29400'"),
        ("host0:65536", "train.py", "not 'host0:65536'"),
        ("host0:29400", "other.py", "there is no script other.py, seen from "),
        (None, "other.py", "give its path on this node, or a module after -- -m"),
    ],
)
def test_starts_that_would_fail_in_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str | None, script: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    with pytest.raises(ConfigError) as refused:
        run("1", 1, store, None, None, None, 0, None, "1", "1", 1, "fixed", None, None, (script,))
    assert reason in str(refused.value)


def test_nodes_of_a_run_are_started_with_the_same_sizes() -> None:
    store, first = HashStore(), Job("mine.0", "host0:29400", "a", Sizes(8))
    auto = Auto("run", 1, (1,), (1,), 4)
    agree(store, first, 2)
    agree(store, replace(first, node="b"), 2)
    agree(store, replace(first, run="mine.1", sizes=Sizes(7)), 2)
    for other, on_node in ((replace(first, sizes=Sizes(7)), 2), (first, 1), (replace(first, auto=auto), 2)):
        with pytest.raises(
            ConfigError, match="with a batch of 8, 2 ranks on each node: give all nodes the same options"
        ):
            agree(store, other, on_node)
