"""Checksums of pieces, compared with sums over slices that the test finds by the bytes themselves."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import xxhash

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import checksums
from ucp_deepspeed.checkpoint.checksums import (
    CHECKSUMS_NAME,
    FileSums,
    SavedSums,
    digest_of_sums,
    joined,
    sum_of,
    sums_of,
)
from ucp_deepspeed.errors import DamagedCheckpointError

PIECE = 256


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunables, "PIECE_NUMBYTES", PIECE)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {f"t{n}": torch.randint(0, 255, (n,), dtype=torch.uint8, generator=made) for n in (700, 256, 9, 8)}


@pytest.fixture
def saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "x.pt"
    torch.save({**tensors, "empty": torch.empty(0), "number": 3}, path)
    return path


def brute(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[list[tuple[int, int]], list[int], int]:
    """Ranges by looking for the tensors' bytes; sums of slices."""
    held = path.read_bytes()
    starts = [held.index(bytes(tensor.tolist())) for tensor in tensors.values()]
    ranges = [(start, tensor.numel()) for start, tensor in zip(starts, tensors.values(), strict=True)]
    sums = [
        xxhash.xxh3_64(held[at : min(at + PIECE, start + numel)]).intdigest()
        for start, numel in ranges
        for at in range(start, start + numel, PIECE)
    ]
    inside = {byte for start, numel in ranges for byte in range(start, start + numel)}
    rest = bytes(each for at, each in enumerate(held) if at not in inside)
    return ranges, sums, xxhash.xxh3_64(rest).intdigest()


def test_the_hash_is_the_published_one() -> None:
    assert sum_of(b"") == 0x2D06800538D394C2  # XXH3_64bits of nothing, by its specification


def test_sums_of_an_archive(saved: Path, tensors: dict[str, torch.Tensor]) -> None:
    found, (ranges, sums, rest) = sums_of(saved), brute(saved, tensors)
    assert found.ranges == tuple(ranges) and found.of_pieces.tolist() == sums and found.rest == rest
    assert (found.file, found.size, found.piece) == ("x.pt", saved.stat().st_size, PIECE)
    spans = [found.span(number) for number in range(len(sums))]
    assert [high - low for low, high in spans] == [256, 256, 188, 256, 9, 8]
    for number, (low, high) in enumerate(spans):
        assert found.pieces_of(low, high) == found.pieces_of(high - 1, high) == range(number, number + 1)
    first, length = ranges[0]
    assert found.pieces_of(first + 255, first + 257) == range(2)
    assert found.pieces_of(first, first + length) == range(3)
    assert found.pieces_of(first, first + length + 1) is None and found.pieces_of(0, 1) is None


def test_known_sums_are_taken_over(saved: Path) -> None:
    whole = sums_of(saved)
    known = {start: [7] * -(-numbytes // PIECE) for start, numbytes in whole.ranges}
    found = sums_of(saved, known)
    assert set(found.of_pieces.tolist()) == {7} and found.rest == whole.rest


@pytest.mark.parametrize("content", [b"", b"x", b"no archive" * 300])
def test_other_files_are_one_range(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    path.write_bytes(content)
    found = sums_of(path)
    assert found.ranges == (((0, len(content)),) if content else ())
    assert found.of_pieces.tolist() == [
        xxhash.xxh3_64(content[at : at + PIECE]).intdigest() for at in range(0, len(content), PIECE)
    ]
    assert found.differences(path) == []


def test_each_flipped_bit_is_told(saved: Path) -> None:
    found, held = sums_of(saved), saved.read_bytes()
    small = {byte for start, numbytes in found.ranges if numbytes <= 9 for byte in range(start, start + numbytes)}
    for at in range(0, len(held), 7):
        saved.write_bytes(held[:at] + bytes([held[at] ^ 16]) + held[at + 1 :])
        inside = found.pieces_of(at, at + 1)
        told = found.differences(saved)
        if inside is None:
            assert told == ["bytes outside of its tensors"]
        else:
            low, high = found.span(inside[0])
            assert low <= at < high and told == [f"bytes {low} to {high - 1}"]
        assert bool(found.differences(saved, at_most=9)) == (inside is None or at in small)
        with pytest.raises(DamagedCheckpointError, match=r"x\.pt is damaged: bytes"):
            found.check(saved)


def test_another_size_is_told(saved: Path) -> None:
    found, held = sums_of(saved), saved.read_bytes()
    saved.write_bytes(held + b"x")
    assert f"{len(held) + 1} bytes instead of {len(held)}" in found.differences(saved)
    for cut in (1, 1000, len(held)):
        saved.write_bytes(held[:-cut])
        assert any(f"bytes instead of {len(held)}" in told for told in found.differences(saved))
    for size in range(0, len(held), 97):  # ends while it is read: the size was another one
        saved.write_bytes(held[:size])
        with patch("ucp_deepspeed.remote.os.fstat", return_value=SimpleNamespace(st_size=len(held))):
            assert found.differences(saved)
    saved.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"x\.pt can't be read: No such file"):
        found.check(saved)


def test_a_line_there_and_back(saved: Path) -> None:
    found = sums_of(saved)
    assert FileSums.of_line(found.line()) == found


@pytest.mark.parametrize(
    "other",
    [
        {"ranges": ((0, 300), (299, 1))},
        {"ranges": ((0, 1 << 60),)},
        {"ranges": ((0, 0),)},
        {"piece": 0},
        {"piece": 255},
        {"sums": b""},
        {"size": 10},
    ],
)
def test_sums_that_cannot_be(other: dict[str, object], saved: Path) -> None:
    with pytest.raises(ValueError):
        replace(sums_of(saved), **other)  # type: ignore[arg-type]


def written(folder: Path, save_id: str = "00ff00ff00ff00ff") -> str:
    paths = sorted(folder.glob("*.pt"))
    content = joined(save_id, [sums_of(path).line() for path in paths]).encode()
    (folder / CHECKSUMS_NAME).write_bytes(content)
    return digest_of_sums(content)


def test_saved_sums(saved: Path, tmp_path: Path) -> None:
    torch.save([1], tmp_path / 'odd "name\\ü.pt')
    held = SavedSums(tmp_path, written(tmp_path), "00ff00ff00ff00ff")
    assert held.names == sorted(path.name for path in tmp_path.glob("*.pt"))
    assert held.of("x.pt") == sums_of(saved) and held.of("y.pt") is None
    assert all(held.of(name) == sums_of(tmp_path / name) for name in held.names)


def test_a_line_without_an_end_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file took as much memory as it is long."""
    monkeypatch.setattr(checksums, "_LONGEST_LINE", 1 << 20)
    with (tmp_path / CHECKSUMS_NAME).open("wb") as file:
        file.truncate(1 << 32)
    tracemalloc.start()
    with pytest.raises(DamagedCheckpointError, match="is damaged: some bytes"):
        SavedSums(tmp_path, "0" * 16, "id")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_missing_evidence_is_no_evidence(saved: Path, tmp_path: Path) -> None:
    digest, path = written(tmp_path), tmp_path / CHECKSUMS_NAME
    with pytest.raises(DamagedCheckpointError, match="of another save than the manifest"):
        SavedSums(tmp_path, digest, "0" * 16)
    held = path.read_bytes()
    for at in (0, 5, 40, len(held) // 2, len(held) - 1):
        path.write_bytes(held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :])
        with pytest.raises(DamagedCheckpointError):
            SavedSums(tmp_path, digest, "00ff00ff00ff00ff")
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing, and the manifest tells of it"):
        SavedSums(tmp_path, digest, "00ff00ff00ff00ff")
