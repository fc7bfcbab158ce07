"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checkpoints import Source, make_source

from ucp_deepspeed.testing.runs import Run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Run, int], Source]:
    """``source(key, run, world_size)`` trains a source once per session and key."""
    made: dict[str, Source] = {}

    def get(key: str, run: Run, world_size: int) -> Source:
        if key not in made:
            made[key] = make_source(run, world_size, tmp_path_factory.mktemp(key))
        return made[key]

    return get
