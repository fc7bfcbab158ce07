"""Ranks that convert together: the bytes are those of one process, shares are equal, and all fail with one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.output import OutputFile, Region, StoredTensor
from ucp_deepspeed.checkpoint.safetensors_files import safetensors_file
from ucp_deepspeed.checkpoint.universal import atoms_output
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, DamagedCheckpointError, OtherRankError
from ucp_deepspeed.layout import Layout
from ucp_deepspeed.transfer import copying, processes
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.processes import Ranks, joined, taking_part
from ucp_deepspeed.transfer.writing import chunks_of, share_of

FILE_NUMBYTES = 700_000
"""Small, so that the small checkpoint has several files."""


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _one_opens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads share torch's list of allowed classes."""
    describe = atoms_output.describe

    def locked(*args: Any) -> Any:
        with copying._PLANNING:
            return describe(*args)

    monkeypatch.setattr(atoms_output, "describe", locked)


def _together(count: int, work: Callable[..., Any]) -> list[Any]:
    """Run ``work(ranks)`` on ranks that are threads; what each returned or raised."""
    store = dist.HashStore()

    def one(rank: int) -> Any:
        try:
            with taking_part(store, rank, count) as ranks:
                return work(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A checkpoint of two data-parallel ranks: one parameter of 2 MiB, and many small ones; ranks read other files."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(512, 1024), *[(31, 7)] * 40, (300, 900), (300, 900)]
    parameters = tuple(
        NativeParameter(
            f"p{number}", torch.randn(shape, generator=generator), {"exp_avg": torch.randn(shape, generator=generator)}
        )
        for number, shape in enumerate(shapes)
    )
    model, run = NativeModel(parameters), NativeRun(stage=1, dp=2)
    folder = write_native(tmp_path / "uneven", model, run)
    add_manifest(folder, model, run, layouts=True)
    return folder


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("file_numbytes", [FILE_NUMBYTES, 1 << 30])
def test_ranks_change_no_byte(count: int, file_numbytes: int, uneven: Path, tmp_path: Path) -> None:
    view = UniversalView.of(open_checkpoint(uneven))

    def run(to: str, **options: Any) -> Any:
        return convert(
            view, tmp_path / to, UniversalOutput(file_numbytes=file_numbytes), chunk_numbytes=50_000, **options
        )

    alone = run("one", workers=1)
    counts = _together(count, lambda ranks: run("many", workers=1 + ranks.rank % 2, ranks=ranks))
    assert _contents(tmp_path / "one") == _contents(tmp_path / "many")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one", "uneven"]
    # No byte is read twice by two ranks, and every rank knows what all have read.
    assert [(found.bytes_read, found.files) for found in counts] == [(alone.bytes_read, alone.files)] * count
    assert alone.bytes_read == sum(
        tensor.numel() * 4 * 2
        for tensor in (torch.empty(512, 1024), *[torch.empty(31, 7)] * 40, torch.empty(2, 300, 900))
    )


def _file(number: int, numels: list[int]) -> OutputFile:
    names = [f"{number}.p{position}" for position in range(len(numels))]
    regions = [Region(name, "fp32", "F32", Layout.whole((n,)), 0, 0, n) for name, n in zip(names, numels, strict=True)]
    return safetensors_file(f"{number}.safetensors", dict(zip(names, map(StoredTensor.of, regions), strict=True)))


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_shares_are_equal_and_cover_each_byte_once(count: int) -> None:
    """One tensor of 4 GiB beside three thousand small ones: by items, one rank would have nearly all."""
    files = (_file(0, [1000] * 2000), _file(1, [1 << 30]), _file(2, [0, *range(1, 1000)]), _file(3, []), _file(4, [1]))
    shares = [share_of(files, rank, count) for rank in range(count)]
    sizes = [sum(held.numbytes for held in share) for share in shares]
    total = sum(file.numbytes for file in files)
    assert sum(sizes) == total and max(sizes) <= 1.05 * total / count
    for file in files:
        held = [held for share in shares for held in share if held.file is file]
        assert sum(each.numbytes for each in held) == file.numbytes
        assert all(before.stop == after.start for before, after in pairwise(held))
        # Inside a file ranks meet between pages, so that no machine writes back what another has written.
        assert all(each.start % tunables.PAGE_NUMBYTES == 0 for each in held[1:])
        chunks = [chunk for each in held for chunk in chunks_of(each, 1 << 24)]
        assert sum(chunk.numbytes for chunk in chunks) == file.numbytes
        assert max((chunk.numbytes for chunk in chunks), default=0) <= 1 << 24


def test_a_damaged_file_that_one_rank_reads_fails_all(uneven: Path, tmp_path: Path) -> None:
    view = UniversalView.of(open_checkpoint(uneven))
    os.truncate(uneven / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 5000)
    # The first rank's share is of the first file alone.
    errors = _together(4, lambda ranks: convert(view, tmp_path / "u", chunk_numbytes=50_000, ranks=ranks))
    own = [rank for rank, error in enumerate(errors) if isinstance(error, DamagedCheckpointError)]
    assert own and 0 not in own
    told = [error for error in errors if isinstance(error, OtherRankError)]
    assert len(told) + len(own) == 4 and all("rank_1_mp_rank_00_optim_states.pt" in str(error) for error in errors)
    assert all(str(error).startswith(tuple(f"rank {rank} on " for rank in own)) for error in told)
    assert [path.name for path in tmp_path.iterdir()] == ["uneven"]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", ["before", "while writing"])
def test_any_error_of_any_rank_fails_all(
    failing: int, step: str, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = UniversalView.of(open_checkpoint(uneven))

    def work(ranks: processes.Ranks) -> None:
        def fail(*_: int) -> None:
            if ranks.rank == failing:
                raise RuntimeError("a bug")

        if step == "before":
            fail()
        convert(view, tmp_path / "u", chunk_numbytes=50_000, progress=fail, ranks=ranks)

    errors = _together(2, work)
    assert type(errors[failing]) is RuntimeError
    assert isinstance(errors[1 - failing], OtherRankError) and f"rank {failing} on " in str(errors[1 - failing])
    assert "RuntimeError: a bug" in str(errors[1 - failing])
    assert [path.name for path in tmp_path.iterdir()] == ["uneven"]


def test_a_destination_that_isnt_shared(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunables, "VISIBLE_SECONDS", 0.2)
    view = UniversalView.of(open_checkpoint(uneven))
    errors = _together(2, lambda ranks: convert(view, tmp_path / f"disk{ranks.rank}" / "u", ranks=ranks))
    assert isinstance(errors[1], ConfigError) and "isn't seen here; it must lie on a file system" in str(errors[1])
    assert isinstance(errors[0], OtherRankError)
    assert list(tmp_path.glob("disk*/*")) == []


def test_a_checkpoint_that_isnt_shared(uneven: Path, native: Callable[..., Path], tmp_path: Path) -> None:
    folders = [uneven, native("other", stage=1)]
    views = [UniversalView.of(open_checkpoint(folder)) for folder in folders]
    errors = _together(2, lambda ranks: convert(views[ranks.rank], tmp_path / "u", ranks=ranks))
    assert {type(error) for error in errors} <= {ConfigError, OtherRankError}
    assert any("isn't what rank" in str(error) for error in errors) and not (tmp_path / "u").exists()


def test_a_rank_that_is_heard_of_no_more_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is lost. One that takes its time is not."""
    monkeypatch.setattr(tunables, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(tunables, "LOST_SECONDS", 0.2)
    store = dist.HashStore()
    with taking_part(store, 0, 2) as first, taking_part(store, 1, 2):
        timer = threading.Timer(0.5, lambda: store.set("seen/1", '"late"'))
        timer.start()
        assert first.gather("seen", "early") == ["early", "late"]
    for rank in range(2):
        with pytest.raises(OtherRankError, match=r"rank 1 hasn't been heard of for 0.2 s"):
            Ranks(store, rank, 2).gather("written", rank)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT isn't; start the ranks with torchrun"), joined():
        pass
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="MASTER_PORT=x"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert (ranks.rank, ranks.count) == (0, 1)


def test_each_file_is_on_disk_before_the_folder_appears(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank flushes what it has written, since rank 0's machine can't."""
    calls: list[tuple[str, str]] = []
    fsync, pwrite, rename = os.fsync, os.pwrite, Path.rename

    def spy(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            calls.append((what, Path(f"/proc/self/fd/{descriptor}").readlink().name))
            return real(descriptor, *rest)

        return call

    def renamed(path: Path, to: Path) -> Any:
        calls.append(("rename", path.name))
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", spy("fsync", fsync))
    monkeypatch.setattr(os, "pwrite", spy("pwrite", pwrite))
    monkeypatch.setattr(Path, "rename", renamed)
    view = UniversalView.of(open_checkpoint(uneven))
    options: dict[str, Any] = {"output": UniversalOutput(file_numbytes=FILE_NUMBYTES), "chunk_numbytes": 50_000}
    _together(2, lambda ranks: convert(view, tmp_path / "u", ranks=ranks, **options))
    files = {path.name for path in (tmp_path / "u").glob("atoms-*")}
    [end] = [number for number, (what, _) in enumerate(calls) if what == "rename"]
    for name in files:
        last = max(number for number, call in enumerate(calls) if call == ("pwrite", name))
        assert ("fsync", name) in calls[last:end]
    shared = [{name for name in files if any(held.file.file_name == name for held in share)} for share in _shares(view)]
    flushes = [name for what, name in calls if what == "fsync" and name in files]
    assert len(flushes) == sum(map(len, shared)) + len(files)  # by those that wrote, and again before the rename


def _shares(view: UniversalView) -> list[Any]:
    files = UniversalOutput(file_numbytes=FILE_NUMBYTES).plan(view).files
    return [share_of(files, rank, 2) for rank in range(2)]
