"""CRC-32 of records: joined from parts in any order, compared when all of a record was read."""

from __future__ import annotations

import random
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums, Run, combined, crc_of, joined, records_of
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.errors import DamagedCheckpointError

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (1, 1), (7, 1), (1000, 3), (3, 70_000), (65_536, 65_537)])
def test_sums_of_two_runs(lengths: tuple[int, int]) -> None:
    first, second = (random.Random(length).randbytes(length) for length in lengths)
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_a_run_of_many_gigabytes() -> None:
    """Lengths that no test holds in memory: zeros, joined from themselves again and again."""
    crc, numbytes = zlib.crc32(bytes(1 << 10)), 1 << 10
    other = crc
    while numbytes < 1 << 40:
        crc, numbytes = combined(crc, crc, numbytes), 2 * numbytes
    for _ in range(5):  # 2**15 by another way than from 2**14 twice
        other = combined(other, zlib.crc32(bytes(1 << 10)), 1 << 10)
    assert other == zlib.crc32(bytes(6 << 10))
    assert combined(0, crc, numbytes) == crc


def test_runs_in_any_order_and_overlapping() -> None:
    draw = random.Random(3)
    data = draw.randbytes(5000)
    for _ in range(50):
        cuts = sorted({0, 5000, *(draw.randrange(5000) for _ in range(12))})
        runs = [Run(a, b, zlib.crc32(data[a:b])) for a, b in pairwise(cuts)]
        draw.shuffle(runs)
        assert joined(runs) == [(0, 5000, zlib.crc32(data))]
        missing, *kept = runs
        found = joined([*kept, Run(1, 2, 0)] if missing.start else kept)
        assert all(run.crc == zlib.crc32(data[run.start : run.stop]) for run in found if run.stop - run.start > 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive with two tensors and an empty one."""
    torch.save({"a": torch.arange(1000.0), "b": torch.ones(40), "c": torch.zeros(0)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def read(sums: RecordSums, path: Path, *bounds: tuple[int, int]) -> None:
    """Sum parts of the record of tensor ``a``, as fractions of 4000 bytes."""
    data, record = path.read_bytes(), next(each for each in records_of(path) if each.numbytes == 4000)
    for low, high in bounds:
        start, stop = record.start + low, record.start + high
        number = sums.place(str(path), start, stop)
        if number is not None:
            sums.add(str(path), number, Run(start, stop, zlib.crc32(data[start:stop])))


def flip(path: Path, place: int) -> None:
    """Flip a bit of tensor ``a``."""
    data, record = bytearray(path.read_bytes()), next(each for each in records_of(path) if each.numbytes == 4000)
    data[record.start + place] ^= 4
    path.write_bytes(data)


def test_records_are_where_the_archive_has_them(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        expected = {entry.filename: archive.read(entry) for entry in archive.infolist() if entry.file_size}
    data = path.read_bytes()
    assert {record.name: data[record.start : record.stop] for record in records_of(path)} == expected
    with path.open("rb") as file:
        assert all(crc_of(file, record.start, record.stop) == record.crc for record in records_of(path))


def test_records_of_older_releases() -> None:
    for file in GOLDEN.rglob("*.pt"):
        with file.open("rb") as opened:
            assert all(crc_of(opened, each.start, each.stop) == each.crc for each in records_of(file))


@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 4000)],
        [(2000, 4000), (0, 1000), (1000, 2000)],
        [(0, 2000), (0, 2000), (2000, 4000)],
        [(0, 3600), (3000, 4000)],
    ],
    ids=str,
)
def test_a_whole_record_is_checked(bounds: Sequence[tuple[int, int]], path: Path) -> None:
    sums = RecordSums()
    read(sums, path, *bounds)
    sums.finish()
    assert sums.bytes_checked == 4000
    flip(path, 1500)
    sums = RecordSums()
    with pytest.raises(
        DamagedCheckpointError, match=r"a\.pt is damaged: bytes \d+ to \d+, record a/data/0, .*ucp verify"
    ):
        read(sums, path, *bounds)
        sums.finish()


def test_what_is_missing_of_a_record_is_read_if_it_is_little(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(path, 1500)
    nearly, half = [(0, 1400), (1600, 4000)], [(0, 2000)]
    for bounds, most, told in ((nearly, 1 / 8, True), (nearly, 1 / 100, False), (half, 1 / 8, False), (half, 1, True)):
        monkeypatch.setattr(tunables, "MOST_UNREAD", most)
        sums = RecordSums()
        read(sums, path, *bounds)
        if told:
            with pytest.raises(DamagedCheckpointError):
                sums.finish()
        else:
            sums.finish()
        assert sums.bytes_checked == 0


def test_processes_join_what_each_has_read(path: Path) -> None:
    for flipped in (False, True):
        sums = [RecordSums(), RecordSums()]
        read(sums[0], path, (0, 1000), (2000, 3000))
        read(sums[1], path, (1000, 2000), (3000, 4000))
        found = [run for each in sums for run in each.partial()]
        sums[1].finish(found, (1, 2))
        if flipped:
            with pytest.raises(DamagedCheckpointError):
                sums[0].finish(found, (0, 2))
        else:
            sums[0].finish(found, (0, 2))
        assert [each.bytes_checked for each in sums] == [0 if flipped else 4000, 0]
        flip(path, 1500)


def test_a_damaged_pickle(path: Path) -> None:
    """The values in it, such as a learning rate, have no other checksum."""
    data = path.read_bytes()
    torch.save({"lr": 0.125}, path)
    whole = path.read_bytes()
    place = whole.index(b"G\x3f\xc0")  # a float of 64 bits
    path.write_bytes(whole[: place + 3] + b"\x01" + whole[place + 4 :])
    assert torch.load(path)["lr"] != 0.125
    with pytest.raises(DamagedCheckpointError, match=r"a\.pt .*Bad CRC-32 .*data\.pkl"):
        open_torch_file(path)
    path.write_bytes(data)
    assert open_torch_file(path)["a"].numel() == 1000


def test_a_damaged_number(path: Path) -> None:
    """A step count is a record of its own, and decides about all values."""
    data = path.read_bytes()
    torch.save({"step": torch.tensor(12345.0)}, path)
    whole = path.read_bytes()
    place = whole.index(torch.tensor(12345.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(DamagedCheckpointError, match=r"a\.pt .*Bad CRC-32 .*data/0"):
        open_torch_file(path)
    assert "step" in open_torch_file(path, summed=True)
    path.write_bytes(data)


def test_archives_without_sums(tmp_path: Path) -> None:
    """torch can be told to compute none: all are zero then."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(record.crc is None for record in records_of(tmp_path / "a.pt"))
    assert open_torch_file(tmp_path / "a.pt")["a"].numel() == 1000
    sums = RecordSums()
    read(sums, tmp_path / "a.pt", (0, 4000))
    sums.finish()
    assert sums.bytes_checked == 0


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    assert records_of(tmp_path / "a") == ()
    assert RecordSums().place(str(tmp_path / "a"), 0, 10) is None
