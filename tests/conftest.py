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


@pytest.fixture
def ranks() -> Callable[[int], RankPool]:
    """``ranks(4).run(function, …)`` calls a function on four real ranks."""
    return get_pool
