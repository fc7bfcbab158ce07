"""Number of times that ranks tell one another something before a load reads: each time all wait for the slowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch.distributed import ProcessGroup

from ucp_deepspeed.checkpoint import opening
from ucp_deepspeed.engine.loading.filling import Filling
from ucp_deepspeed.testing.ranks import RankPool, get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train

Ranks = Callable[[int], RankPool]

RUN = Run("mlp", zero={"stage": 1})
UNIVERSAL = replace(RUN, universal={"enabled": True, "load": "always"})

COLLECTIVES = (
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "_allgather_base",
    "gather",
    "alltoall",
    "reduce_scatter",
)


class ReachedError(Exception):
    """The call up to which collectives are counted."""


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count the collectives of groups that are as large as the world, and the gathers of objects among them."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(ProcessGroup, name)

        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            counts[name] += group.size() == dist.get_world_size()
            return real(group, *arguments, **options)

        return call

    def gather_objects(object_list: list[Any], obj: Any, group: Any = None) -> None:
        counts["objects"] += dist.get_world_size(group) == dist.get_world_size()
        real_gather(object_list, obj, group)

    real_gather = dist.all_gather_object
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(ProcessGroup, name, counted(name)))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", gather_objects))
        yield counts


def rounds_of_a_load(run: Run, folder: str, tag: str | None, moves: bool) -> dict[str, int]:
    """On a rank: the collectives before the first tensor is read, by the package or by DeepSpeed.

    Args:
        moves: whether each rank sees another tag in ``latest``.
    """
    engine = build_engine(run)
    latest = f"global_step{dist.get_rank() + 1 if moves else 1}"
    owner, method = (Filling, "run") if run == UNIVERSAL else (DeepSpeedEngine, "_load_checkpoint")
    so_far: list[dict[str, int]] = []

    def reached(*_: Any, **__: Any) -> None:
        so_far.append(dict(counts))
        raise ReachedError

    with (
        mock.patch.object(opening, "read_latest", lambda _: latest),
        mock.patch.object(owner, method, reached),
        collectives() as counts,
        pytest.raises(ReachedError),
    ):
        engine.load_checkpoint(folder, tag=tag)
    return so_far[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tags."""
    saved = tmp_path_factory.mktemp("saved")
    get_pool(2).run(train, RUN, 1, save=str(saved))
    copytree(saved / "global_step1", saved / "global_step2")
    return saved


@pytest.mark.parametrize(
    ("run", "tag", "moves", "rounds"),
    [
        (UNIVERSAL, None, False, 2),
        (UNIVERSAL, "global_step1", False, 2),
        (UNIVERSAL, None, True, 3),
        (RUN, None, False, 1),
    ],
    ids=["universal", "tag", "latest was moved", "DeepSpeed"],
)
def test_a_load_takes_two_rounds(
    run: Run, tag: str | None, moves: bool, rounds: int, ranks: Ranks, folder: Path
) -> None:
    """One to agree on what to load, and for a universal load one to agree that all can. Before DeepSpeed loads, a flag says that
    no rank has found its files altered."""
    flags = {"allreduce": 1} if run == RUN else {}
    for counts in ranks(2).run(rounds_of_a_load, run, str(folder), tag, moves):
        assert counts.pop("objects") == rounds
        assert +Counter(counts) == {"allgather": 2 * rounds, **flags}  # one for sizes, one for the pickled values
