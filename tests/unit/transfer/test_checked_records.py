"""A conversion, a comparison, and reads of whole tensors compare the CRC-32 of the archives' records that they read whole."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.torch_files.records import records_of
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, OtherRankError
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.processes import taking_part

RUNS = [
    {"tp": 1, "dp": 2, "stage": 1},
    {"tp": 2, "dp": 2, "stage": 3},
    {"tp": 1, "dp": 1, "stage": 0},
    {"tp": 1, "dp": 2, "stage": 1, "precision": "bf16"},
]


@pytest.fixture(autouse=True)
def all_records_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file compares its small records."""
    monkeypatch.setattr(tunables, "SMALL_NUMBYTES", 8)


def flip(path: Path, pick: random.Random) -> str:
    """Flip a random bit of one of the largest records; return the record's name."""
    records = [record for record in records_of(path) if "/data/" in record.name]
    record = pick.choice([each for each in records if each.numbytes == max(other.numbytes for other in records)])
    data = bytearray(path.read_bytes())
    data[pick.randrange(record.start, record.stop)] ^= 1 << pick.randrange(8)
    path.write_bytes(data)
    return record.name


def damaged(folder: Path, stage: int) -> tuple[Path, str]:
    """Flip a bit of a tensor that a conversion reads; return the file and the name of the record."""
    pick = random.Random(stage)
    files = sorted(folder.glob("*_optim_states.pt" if stage else "*_model_states.pt"))
    path = files[0]  # of a replicated parameter the first rank's copy is read
    return path, flip(path, pick)


def in_ranks(count: int, work: Callable[[Any], Any]) -> list[Any]:
    """Call a function on several ranks, as threads; return the results, or errors."""
    store, results = dist.HashStore(), [None] * count

    def run(rank: int) -> None:
        try:
            with taking_part(store, rank, count) as ranks:
                results[rank] = work(ranks)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_conversion_checks(
    run: dict[str, Any], native: Callable[..., Path], view_of: Callable[..., UniversalView], tmp_path: Path
) -> None:
    folder = native("a", **run)
    count = convert(view_of(folder), tmp_path / "whole", chunk_numbytes=64)
    # Of a replicated parameter one copy is read: the second tensor-parallel rank's records are read in part.
    assert count.bytes_checked > (0.9 if run["tp"] == 1 else 0.5) * count.bytes_read
    path, record = damaged(folder, run["stage"])
    with pytest.raises(DamagedCheckpointError, match=record) as caught:
        convert(view_of(folder), tmp_path / "not", chunk_numbytes=64)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "not").exists()


def test_several_ranks_check_together(
    native: Callable[..., Path], view_of: Callable[..., UniversalView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank reads all of a record: each writes a share of each file, which pages of 64 bytes make possible here."""
    monkeypatch.setattr("ucp_deepspeed.tunables.PAGE_NUMBYTES", 64)
    monkeypatch.setattr("ucp_deepspeed.tunables.BLOCK_NUMBYTES", 64)  # else headers are most of what they write
    folder = native("a", tp=1, dp=1, stage=1)
    alone = convert(view_of(folder), tmp_path / "alone").bytes_checked
    found = in_ranks(6, lambda ranks: convert(view_of(folder), tmp_path / "six", chunk_numbytes=64, ranks=ranks))
    assert [count.bytes_checked for count in found] == [alone] * 6
    _, record = damaged(folder, 1)
    found = in_ranks(6, lambda ranks: convert(view_of(folder), tmp_path / "not", chunk_numbytes=64, ranks=ranks))
    assert all(isinstance(error, DamagedCheckpointError | OtherRankError) and record in str(error) for error in found)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_comparison_checks(
    run: dict[str, Any], native: Callable[..., Path], view_of: Callable[..., UniversalView]
) -> None:
    """Damage isn't called a difference."""
    one, other = native("a", **run), native("b", **run)
    assert compare(view_of(one), view_of(other), chunk_numbytes=64) == []
    _, record = damaged(other, run["stage"])
    for sides in ((one, other), (other, one), (other, other)):
        with pytest.raises(DamagedCheckpointError, match=record):
            compare(*map(view_of, sides), chunk_numbytes=64)


@pytest.mark.parametrize("stage", [0, 1])
def test_reads_of_whole_tensors_check(stage: int, native: Callable[..., Path]) -> None:
    """Without ZeRO a tensor is a record. With ZeRO several are, and the last one that is read completes it."""
    folder = native("a", tp=1, dp=1, stage=stage)
    _, record = damaged(folder, stage)

    def read_all(index: Any = ()) -> None:
        with ucp_deepspeed.open_checkpoint(folder) as checkpoint:
            for name, parameter in checkpoint.parameters.items():
                for state in parameter.states:
                    checkpoint.read(name, state, index)

    with pytest.raises(DamagedCheckpointError, match=record):
        read_all()
    read_all(slice(0, 3))  # a part of a record can't be checked


def test_a_file_that_was_saved_again_is_not_called_damaged(
    native: Callable[..., Path], view_of: Callable[..., UniversalView], tmp_path: Path
) -> None:
    folder = native("a", tp=1, dp=1, stage=1)
    view = view_of(folder)
    assert view.parameters["rows"].states  # the files are open
    path, _ = damaged(folder, 1)
    with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
        convert(view, tmp_path / "not")
    assert path.exists()
