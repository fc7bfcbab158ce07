"""Random states on disk: one file for all ranks of a run (``docs/format.md``, *Random states*)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.bounds import check_inside, check_regular, read_bounded
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checksums import sum_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, STALE_MANIFEST, Manifest, read_manifest
from ucp_deepspeed.checkpoint.encoding import parse_document
from ucp_deepspeed.checkpoint.random_streams import decoded_state
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, Index, UniversalCheckpoint
from ucp_deepspeed.errors import DamagedCheckpointError

logger = logging.getLogger("ucp_deepspeed")

RANDOM_STATES_NAME = "ucp_random_states.jsonl"

RANDOM_STATE_NAME, FORMER_NAMES = "ucp_random_state_rank_{rank:05d}.json", "ucp_random_state_rank_*.json"
"""File of one rank, and a glob for all of them. Conversions write the first rank's alone, whose seed gives new streams on any
topology. Earlier releases wrote one for each rank when they saved."""

RANDOM_STATE_VERSION = 1


class Place(BaseModel):
    """A rank's role in its run; streams resume only where every rank has its role again."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    world_size: int
    rank: int
    data_parallel_rank: int
    sequence_parallel_rank: int
    stage: int
    tensor_parallel_rank: int
    accelerator: str


class RandomState(BaseModel):
    """The state of one rank, which is a line of the file or a file.

    Attributes:
        format_version: `RANDOM_STATE_VERSION`; a reader refuses a later one.
        place: role of the rank that wrote it.
        global_steps: steps of the run when it saved.
        seed: ``torch.initial_seed()``; new streams are derived from rank 0's.
        streams: by name, encoded (`ucp_deepspeed.checkpoint.encoding`).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = RANDOM_STATE_VERSION
    place: Place
    global_steps: int
    seed: int
    streams: Mapping[str, Any]


class _Header(BaseModel):
    """The first line: bytes of each rank's line, with its end, so that a rank can read its own state alone; the sum of each
    (`sum_of`); and the save that wrote them. Earlier releases wrote neither sums nor save."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = RANDOM_STATE_VERSION
    numbytes: tuple[NonNegativeInt, ...]
    sums: tuple[str, ...] | None = None
    save_id: str | None = None


def joined(states: Sequence[str], save_id: str | None = None) -> str:
    """Return the content of the file, from the states of all ranks as JSON in ASCII, in rank order."""
    header = {
        "format_version": RANDOM_STATE_VERSION,
        "save_id": save_id,
        "numbytes": [len(state) + 1 for state in states],
        "sums": [_sum(f"{state}\n".encode("ascii")) for state in states],
    }
    return "".join(f"{line}\n" for line in (json.dumps(header), *states))


def warn_of_uncommitted(folder: Path, then: str) -> None:
    """Warn of random states that nothing tells to be those of the checkpoint beside them. ``then``: the consequence."""
    if (path := path_of(folder, 0)) is not None:
        logger.warning("%s is left out, since no %s tells that it is of this save: %s", path, MANIFEST_NAME, then)


def path_of(folder: Path, rank: int) -> Path | None:
    """Return the file with a rank's state; None if there is none."""
    paths = (folder / RANDOM_STATES_NAME, folder / RANDOM_STATE_NAME.format(rank=rank))
    return next((path for path in paths if path.is_file()), None)


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Return that a form without a place for states of random numbers leaves them out, in words, if there are any."""
    there = path_of(checkpoint.path, 0) is not None
    return ["left out: states of random numbers, which this form has no place for"] if there else []


def _sum(line: bytes) -> str:
    return f"{sum_of(line):016x}"


def description_of(checkpoint: Checkpoint) -> Manifest | Index | None:
    """Return the document that lists a checkpoint's files: its index, or its manifest if it has one."""
    return checkpoint.index if isinstance(checkpoint, UniversalCheckpoint) else read_manifest(checkpoint.path)


def committed_path(folder: Path, rank: int, listing: Manifest | Index | None) -> Path | None:
    """Return the file with a rank's state that a save or a conversion committed; None if it wrote none.

    Args:
        listing: the result of `description_of`. Without it no file counts.

    Raises:
        DamagedCheckpointError: it lists a file that is missing or of another size, or doesn't list the one here; or the file of a
            universal checkpoint is a link that leads out of it.
    """
    path = path_of(folder, rank)
    if listing is None:
        return None
    by, stale = (INDEX_NAME, "; remove it") if isinstance(listing, Index) else (MANIFEST_NAME, STALE_MANIFEST)
    listed = [name for name in (RANDOM_STATES_NAME, RANDOM_STATE_NAME.format(rank=rank)) if name in listing.files]
    if listed and (path is None or path.name not in listed):
        raise DamagedCheckpointError(f"{folder / listed[0]}, which {by} lists, is missing; restore it from a copy")
    if path is None:
        return None
    if not listed and (path.name == RANDOM_STATES_NAME or isinstance(listing, Index)):
        raise DamagedCheckpointError(f"{path} isn't in {by}{stale}")
    if isinstance(listing, Index):
        check_inside(path)
    else:
        listing.check_file(path)
    return path


def read_state(path: Path, rank: int, save_id: str | None = None) -> bytes | None:
    """Return a rank's state as it is in a file of `path_of`; None if the run had fewer ranks.

    Args:
        save_id: of the manifest or the index beside it.

    Raises:
        DamagedCheckpointError: the file isn't as its first line says, or is of another save.
        FormatError: a later version wrote it.
    """
    check_regular(path)
    if path.name != RANDOM_STATES_NAME:
        return read_bounded(path)
    with path.open("rb") as file:
        first = file.readline(tunables.DOCUMENT_NUMBYTES)
        header = parse_document(first, path, _Header, "a file of random states", RANDOM_STATE_VERSION)
        numbytes = header.numbytes
        if save_id is not None and header.save_id != save_id:
            raise DamagedCheckpointError(f"{path} is of another save than the manifest or the index beside it")
        if save_id is not None and header.sums is None:
            raise DamagedCheckpointError(f"{path} lacks the sums of its lines, which each save with an id has")
        if not numbytes or len(first) + sum(numbytes) != path.stat().st_size:
            raise DamagedCheckpointError(f"{path} hasn't the lines that its first one tells of")
        if rank >= len(numbytes):
            return None
        if numbytes[rank] > tunables.DOCUMENT_NUMBYTES:
            raise DamagedCheckpointError(f"{path} has {numbytes[rank]} bytes of rank {rank}, which no state has")
        file.seek(len(first) + sum(numbytes[:rank]))
        state = file.read(numbytes[rank])
    if header.sums is not None and header.sums[rank : rank + 1] != (_sum(state),):
        raise DamagedCheckpointError(f"{path} is damaged: the state of rank {rank} isn't what was saved")
    return state


def parse_state(content: bytes, path: Path, rank: int) -> RandomState:
    """Return a rank's state; it must be that rank's, and each stream's must be sound. See `parse_document` for other errors."""
    state = parse_document(content, path, RandomState, "a random state", RANDOM_STATE_VERSION)
    if state.place.rank != rank:
        raise DamagedCheckpointError(
            f"{path} holds the state of rank {state.place.rank} where that of rank {rank} belongs"
        )
    try:
        for name, encoded in state.streams.items():
            decoded_state(name, encoded, state.place.accelerator)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{path}, rank {rank}: {error}") from error
    return state
