"""The file of random states: whatever became of it is an error, and none of it is left out in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from native_files import NativeRun, add_manifest, write_native
from native_models import model_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import read_manifest
from ucp_deepspeed.checkpoint.random_files import (
    RANDOM_STATE_NAME,
    RANDOM_STATES_NAME,
    Place,
    RandomState,
    committed_path,
    description_of,
    joined,
    parse_state,
    read_state,
)
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.transfer.conversion import convert

MODEL = model_of({"weight": (3, 2)})
RUN = NativeRun(stage=1, dp=3)
SAVE_ID = "0123456789abcdef"


def state_of(rank: int, seed: int = 7) -> str:
    """A state as one rank tells it; the others' are as long."""
    place = Place(
        world_size=3,
        rank=rank,
        data_parallel_rank=rank,
        sequence_parallel_rank=0,
        stage=0,
        tensor_parallel_rank=0,
        accelerator="cpu",
    )
    streams = {"of a later release": {"$tuple": [3, 4, None]}, "torch": {"$bytes": "AAAA"}}
    return RandomState(place=place, global_steps=5, seed=seed, streams=streams).model_dump_json()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tag that three ranks have saved."""
    folder = write_native(tmp_path, MODEL, RUN)
    write_states(folder, [state_of(rank) for rank in range(3)])
    add_manifest(folder, MODEL, RUN)
    path = folder / "ucp_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"save_id": SAVE_ID}))
    return folder


def write_states(folder: Path, states: list[str]) -> None:
    (folder / RANDOM_STATES_NAME).write_text(joined(states, SAVE_ID), encoding="ascii")


def read(folder: Path, rank: int) -> RandomState | None:
    """As a load and a conversion do."""
    manifest = read_manifest(folder)
    path = committed_path(folder, rank, manifest)
    content = None if path is None else read_state(path, rank, None if manifest is None else manifest.save_id)
    return None if path is None or content is None else parse_state(content, path, rank)


def test_each_rank_reads_its_own(folder: Path) -> None:
    found = [read(folder, rank) for rank in range(4)]
    assert [state and state.place.rank for state in found] == [0, 1, 2, None]


def test_without_a_manifest_none_counts(folder: Path) -> None:
    (folder / "ucp_manifest.json").unlink()
    assert read(folder, 0) is None


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_file_that_is_gone(folder: Path, rank: int) -> None:
    (folder / RANDOM_STATES_NAME).unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{RANDOM_STATES_NAME}, which ucp_manifest\.json lists, is miss"):
        read(folder, rank)


def test_a_file_of_an_earlier_release_in_its_place(folder: Path) -> None:
    (folder / RANDOM_STATES_NAME).rename(folder / RANDOM_STATE_NAME.format(rank=0))
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        read(folder, 0)


def test_files_of_an_earlier_release(folder: Path) -> None:
    """One for each rank, each of which the manifest lists."""
    (folder / RANDOM_STATES_NAME).unlink()
    for rank in range(3):
        (folder / RANDOM_STATE_NAME.format(rank=rank)).write_text(state_of(rank), encoding="ascii")
    add_manifest(folder, MODEL, RUN)
    assert [state and state.place.rank for state in (read(folder, rank) for rank in range(4))] == [0, 1, 2, None]
    (folder / RANDOM_STATE_NAME.format(rank=1)).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"rank_00001\.json, which .* is missing"):
        read(folder, 1)


def test_a_file_that_the_manifest_does_not_list(folder: Path) -> None:
    """As if it were put there later."""
    path = folder / "ucp_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][RANDOM_STATES_NAME]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"isn't in ucp_manifest\.json"):
        read(folder, 0)


def test_states_of_ranks_that_were_swapped(folder: Path) -> None:
    write_states(folder, [state_of(0), state_of(2), state_of(1)])
    assert read(folder, 0) is not None
    for rank in (1, 2):
        with pytest.raises(DamagedCheckpointError, match=f"state of rank {3 - rank} where that of rank {rank} belongs"):
            read(folder, rank)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_file_that_was_cut_or_filled_up(folder: Path, rank: int, kept: float) -> None:
    path = folder / RANDOM_STATES_NAME
    content = path.read_bytes()
    short = content[: int(len(content) * kept)]
    for damaged in (short, short.ljust(len(content), b"\0"), b"\0" * (len(content) - len(short)) + short, content * 2):
        path.write_bytes(damaged)
        found = None
        try:
            found = read(folder, rank)
        except UniversalCheckpointError as error:
            assert RANDOM_STATES_NAME in str(error)
        assert found is None or found == RandomState.model_validate_json(state_of(rank))


def test_every_byte(folder: Path) -> None:
    """No byte that changes leaves a rank without its state, or with another one, in silence; no error is of another kind."""
    path, states = folder / RANDOM_STATES_NAME, [RandomState.model_validate_json(state_of(rank)) for rank in range(3)]
    content = path.read_bytes()
    told = 0
    for offset in range(0, len(content), 2):
        for change in (1 << offset % 8, 0x7F & ~content[offset], content[offset] ^ 0x30):
            damaged = bytearray(content)
            damaged[offset] ^= change or 1
            path.write_bytes(damaged)
            for rank in range(3):
                try:
                    assert read(folder, rank) == states[rank], (offset, change, rank)
                except UniversalCheckpointError as error:
                    assert RANDOM_STATES_NAME in str(error)
                    told += 1
    assert told > len(content)


@pytest.mark.parametrize("change", ["other save", "no sums", "no id"])
def test_evidence_that_is_missing_or_of_another_save(folder: Path, change: str) -> None:
    path = folder / RANDOM_STATES_NAME
    header, rest = path.read_text().split("\n", 1)
    key, other = {"other save": (SAVE_ID, SAVE_ID[::-1]), "no sums": ("sums", "smus"), "no id": ("save_id", "save_di")}[
        change
    ]
    path.write_text(f"{header.replace(key, other)}\n{rest}")
    with pytest.raises(DamagedCheckpointError, match=r"of another save|lacks the sums"):
        read(folder, 1)


@pytest.mark.parametrize("stream", ["python", "numpy", "torch"])
def test_a_stream_that_its_library_would_take_over_wrongly(stream: str, folder: Path) -> None:
    """Whoever writes the file can write its sums."""
    states = [state_of(rank) for rank in range(3)]
    changed = json.loads(states[1])
    changed["streams"] = {stream: 5}
    write_states(folder, [states[0], json.dumps(changed), states[2]])
    add_manifest(folder, MODEL, RUN)
    assert read(folder, 0) is not None
    with pytest.raises(DamagedCheckpointError, match=rf"{RANDOM_STATES_NAME}, rank 1: .* '{stream}' is damaged"):
        read(folder, 1)


def test_links_lead_anywhere_beside_deepspeeds_files(folder: Path, tmp_path: Path) -> None:
    """As DeepSpeed's own files may; a conversion, which copies the state, doesn't follow one."""
    aside = tmp_path / "store" / "5f"
    aside.parent.mkdir()
    (folder / RANDOM_STATES_NAME).rename(aside)
    (folder / RANDOM_STATES_NAME).symlink_to(aside)
    found = read(folder, 1)
    assert found is not None and found.place.rank == 1
    with pytest.raises(DamagedCheckpointError, match="outside the checkpoint"):
        convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")


@pytest.fixture
def universal(folder: Path, tmp_path: Path) -> Path:
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    return tmp_path / "u"


def read_first(folder: Path) -> RandomState | None:
    """As a load of a universal checkpoint without checksums does."""
    listing = description_of(open_checkpoint(folder, verify=False))
    path = committed_path(folder, 0, listing)
    assert path is not None and listing is not None
    content = read_state(path, 0, listing.save_id)
    return None if content is None else parse_state(content, path, 0)


def test_a_universal_checkpoints_state_is_of_its_conversion(folder: Path, universal: Path, tmp_path: Path) -> None:
    """The id tells, also where no checksums are compared."""
    found = read_first(universal)
    assert found is not None and found.seed == 7
    write_states(folder, [state_of(rank, seed=8) for rank in range(3)])
    add_manifest(folder, MODEL, RUN)
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "v")
    (tmp_path / "v" / RANDOM_STATES_NAME).replace(universal / RANDOM_STATES_NAME)
    with pytest.raises(DamagedCheckpointError, match="is of another save than the manifest or the index"):
        read_first(universal)


def test_a_state_that_the_index_does_not_list(folder: Path, tmp_path: Path) -> None:
    """As if it were put there later, whichever release's name it has."""
    content = (folder / RANDOM_STATES_NAME).read_bytes()
    (folder / RANDOM_STATES_NAME).unlink()
    add_manifest(folder, MODEL, RUN)
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    for name, text in ((RANDOM_STATE_NAME.format(rank=0), state_of(0).encode()), (RANDOM_STATES_NAME, content)):
        (tmp_path / "u" / name).write_bytes(text)
        with pytest.raises(DamagedCheckpointError, match=rf"{name} isn't in ucp_index\.json"):
            read_first(tmp_path / "u")


def test_a_rank_with_a_line_without_end(folder: Path) -> None:
    """It isn't read: it would fill the memory."""
    path = folder / RANDOM_STATES_NAME
    header = json.dumps({"format_version": 1, "numbytes": [1 << 40], "sums": ["0" * 16], "save_id": SAVE_ID}) + "\n"
    path.write_text(header)
    os.truncate(path, len(header) + (1 << 40))
    with pytest.raises(DamagedCheckpointError, match="bytes of rank 0, which no state has"):
        read_state(path, 0, SAVE_ID)
