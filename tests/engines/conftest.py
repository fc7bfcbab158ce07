"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checkpoints import Source, make_source

from ucp_deepspeed.testing import ranks
from ucp_deepspeed.testing.runs import Run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Run, int], Source]:
    """``source(key, run, world_size)`` trains a source once per session, key and device."""
    made: dict[str, Source] = {}

    def get(key: str, run: Run, world_size: int) -> Source:
        place = f"{key}-{ranks.DEVICE}"
        if place not in made:
            made[place] = make_source(run, world_size, tmp_path_factory.mktemp(place))
        return made[place]

    return get
