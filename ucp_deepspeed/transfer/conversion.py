"""Convert any checkpoint to the universal format, in one pass, by one process or by several.

The layout of the output is known before data moves. So each byte is written once, at its final place, by the rank and worker
that have this place in their share.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.universal.catalog import CLIENT_TENSORS_NAME, INDEX_NAME, Index, UniversalCheckpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.transfer.atom_files import AtomFile, lay_out, share_of
from ucp_deepspeed.transfer.commit import committed_folder
from ucp_deepspeed.transfer.copying import TransferCount
from ucp_deepspeed.transfer.describing import describe
from ucp_deepspeed.transfer.ranks import Ranks
from ucp_deepspeed.transfer.stage_copies import Seen, look, may_differ, merge, settle, with_copies_of
from ucp_deepspeed.transfer.writing import create_files, write_share

logger = logging.getLogger("ucp_deepspeed")

FIRST_RANDOM_STATE_NAME = "ucp_random_state_rank_00000.json"
"""Random state whose seed gives new streams of random numbers on any topology (``docs/format.md``, *Random state*)."""


def convert(
    view: UniversalView,
    destination: Path,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    chunk_numbytes: int = tunables.WRITTEN_NUMBYTES,
    file_numbytes: int = tunables.FILE_NUMBYTES,
    drop_client_state: Collection[str] = (),
    on_unreadable: OnUnreadable = "error",
    on_differing: OnDiffering = "error",
    ranks: Ranks | None = None,
    then: Callable[[], None] = lambda: None,
) -> TransferCount:
    """Write the universal form of a checkpoint to a new folder, and return what all ranks have read. Collective over the ranks.

    Args:
        destination: the folder to make; it appears when everything is in it.
        workers: threads of each rank; each needs one buffer of ``chunk_numbytes``.
        progress: called with (bytes written, bytes to write) of this rank's share after each chunk, from one thread at a time.
        drop_client_state: top-level keys of the client state to leave out.
        on_unreadable: see `OnUnreadable`.
        on_differing: which number to write where partitions have different ones, and which copy of a parameter where pipeline
            stages have different ones and nothing tells which was trained.
        ranks: the ranks that share the work; by default this process alone.
        then: called on rank 0 when the folder has appeared, and not disturbed by signals.

    Raises:
        ConfigError: the folder exists already, or would lie in a file, or another process is writing it, or there is too little
            space for it, or the client state has no such key; nothing is written. Or the ranks don't see the same checkpoint and
            destination; nothing is left behind.
        UnsupportedError: the client state, a scheduler or a hyper-parameter holds a value that has no universal form; nothing is
            written.
        DamagedCheckpointError: a source file is missing or truncated, or was changed meanwhile; nothing is left behind.
        MismatchError: numbers differ over the partitions, or copies over pipeline stages, and nothing is written; or the files
            don't hold each element of each parameter exactly once, or no optimizer state, and nothing is left behind.
        OSError: the disk is full, or can't be written; nothing is left behind.
        OtherRankError: another rank has failed; nothing is left behind.
    """
    ranks = ranks or Ranks()
    _check_free(destination)
    view = _with_copies(view, on_differing, ranks)
    files = lay_out(view, file_numbytes)
    homes = {(atom.name, atom.state): file.file_name for file in files for atom in file.atoms}
    index, tensors = describe(view, homes, drop_client_state, on_unreadable, on_differing)
    _check_same_view(view, files, ranks)
    numbytes = sum(len(file.header) + file.data_numbytes for file in files)
    numbytes += sum(tensor.nbytes for tensor in tensors.values())

    def write(folder: Path) -> TransferCount:
        share = share_of(files, ranks.rank, ranks.count)
        count = write_share(
            view,
            folder,
            share,
            workers=workers,
            chunk_numbytes=chunk_numbytes,
            progress=progress,
            check=ranks.check,
        )
        return _sum_of(ranks.gather("written", asdict(count) | {"files": sorted(count.files)}))

    if ranks.rank != 0:
        count = write(_seen(destination.parent / ranks.broadcast("folder")))
        ranks.broadcast("committed")
        return count
    _check_space(destination, numbytes)
    with committed_folder(destination, then) as folder, ranks.failing_together():
        create_files(folder, files)
        ranks.broadcast("folder", folder.name)
        count = write(folder)
        _write_rest(view, folder, index, tensors)
    ranks.broadcast("committed")
    return count


def _with_copies(view: UniversalView, on_differing: OnDiffering, ranks: Ranks) -> UniversalView:
    """Return the view with the copies to write of parameters that several pipeline stages hold. Collective over the ranks."""
    copies = may_differ(view.checkpoint)
    if not copies:
        return view
    seen = look(view.checkpoint, copies, (ranks.rank, ranks.count))
    parts = ranks.gather(
        "copies", {name: [sorted(each.differing), sorted(each.trained)] for name, each in seen.items()}
    )
    found = merge([{name: Seen(frozenset(d), frozenset(t)) for name, (d, t) in part.items()} for part in parts])
    settled = settle(view.checkpoint, copies, found, on_differing)
    settled.check(view.checkpoint)
    if settled.told and ranks.rank == 0:
        logger.warning("of different values one is written: %s", "; ".join(settled.told))
    return view.over(with_copies_of(view.checkpoint, settled.stages))


def _check_free(destination: Path) -> None:
    """Check early, before anything is read; `committed_folder` makes sure later."""
    if os.path.lexists(destination):  # a link that leads nowhere, too
        raise ConfigError(f"{destination} exists already; nothing was written")
    if blocking := next((parent for parent in destination.parents if parent.exists() and not parent.is_dir()), None):
        raise ConfigError(f"{blocking} is a file; nothing was written")


def _check_space(destination: Path, numbytes: int) -> None:
    """Check the free space, which is better than an error after an hour; others' writes can still fill the disk meanwhile."""
    place = next(parent for parent in destination.absolute().parents if parent.exists())
    disk = shutil.disk_usage(place)
    if disk.total and numbytes > disk.free:  # some file systems in memory know of no size
        raise ConfigError(
            f"{destination} needs {numbytes / 1e9:.2f} GB, and {disk.free / 1e9:.2f} GB are free there; nothing was written"
        )


def _check_same_view(view: UniversalView, files: Sequence[AtomFile], ranks: Ranks) -> None:
    """Check that all ranks see the same step and layout: they write into one layout."""
    digest = hashlib.sha256(b"".join(file.header for file in files)).hexdigest()
    seen = [view.checkpoint.run.global_steps, digest]
    for rank, other in enumerate(ranks.gather("view", seen)):
        if other != seen:
            raise ConfigError(
                f"{view.checkpoint.path} on rank {ranks.rank} isn't what rank {rank} sees there: global step {seen[0]} against "
                f"{other[0]}; the checkpoint must lie on a file system that all ranks share"
            )


def _seen(folder: Path) -> Path:
    """Return a folder that rank 0 has made, when it is seen here too.

    Raises:
        ConfigError: it isn't seen in time.
    """
    end = time.monotonic() + tunables.VISIBLE_SECONDS
    while not folder.is_dir():
        if time.monotonic() > end:
            raise ConfigError(
                f"{folder}, which rank 0 has made, isn't seen here; it must lie on a file system that all ranks share"
            )
        time.sleep(0.1)
        if folder.parent.is_dir():
            os.listdir(folder.parent)  # noqa: PTH208 - has a network file system look again
    return folder


def _sum_of(counts: Sequence[dict[str, Any]]) -> TransferCount:
    total = TransferCount()
    for count in counts:
        total.add(TransferCount(**(count | {"files": set(count["files"])})))
    return total


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; raise an error of the system as an OSError."""
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from error


def _write_rest(view: UniversalView, folder: Path, index: Index, tensors: dict[str, torch.Tensor]) -> None:
    """Write everything but the atoms, the index last. Open the result again: what can't be opened must not be committed."""
    if tensors:
        _write_tensors(tensors, folder / CLIENT_TENSORS_NAME)
    random_state = view.checkpoint.path / FIRST_RANDOM_STATE_NAME
    if random_state.is_file():
        view.checkpoint.versions.note(random_state)
        shutil.copyfile(random_state, folder / FIRST_RANDOM_STATE_NAME)
    sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    index = index.model_copy(update={"files": sizes})
    (folder / INDEX_NAME).write_text(index.model_dump_json(indent=1), encoding="utf-8")
    UniversalCheckpoint(folder)
    view.checkpoint.versions.check()
