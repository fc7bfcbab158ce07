"""Readers compare what they read with the checksums of pieces: each flipped byte that is read is told."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME, FileSums, digest_of_sums, joined, sums_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.torch_files.records import records_of
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.plan import StridedView
from ucp_deepspeed.transfer import FileReader, gather
from ucp_deepspeed.transfer.open_files import OpenFile

PIECE = 1 << 10


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunables, "PIECE_NUMBYTES", PIECE)
    monkeypatch.setattr(tunables, "STEP_NUMBYTES", PIECE)


def sum_anew(folder: Path) -> None:
    """Give a tag folder checksums of small pieces."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    content = joined(manifest["save_id"], [sums_of(each).line() for each in sorted(folder.glob("*.pt"))])
    (folder / CHECKSUMS_NAME).write_text(content)
    manifest["checksums"] = digest_of_sums(content.encode())
    manifest.pop("sum", None)
    path.write_text(json.dumps(manifest))


def read_all(folder: Path, verify: bool = True) -> tuple[int, set[str]]:
    """Read all that a load takes. Return the bytes that were checked, and the files that were opened."""
    checkpoint = open_checkpoint(folder, verify=verify)
    view, reader = UniversalView.of(checkpoint), FileReader(checkpoint.versions)
    for name, parameter in view.parameters.items():
        for state, dtype in parameter.states.items():
            gather(view, name, state, 0, torch.empty(prod(view.logical_shape(name)), dtype=NAMED_DTYPES[dtype]), reader)
    reader.finish()
    checkpoint.client_state()
    checkpoint.extra_states()
    checked = reader.bytes_checked
    reader.close()
    return checked, {Path(path).name for path in checkpoint.versions._first}


def classes_of(path: Path) -> Iterator[tuple[str, int]]:
    """Bytes of each class in an archive: in tensors (large and small), the pickle, headers, padding, directory."""
    records, size = records_of(path), path.stat().st_size
    storages = [record for record in records if "/data/" in record.name]
    for kind, record in {
        "tensor": max(storages, key=lambda record: record.numbytes),
        "small tensor": min(storages, key=lambda record: record.numbytes),
        "pickle": next(record for record in records if record.name.endswith("/data.pkl")),
    }.items():
        yield kind, record.start
        yield kind, (record.start + record.stop) // 2
        yield kind, record.stop - 1
    yield "header", storages[0].start - 1  # of the padding in the extra field
    yield "header", records[0].start - 70
    yield "between records", storages[0].stop + 5
    yield "directory", records[-1].stop + 40
    yield "end", size - 10


@pytest.mark.parametrize("run", ["zero0", "zero1", "zero3"])
def test_each_class_of_bytes(run: str, engine_copy: Callable[[str, str], Path]) -> None:
    folder = engine_copy(run, "changed")
    sum_anew(folder)
    checked, opened = read_all(folder)
    assert checked and opened >= {path.name for path in folder.glob("*.pt")}
    for path in folder.glob("*.pt"):
        held = path.read_bytes()
        for kind, at in classes_of(path):
            if kind == "tensor" and run == "zero1" and "model_states" in path.name:
                continue  # weights of which the masters are read
            path.write_bytes(held[:at] + bytes([held[at] ^ 4]) + held[at + 1 :])
            with pytest.raises(DamagedCheckpointError, match=path.name.replace(".", r"\.")):
                read_all(folder)
                pytest.fail(f"{path.name}: {kind} at {at} wasn't told")
        path.write_bytes(held)
    assert read_all(folder)[0] == checked


def test_checks_can_be_switched_off(engine_copy: Callable[[str, str], Path]) -> None:
    folder = engine_copy("zero1", "changed")
    (path,) = folder.glob("*optim_states.pt")
    held = path.read_bytes()
    at = max(records_of(path), key=lambda record: record.numbytes).start
    path.write_bytes(held[:at] + bytes([held[at] ^ 4]) + held[at + 1 :])
    with pytest.raises(
        DamagedCheckpointError, match=r"optim_states\.pt is damaged: bytes \d+ to \d+ differ from what was"
    ):
        read_all(folder)
    assert read_all(folder, verify=False)[0] == 0


def test_promised_sums_must_be_there(engine_copy: Callable[[str, str], Path]) -> None:
    folder = engine_copy("zero1", "changed")
    path = folder / CHECKSUMS_NAME
    held = path.read_bytes()
    path.write_bytes(held.replace(b'"rest"', b'"most"'))
    with pytest.raises(DamagedCheckpointError, match="isn't the file that the manifest tells of"):
        read_all(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing, and the manifest tells of it"):
        read_all(folder)
    read_all(folder, verify=False)


def test_manifests_of_earlier_releases(engine_copy: Callable[[str, str], Path]) -> None:
    """They have neither sums nor an id."""
    folder = engine_copy("zero1", "old")
    (folder / CHECKSUMS_NAME).unlink()
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for key in ("checksums", "save_id", "sum"):
        manifest.pop(key, None)
    path.write_text(json.dumps(manifest))
    assert read_all(folder)[0] == 0


NUMEL = 6000


class Blocks:
    """A file of one storage behind a few bytes, and what was read of it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random, self.path = random.Random(seed), path
        self.content = self.random.randbytes(16 + 4 * NUMEL)
        path.write_bytes(self.content)
        whole = sums_of(path)
        sums = b"".join(
            FileSums.of_line(self._of(self.content[at : min(at + PIECE, len(self.content))])).sums
            for at in range(16, len(self.content), PIECE)
        )
        self.sums = FileSums(path.name, whole.size, PIECE, ((16, 4 * NUMEL),), sums, 0)
        self.seen: set[int] = set()

    def _of(self, piece: bytes) -> str:
        self.path.with_name("piece").write_bytes(piece)
        return sums_of(self.path.with_name("piece")).line()

    def reader(self, mapped: bool) -> FileReader:
        versions = FileVersions()
        versions.sums = lambda path: self.sums
        return FileReader(versions, mapped=mapped)

    def read(self, reader: FileReader) -> None:
        """Read some block: flat, or rows with gaps."""
        rows, columns, stride = self.random.choice(
            [(1, 700, 700), (3, 400, 900), (40, 7, 30), (2, 1100, 2000), (9, 130, 130)]
        )
        span = (rows - 1) * stride + columns
        start = self.random.randrange(NUMEL - span)
        view = StridedView(FileExtent(str(self.path), 16, "F32", NUMEL), start, (stride, 1))
        target, way = torch.empty(rows, columns), self.random.random()
        if way < 0.3 or not reader.copy_in_steps(view, target):
            if way < 0.6:
                target.copy_(reader.block(view, (rows, columns)))
            else:
                reader.block_into(view, target)
        held = torch.frombuffer(bytearray(self.path.read_bytes()), dtype=torch.int32, offset=16)
        assert torch.equal(target.view(torch.int32), held.as_strided((rows, columns), (stride, 1), start))
        for row in range(rows):
            low = 16 + 4 * (start + row * stride)
            self.seen |= set(range(low, low + 4 * columns))

    def pieces(self, whole: bool) -> set[int]:
        """Numbers of the pieces of which all has been read, or something."""
        found = set()
        for number in range(-(-4 * NUMEL // PIECE)):
            held = set(range(16 + number * PIECE, min(16 + (number + 1) * PIECE, len(self.content))))
            if held <= self.seen if whole else held & self.seen:
                found.add(number)
        return found


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "by position"])
@pytest.mark.parametrize("seed", range(12))
def test_all_pieces_that_were_read(mapped: bool, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte that was read is checked if there is room for the rest of its piece; without room those in whole pieces."""
    blocks = Blocks(tmp_path / "f", seed)
    reader = blocks.reader(mapped)
    for _ in range(12):
        blocks.read(reader)
    state = blocks.random.getstate()
    monkeypatch.setattr(tunables, "COMPLETED_NUMBYTES", 0)
    reader.finish()
    least = reader.bytes_checked
    monkeypatch.setattr(tunables, "COMPLETED_NUMBYTES", 1 << 20)
    reader.finish()
    assert PIECE * (len(blocks.pieces(True)) - 2) <= least <= reader.bytes_checked
    assert abs(reader.bytes_checked - len(blocks.seen)) <= 0.35 * len(blocks.seen)  # bytes with gaps are counted evenly
    reader.close()
    for number in range(-(-4 * NUMEL // PIECE)):
        at = 16 + number * PIECE + 5
        blocks.path.write_bytes(
            blocks.content[:at] + b"\xff\x00"[blocks.content[at] == 255 :][:1] + blocks.content[at + 1 :]
        )
        again, told = Blocks.__new__(Blocks), False
        again.__dict__.update(blocks.__dict__, random=random.Random(seed), seen=set())
        again.random.randbytes(16 + 4 * NUMEL)
        reader = again.reader(mapped)
        try:
            for _ in range(12):
                again.read(reader)
            assert again.random.getstate() == state
            reader.finish()
        except DamagedCheckpointError as error:
            told = True
            low = 16 + number * PIECE
            assert f"f is damaged: bytes {low} to {min(low + PIECE, len(blocks.content)) - 1} differ" in str(error)
        assert told == (number in blocks.pieces(False)), number
        reader.close()


def test_places_that_no_storage_has(tmp_path: Path) -> None:
    """A damaged pickle or header may lead elsewhere in the file."""
    blocks = Blocks(tmp_path / "f", 1)
    for offset, numel in ((12, 10), (16 + 4 * NUMEL - 36, 10)):
        view = StridedView(FileExtent(str(tmp_path / "f"), offset, "F32", 1 if offset == 0 else numel), 0, (1,))
        if offset + 4 * numel > len(blocks.content):
            with (tmp_path / "f").open("ab") as file:
                file.write(b"more")
        with pytest.raises(DamagedCheckpointError, match="the places of its tensors"):
            blocks.reader(True).read_into(view, torch.empty(numel))


@pytest.mark.parametrize(
    "parts, rest",
    [
        ([(0, 960)], 64),
        ([(64, 1024)], 64),
        ([(0, 400), (432, 1024)], 32),
        ([(0, 960), (992, 1024)], 64),
        ([(512, 1024)], 1024),
    ],
)
def test_bytes_that_are_read_for_sums_alone(
    parts: list[tuple[int, int]], rest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were summed aren't read a second time, where little or nothing was left out before them."""
    blocks, again, in_range = Blocks(tmp_path / "f", 0), [], OpenFile.range
    monkeypatch.setattr(OpenFile, "range", lambda *place: again.append(place[2] - place[1]) or in_range(*place))
    reader = blocks.reader(mapped=False)
    for low in range(0, 20 * PIECE, PIECE):
        for start, stop in parts:
            view = StridedView(FileExtent(str(blocks.path), 16, "F32", NUMEL), (low + start) // 4, (1,))
            reader.block_into(view, torch.empty((stop - start) // 4))
    reader.finish()
    assert again == [rest] * 20
    assert reader.bytes_checked == 20 * sum(stop - start for start, stop in parts)
    reader.close()
