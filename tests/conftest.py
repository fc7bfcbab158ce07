"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

from ucp_deepspeed.testing.ranks import RankPool, get_pool

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Set how long the random search is, and where it begins."""
    parser.addoption("--pairs", type=int, default=12, help="pairs that the random search tries")
    parser.addoption("--first-pair", type=int, default=0, help="seed of the first pair; the others follow")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``pair_seed``: one test for each pair."""
    if "pair_seed" in metafunc.fixturenames:
        first, count = (metafunc.config.getoption(name) for name in ("--first-pair", "--pairs"))
        metafunc.parametrize("pair_seed", range(first, first + count))


@pytest.fixture
def ranks() -> Callable[[int], RankPool]:
    """``ranks(4).run(function, …)`` calls a function on four real ranks."""
    return get_pool
