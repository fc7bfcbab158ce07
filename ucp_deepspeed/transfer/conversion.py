"""Convert any checkpoint to an output, such as the universal format, in one pass, by one process or by several."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checksums import sums_with
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.one_save import check_one_save, places_of
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.output import Literal, Output, OutputPlan
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums, Run, joined
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.remote import RemotePath, is_taken, is_url
from ucp_deepspeed.transfer.commit import committed_folder, is_seen
from ucp_deepspeed.transfer.copying import TransferCount
from ucp_deepspeed.transfer.processes import Ranks
from ucp_deepspeed.transfer.stage_copies import Seen, look, may_differ, merge, settle, with_copies_of
from ucp_deepspeed.transfer.uploading import check_absent, uploaded_folder
from ucp_deepspeed.transfer.writing import Runs, Sums, create_files, share_of, write_share

logger = logging.getLogger("ucp_deepspeed")


def convert(
    view: UniversalView,
    destination: Path,
    output: Output | None = None,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    chunk_numbytes: int = tunables.WRITTEN_NUMBYTES,
    ranks: Ranks | None = None,
    then: Callable[[], None] = lambda: None,
) -> TransferCount:
    """Write a checkpoint in another form to a new folder, and return what all ranks have read. Collective over the ranks.

    Args:
        destination: the folder to make; it appears when everything is in it.
        output: the form to write; by default the universal one.
        workers: threads of each rank; each needs one buffer of ``chunk_numbytes``.
        progress: called with (bytes written, bytes to write) of this rank's share after each chunk, from one thread at a time.
        ranks: the ranks that share the work; by default this process alone.
        then: called on rank 0 when the folder has appeared, and not disturbed by signals.

    Raises:
        ConfigError: the folder exists already, or would lie in a file, or another process is writing it, or there is too little
            space for it; nothing is written. Or the ranks don't see the same checkpoint and destination; nothing is left behind.
        MismatchError, UnsupportedError, ConfigError: see `Output.plan`; nothing is written. Or copies of a parameter differ over
            pipeline stages, and nothing is written; or the files don't hold each element of each parameter exactly once, and
            nothing is left behind.
        DamagedCheckpointError: a source file is missing, truncated or isn't what was saved, or was changed meanwhile; nothing is
            left behind.
        OSError: the disk is full, or can't be written; nothing is left behind.
        OtherRankError: another rank has failed; nothing is left behind.
    """
    output, ranks = output or UniversalOutput(), ranks or Ranks()
    # 1. What to write, the same on all ranks.
    _check_free(destination)
    view = _with_copies(view, output.on_differing, ranks)
    if isinstance(view.checkpoint, DeepSpeedCheckpoint):
        check_one_save(view.checkpoint, places_of(view.checkpoint)[ranks.rank :: ranks.count])
    plan = output.plan(view)
    view = plan.view or view
    _check_same_plan(view, plan, ranks)
    # 2. A hidden folder with all files; at the end of the block it gets its name.
    with _new_folder(destination, plan, ranks, then) as folder:
        # 3. The bytes of the files, a share from each rank.
        share = share_of(plan.files, ranks.rank, ranks.count)
        sums, pieces, runs = RecordSums(), Sums(), Runs()
        written = write_share(view, folder, share, workers, chunk_numbytes, progress, ranks.check, sums, pieces, runs)
        _check_records(sums, ranks)
        written.bytes_checked += sums.bytes_checked
        count = _sum_over(ranks, written)
        # 4. The rest, when all files are whole.
        known, known_runs = _pieces_of_all(pieces, ranks), _runs_of_all(runs, ranks)
        if ranks.rank == 0:
            plan.finish_records(folder, known_runs)
            of_files = [
                sums_with(folder / each.file_name, each.summed, known.get(each.file_name, {})) for each in plan.files
            ]
            plan.finish(folder, of_files)
            view.checkpoint.versions.check()
    return count


def _with_copies(view: UniversalView, on_differing: OnDiffering, ranks: Ranks) -> UniversalView:
    """Return the view with the copies to write of parameters that several pipeline stages hold. Collective over the ranks."""
    copies = may_differ(view.checkpoint)
    if not copies:
        return view
    seen = look(view.checkpoint, copies, (ranks.rank, ranks.count))
    told = {name: [sorted(each.differing), sorted(each.trained)] for name, each in seen.items()}
    parts = ranks.gather("copies", told)
    found = merge([{name: Seen(frozenset(d), frozenset(t)) for name, (d, t) in part.items()} for part in parts])
    settled = settle(view.checkpoint, copies, found, on_differing)
    settled.check(view.checkpoint)
    if settled.told and ranks.rank == 0:
        logger.warning("pipeline stages hold different values; one is written: %s", "; ".join(settled.told))
    return view.over(with_copies_of(view.checkpoint, settled.stages))


def _check_free(destination: Path) -> None:
    """Check early, before anything is read; `committed_folder` makes sure later."""
    if is_url(destination):
        check_absent(cast(RemotePath, destination))
        return
    if is_taken(destination):
        raise ConfigError(f"{destination} exists already; nothing was written")
    taken = (parent for parent in destination.parents if is_taken(parent) and not parent.is_dir())
    if blocking := next(taken, None):
        kind = "a file" if blocking.exists() else "a link that leads nowhere"
        raise ConfigError(f"{blocking} is {kind}; nothing was written; name another folder")


def _check_space(destination: Path, plan: OutputPlan) -> None:
    """Check the free space, which is better than an error after an hour; others' writes can still fill the disk meanwhile."""
    if is_url(destination):
        place = Path(tempfile.gettempdir())
    else:
        place = next(parent for parent in destination.absolute().parents if parent.exists())
    disk, numbytes = shutil.disk_usage(place), plan.rest_numbytes + sum(file.numbytes for file in plan.files)
    if disk.total and numbytes > disk.free:  # some file systems in memory know of no size
        needed, free = f"{numbytes / 1e6:,.1f} MB", f"{disk.free / 1e6:,.1f} MB"
        there = f"in {place}, where it is made (TMPDIR names another folder)" if is_url(destination) else "there"
        raise ConfigError(f"{destination} needs {needed}, and {free} are free {there}; nothing was written")


def _check_same_plan(view: UniversalView, plan: OutputPlan, ranks: Ranks) -> None:
    """Check that all ranks see the same step and layout: they write into one layout."""
    digest = hashlib.sha256()
    for file in plan.files:
        parts = [part.data if isinstance(part, Literal) else part.key for part in file.parts]
        places = [part.file_offset for part in file.parts]
        digest.update(repr((file.file_name, file.numbytes, places, parts)).encode())
    seen = [view.checkpoint.run.global_steps, digest.hexdigest()]
    for rank, other in enumerate(ranks.gather("view", seen)):
        if other != seen:
            raise ConfigError(
                f"{view.checkpoint.path} on rank {ranks.rank} isn't what rank {rank} sees there: global step {seen[0]} against "
                f"{other[0]}; the checkpoint must lie on a file system that all ranks share"
            )


@contextmanager
def _new_folder(destination: Path, plan: OutputPlan, ranks: Ranks, then: Callable[[], None]) -> Iterator[Path]:
    """Yield the folder with all files in it, of their final sizes. Rank 0 makes and commits it; the others see it, and wait."""
    if ranks.rank == 0:
        _check_space(destination, plan)
        making = uploaded_folder if is_url(destination) else committed_folder
        with making(destination, then) as folder, ranks.failing_together():
            create_files(folder, plan.files)
            ranks.broadcast("folder", str(folder) if is_url(destination) else folder.name)
            yield folder
    else:
        told = ranks.broadcast("folder")
        folder = Path(told) if is_url(destination) else destination.parent / told
        if not is_seen(folder):
            problem = f"{folder}, which rank 0 has made, isn't seen here"
            raise ConfigError(f"{problem}; it must lie on a file system that all ranks share")
        yield folder
    ranks.broadcast("committed")


def _check_records(sums: RecordSums, ranks: Ranks) -> None:
    """Check the records of archives that no rank has read alone. Collective over the ranks."""
    parts = ranks.gather("records", sums.partial())
    sums.finish((run for part in parts for run in part), (ranks.rank, ranks.count))


def _pieces_of_all(pieces: Sums, ranks: Ranks) -> Sums:
    """Return the sums of pieces that all ranks have written. Collective over the ranks."""
    found = Sums()
    mine = {name: [list(known), [f"{each:x}" for each in known.values()]] for name, known in pieces.items()}
    for told in ranks.gather("pieces", mine):
        for name, (numbers, sums) in told.items():
            found.setdefault(name, {}).update(zip(numbers, (int(each, 16) for each in sums), strict=True))
    return found


def _runs_of_all(runs: Runs, ranks: Ranks) -> Runs:
    """Return the sums of records, in parts, that all ranks have written. Collective over the ranks."""
    found = Runs()
    for told in ranks.gather("archives", {name: joined(held) for name, held in runs.items() if held}):
        for name, held in told.items():
            found.setdefault(name, []).extend(Run(*run) for run in held)
    return found


def _sum_over(ranks: Ranks, count: TransferCount) -> TransferCount:
    """Return the figures of all ranks, when all have come here."""
    total = TransferCount()
    for found in ranks.gather("written", asdict(count) | {"files": sorted(count.files)}):
        total.add(TransferCount(**(found | {"files": set(found["files"])})))
    return total
