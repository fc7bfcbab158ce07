"""Loads from a store: the engine as from the same files on a disk, by ranges; and what goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STEP, differences
from stores import Server, upload, use

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import ConfigError, SaveError, UniversalCheckpointError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Outcome, Run, train

Ranks = Callable[[int], RankPool]

SOURCE = Run("mlp", {"hidden": 1024, "ffn": 2048}, zero={"stage": 1}, precision="bf16", groups="decay")
TARGET = replace(SOURCE, zero={"stage": 3})


def train_from(endpoint: str, *arguments: Any, **named: Any) -> Outcome:
    """Do what `train` does, where a store is within reach."""
    use(endpoint)
    return train(*arguments, **named)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def saved(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a run on two ranks saved, which lies in the store too."""
    from ucp_deepspeed.testing.ranks import get_pool

    folder = tmp_path_factory.mktemp("saved")
    get_pool(2).run(train, SOURCE, STEP, save=str(folder), client_state={"epoch": 7})
    upload(folder, "s3://bucket/saved")
    return folder


LITTLE = replace(SOURCE, universal={"enabled": True, "read_memory_bytes": 1 << 20})


@pytest.mark.parametrize("target", [TARGET, SOURCE, LITTLE], ids=["another-stage", "the-same", "little-memory"])
def test_as_from_a_disk(target: Run, saved: Path, server: Server, ranks: Ranks, tmp_path: Path) -> None:
    """Also on the topology that saved, where a load from a disk is left to DeepSpeed."""
    local = ranks(2).run(train, target, STEP + 1, load=str(saved), save=str(tmp_path / "local"), save_at=STEP + 1)
    server.count_anew()
    remote = ranks(2).run(
        train_from,
        *(server.endpoint, target, STEP + 1),
        load="s3://bucket/saved",
        save=str(tmp_path / "remote"),
        save_at=STEP + 1,
    )
    assert differences(tmp_path / "remote", tmp_path / "local") == []
    for one, other in zip(remote, local, strict=True):
        assert (one.losses, one.client_state, one.counters) == (other.losses, other.client_state, other.counters)
        assert one.load_path.startswith(f"s3://bucket/saved/global_step{STEP}/") and one.client_state["epoch"] == 7
        assert one.report is not None
    if target is LITTLE:
        bounds = [list(map(int, asked.removeprefix("bytes=").split("-"))) for _, asked in server.requested]
        assert len(bounds) > 50 and max(last - first for first, last in bounds) < 1 << 19
    needed = sum(each.report.bytes_needed for each in remote)
    whole = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert all(each.report.bytes_needed < 0.6 * whole for each in remote)
    assert needed <= server.sent < needed + 2 * 12 * tunables.BLOCK_REQUEST_NUMBYTES


def test_without_zero(server: Server, ranks: Ranks, tmp_path: Path) -> None:
    """A single file has all, which DeepSpeed would look for on a disk."""
    run = Run("mlp", zero={"stage": 0}, precision="bf16")
    ranks(1).run(train, run, STEP, save=str(tmp_path / "a"))
    url = upload(tmp_path / "a", "s3://bucket/stage0")
    (loaded,) = ranks(1).run(train_from, server.endpoint, run, STEP, load=url, save=str(tmp_path / "b"))
    assert loaded.report is not None and differences(tmp_path / "b", tmp_path / "a") == []


def test_a_disk_by_url(saved: Path, ranks: Ranks) -> None:
    """DeepSpeed itself would look for a folder named ``file:``."""
    for loaded in ranks(2).run(train, SOURCE, STEP, load=f"file://{saved}"):
        assert loaded.load_path.startswith(f"{saved}/global_step{STEP}/")
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, SOURCE, STEP, load=str(saved), save=f"file://{saved}", save_first=True)
    assert isinstance(caught.value.original, SaveError) and "is a URL" in str(caught.value.original)


def refusal(server: Server, ranks: Ranks, run: Run, **named: Any) -> BaseException | None:
    with pytest.raises(RankError) as caught:
        ranks(2).run(train_from, server.endpoint, run, STEP, **named)
    return caught.value.original


def test_an_object_that_goes_wrong_while_it_is_read(saved: Path, server: Server, ranks: Ranks) -> None:
    """The error names the object."""
    with server.failing(403, "GET", "rank_1", "optim"):
        error = refusal(server, ranks, TARGET, load="s3://bucket/saved")
    assert isinstance(error, UniversalCheckpointError)
    assert re.search(r"Forbidden.*s3://bucket/saved/\S*rank_1\S*optim\S*", str(error))


def test_what_is_refused(saved: Path, server: Server, ranks: Ranks) -> None:
    never = replace(TARGET, universal={"enabled": True, "load": "never"})
    error = refusal(server, ranks, never, load="s3://bucket/saved")
    assert isinstance(error, ConfigError) and "is a URL, which DeepSpeed itself can't load" in str(error)
    error = refusal(server, ranks, TARGET, load=str(saved), save="s3://bucket/saved", save_first=True)
    assert isinstance(error, SaveError) and "s3://bucket/saved is a URL" in str(error)
