"""``"batch": "keep"``: the batch of a step on other numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import pytest
import torch

from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state

Ranks = Callable[[int], RankPool]


def sizes(config: dict[str, object], universal: dict[str, object]) -> tuple[int, int, int] | str:
    """On a rank: the batch, micro-batch and accumulation of an engine, or the error."""
    reset_parallel_state()
    model, block = torch.nn.Linear(2, 2), {"enabled": True, **universal}
    optimizer = {"type": "Adam", "params": {"torch_adam": True}}
    try:
        engine, *_ = deepspeed.initialize(
            model=model, config={"optimizer": optimizer, "universal_checkpoint": block, **config}
        )
    except (ConfigError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()


@pytest.mark.parametrize(("number", "expected"), [(1, (12, 4, 3)), (2, (12, 3, 2)), (3, (12, 4, 1)), (4, (12, 3, 1))])
def test_a_batch_is_kept(number: int, expected: tuple[int, int, int], ranks: Ranks) -> None:
    for accumulation in ({}, {"gradient_accumulation_steps": 1}):
        config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 4, **accumulation}
        assert ranks(number).run(sizes, config, {"batch": "keep"}) == [expected] * number


def test_a_batch_that_cannot_be_shared(ranks: Ranks) -> None:
    config = {"train_batch_size": 14, "train_micro_batch_size_per_gpu": 4}
    for told in ranks(4).run(sizes, config, {"batch": "keep"}):
        assert told.startswith("ConfigError: a batch of 14 can't be shared by 4 data-parallel ranks; ")
        assert "numbers of ranks that work here: 1, 2, 7, 14; start 2 ranks" in told


@pytest.mark.parametrize("config", [{"train_batch_size": 12}, {"train_micro_batch_size_per_gpu": 4}])
def test_both_numbers_are_needed(config: dict[str, object], ranks: Ranks) -> None:
    (told,) = ranks(1).run(sizes, config, {"batch": "keep"})
    assert told.startswith('ConfigError: "batch": "keep" needs the batch of a step and the largest micro-batch')


def test_as_given_and_off_change_nothing(ranks: Ranks) -> None:
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    for universal in ({}, {"batch": "as-given"}, {"batch": "keep", "enabled": False}):
        assert all(told.startswith("AssertionError: ") for told in ranks(2).run(sizes, config, universal))
