"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from ucp_deepspeed.testing import ranks as ranks_module
from ucp_deepspeed.testing.ranks import RankPool, get_pool

ranks_module.IMPORTED_ONCE += ["transformers.trainer", "accelerate", "peft"]  # they take each rank seconds

DEVICES = ("cpu", "standin")

GPU = "cuda" if torch.cuda.is_available() else "standin"
"""The device of tests with the mark ``gpu``."""

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Set how long the random search is, and where it begins."""
    parser.addoption("--pairs", type=int, default=12, help="pairs that the random search tries")
    parser.addoption("--first-pair", type=int, default=0, help="seed of the first pair; the others follow")
    parser.addoption("--device", choices=(*DEVICES, "cuda"), help="run all tests on ranks of this device alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``device``: the CPU, and for tests with the mark ``nccl_like`` the stand-in device too, or only that; for those with the
    mark ``gpu`` a GPU, or without one the stand-in device. ``pair_seed``: one test for each pair."""
    marked, chosen = metafunc.definition.get_closest_marker("nccl_like"), metafunc.config.getoption("--device")
    if metafunc.definition.get_closest_marker("gpu"):
        chosen = GPU
    if (marked or chosen) and chosen != "cpu":  # on CPUs names stay as they are
        devices = (chosen,) if chosen else DEVICES[-1:] if "only" in marked.args else DEVICES
        # pytest runs those of one device together.
        metafunc.parametrize("device", devices, indirect=True, scope="session")
    if "pair_seed" in metafunc.fixturenames:
        first, count = (metafunc.config.getoption(name) for name in ("--first-pair", "--pairs"))
        metafunc.parametrize("pair_seed", range(first, first + count))


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    """The device of all ranks: ``cpu`` with gloo, or ``standin`` with ``nccl_like``."""
    ranks_module.DEVICE = getattr(request, "param", "cpu")
    return ranks_module.DEVICE


@pytest.fixture
def ranks() -> Callable[[int], RankPool]:
    """``ranks(4).run(function, …)`` calls a function on four real ranks."""
    return get_pool
