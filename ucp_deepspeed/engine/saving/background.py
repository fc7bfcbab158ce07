"""Asynchronous saving: DeepSpeed saves into host memory, and a thread of each rank writes from there (``docs/architecture.md``,
*One save in the background*).

**How rank 0 learns that the others are done.** Each rank leaves a small file in the hidden folder when its own files are on
disk, or couldn't be written; rank 0 looks for these small files. The ranks write to one file system anyway. A collective in the
background could meet the training's own collectives on the same group in another order on each rank. Another group, or torch's
store, may be gone before the files are written: scripts destroy their process group first and end then.

**How the others learn of a failure.** They learn by a collective in the foreground: `wait_for_save`, which the engine's next
save or load calls. At the end of the process there is no collective any more: each rank finishes its files, rank 0 waits for the
others, and a rank whose own save failed ends with a status other than zero (`ucp_deepspeed.waiting`).

**Why a thread.** The thread spends nearly all of its time outside the interpreter's lock: checksums and writes of whole
tensors, fsync. Another process would need the buffers in shared memory, which can't be pinned in general.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from errno import ENOENT, ENOTDIR
from functools import cache
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from ucp_deepspeed import tunables
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.saving.host_memory import Need, check_room
from ucp_deepspeed.engine.saving.kept_errors import KeptError
from ucp_deepspeed.engine.saving.snapshot import DescribedFile, FileSnapshot, HostBuffers, describe
from ucp_deepspeed.engine.saving.written import Written
from ucp_deepspeed.errors import ConfigError, SaveError, is_of_system
from ucp_deepspeed.transfer.commit import remove_partial_folder, replace_text
from ucp_deepspeed.waiting import end_of_process

logger = logging.getLogger("ucp_deepspeed")

ENDED_NAME = ".ended_rank_{rank:05d}.json"
"""The file that a rank leaves in the hidden folder. ``error`` in it is a text, or null if all of the rank's files are on disk."""

BUFFERS = "universal_checkpoint_buffers"
"""Attribute of an engine: its `HostBuffers`."""


def check_background(engine: Engine, setting: str = "async") -> None:
    """Refuse settings that can't be used with asynchronous saving, nor with another setting that needs it.

    Args:
        setting: the key of ``save`` that asks for it, for the message.

    Raises:
        ConfigError: another of DeepSpeed's checkpoint engines, its old file format, or files on each node's own disk.
    """
    native = engine.checkpoint_engine
    if type(native) is not TorchCheckpointEngine:
        raise ConfigError(
            f"'checkpoint.writer' or 'datastates_ckpt' (DeepSpeed's {type(native).__name__}) and {setting!r} in "
            f"'universal_checkpoint.save' exclude one another, since both replace how files are written; remove one of them"
        )
    if not native.zipfile_serialization:
        raise ConfigError(
            f"{setting!r} in 'universal_checkpoint.save' writes torch's zip format, and 'checkpoint.checkpoint_serialization' "
            f"turns it off"
        )
    if engine.use_node_local_storage():
        raise ConfigError(
            f"{setting!r} in 'universal_checkpoint.save' needs a folder that all ranks see, and "
            f"'checkpoint.use_node_local_storage' gives each node its own; remove one of them"
        )


class SnapshotEngine(CheckpointEngine):  # type: ignore[misc]
    """Stands in for DeepSpeed's ``TorchCheckpointEngine`` during one ``save_checkpoint``; `save` only notes what is to be saved.

    `copied` then copies what was noted, unless an error was kept.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__()
        self.name = "SnapshotEngine"
        self._files: list[DescribedFile] = []
        self._native, self._folder = engine.checkpoint_engine, folder
        self._experts, self._zero = engine.has_moe_layers, engine.zero_optimization()
        self._kept = KeptError(folder)
        self._buffers = vars(engine).setdefault(BUFFERS, HostBuffers())

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing; DeepSpeed calls this first."""

    def save(self, state_dict: Any, path: str) -> None:
        """Note what ``torch.save`` would write."""
        with self._kept.keeping(path):
            name = str(Path(path).absolute().relative_to(self._folder))
            # Otherwise DeepSpeed clones layers of pipelines (``runtime/pipe/module.py``, ``save_state_dict``), and with experts
            # all files but ZeRO's (``runtime/engine.py``, ``_save_moe_checkpoint``).
            partition = self._zero and name.endswith("optim_states.pt")
            cloned = name.startswith("layer_") or (self._experts and not partition)
            self._files.append(describe(state_dict, name, apart=cloned))

    @contextmanager
    def in_place_of_files(self, engine: Engine) -> Iterator[None]:
        """Be the engine's checkpoint engine in the block."""
        with self._kept.in_parts_of(engine, checkpoint_engine=self):
            yield

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load by DeepSpeed's own engine; a save loads nothing."""
        return self._native.load(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return True; DeepSpeed calls this last, and the files are committed in the background."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Return whether a rank saves what all ranks have."""
        return bool(self._native.is_data_parallel_writer(dp_rank))

    def preserves_storage_sharing(self) -> bool:
        """Return False: DeepSpeed needn't clone tensors before it saves them, since copying them does the same."""
        return False

    def copied(self) -> list[FileSnapshot]:
        """Copy into host memory what is to be saved, once it is known that there is room for it. Collective.

        Raises:
            SaveError: a state can't be collected or pickled, DeepSpeed couldn't write what it writes itself, or memory is short.
        """
        with agreement(tells=True) as told:
            self._kept.check()
            told.mine = Need.here(*self._buffers.make_room(self._files))
        if dist.get_rank() == 0 and any(need.numbytes for need in told.values):
            largest = max(told.values, key=lambda need: need.numbytes)
            logger.info("snapshots take up to %s on a rank, from one save to the next", largest)
        check_room(told.values)
        with agreement():
            try:
                return self._buffers.copy(self._files)
            except Exception as error:
                reason = f", and 'latest' was not moved: {type(error).__name__}"
                if is_of_system(error):
                    reason = f", since memory is short; snapshots take {told.values[dist.get_rank()]}"
                raise SaveError(f"{self._folder} can't be saved{reason}: {error}") from error


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a save that one rank writes.

    Attributes:
        partial: the hidden folder, which exists.
        checksums: whether checksums of the files are taken.
        commit: makes ``partial`` the checkpoint, by what each rank has written; rank 0 calls it.
        timeout: seconds that rank 0 waits for the others.
    """

    partial: Path
    folder: Path
    files: Sequence[FileSnapshot]
    checksums: bool
    commit: Callable[[Sequence[Written]], None]
    rank: int
    world_size: int
    timeout: float


class Writing(threading.Thread):
    """Does a job. Not a daemon: the interpreter waits for it before it ends.

    Attributes:
        written: set when this rank's own files are on disk or have failed.
        own_error: the error in this rank's files; to be read after ``written``.
        error: the first error; to be read when the thread has ended.
        settled: whether all ranks have waited for this save.
        seconds: time that it took, from the snapshot on; None until the thread has ended.
        outcome: why the save failed, on whatever rank; to be read when it is settled.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(name=f"save of {job.folder.name}", daemon=False)
        self.job = job
        self.written = threading.Event()
        self.own_error: SaveError | None = None
        self.error: SaveError | None = None
        self.settled = False
        self.seconds: float | None = None
        self.outcome: Exception | None = None
        self._given_up = threading.Event()
        self._begun = time.monotonic()
        self._folder_number: int | None = None
        with suppress(OSError):
            self._folder_number = job.partial.stat().st_ino
        self._then: list[Callable[[], None]] = []
        self._ended = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Write, commit on rank 0, and do what is to be done then."""
        self._write_and_commit()
        self.seconds = time.monotonic() - self._begun
        with self._lock:
            self._ended, then = True, self._then
        if then and self._is_committed():
            for action in then:
                self._do(action)

    def then(self, action: Callable[[], None]) -> None:
        """Call a function when the checkpoint is on disk: from this thread, or now if it is there. After a failure it is never
        called. Its errors are logged."""
        with self._lock:
            if not self._ended:
                self._then.append(action)
                return
        if self._is_committed():
            self._do(action)

    @property
    def has_ended(self) -> bool:
        """Return whether nothing of the save is left to be done, on any rank."""
        return self._ended and (self.error is not None or not self._waits_for_first())

    def await_commit(self) -> bool:
        """Wait until the save has ended on all ranks, without meeting them. Return whether the checkpoint is on disk, as far as
        this rank can tell."""
        self.join()
        return self._is_committed()

    def _is_committed(self) -> bool:
        """Return whether rank 0 has put the checkpoint in its place, once this rank has written its own files."""
        if self.error is not None:
            return False
        pause, deadline = tunables.SHORTEST_PAUSE_SECONDS, time.monotonic() + self.job.timeout
        while self._waits_for_first() and time.monotonic() < deadline and not self._given_up.is_set():
            self._given_up.wait(pause)  # rank 0 renames or removes the folder
            pause = min(2 * pause, tunables.LONGEST_PAUSE_SECONDS)
        return not self._waits_for_first() and self._took_its_place()

    def _took_its_place(self) -> bool:
        """Return whether the checkpoint's folder is the one that this save has filled: a rename keeps its number. After a failure
        an older checkpoint is there, or for a moment an empty folder."""
        with suppress(OSError):
            return self.job.rank == 0 or self.job.folder.stat().st_ino == self._folder_number
        return False

    def _waits_for_first(self) -> bool:
        """Return whether rank 0 has yet to rename the folder, or to remove it."""
        return self.job.rank != 0 and _is_there(self.job.partial)

    @staticmethod
    def _do(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            logger.error("after a save in the background: %s: %s", type(error).__name__, error)

    def _write_and_commit(self) -> None:
        try:
            written = Written()
            with self._failing():
                self._write(written)
            with self._failing():  # from then on rank 0 may give the folder another name
                told = {"error": None if self.error is None else str(self.error), **asdict(written)}
                replace_text(self.job.partial / ENDED_NAME.format(rank=self.job.rank), json.dumps(told))
            self.own_error = self.error
        finally:
            self.written.set()
        if self.job.rank == 0:
            with self._failing():
                self.job.commit(self._await_ranks())
                with suppress(Exception):  # a log that can't be written
                    numbytes = sum(file.stat().st_size for file in self.job.folder.iterdir())
                    taken = time.monotonic() - self._begun
                    logger.info(
                        "saved %s (%.1f MB) in the background, in %.1f s", self.job.folder, numbytes / 1e6, taken
                    )
            if self.error is not None and not _is_there(self.job.partial):
                self.clear()  # the folder was moved, and no rank finds it any more

    def give_up(self) -> None:
        """Commit nothing, since a rank has failed. Return when the thread has ended."""
        self._given_up.set()
        self.join()

    def clear(self) -> None:
        """Remove what a failed save has written. Call it only when no rank writes any more."""
        if self.job.rank == 0:
            with suppress(OSError):
                remove_partial_folder(self.job.partial, self.job.folder)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Keep the first error, and log it at once: nobody may be left to raise it to."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = error if isinstance(error, SaveError) else self._as_save_error(error)
                with suppress(Exception):  # a log that can't be written
                    logger.error("%s", self.error)

    def _write(self, written: Written) -> None:
        for file in self.job.files:
            sums = file.write(self.job.partial, self.job.checksums)
            written.note_whole(self.job.partial / file.name, self.job.checksums, sums)

    def _await_ranks(self) -> list[Written]:
        """Wait until all ranks have ended, and return what they have written. Raise if some have failed, don't end in time, or
        don't find the folder any more."""
        deadline, pause = time.monotonic() + self.job.timeout, tunables.SHORTEST_PAUSE_SECONDS
        waiting = {rank: ENDED_NAME.format(rank=rank) for rank in range(self.job.world_size)}
        failed: dict[int, str] = {}
        found: list[Written] = []
        while waiting and not self._given_up.is_set():
            # Names are looked for in the list: a network file system would remember for a while that one of them was missing.
            # This raises if the folder is where no rank finds it any more.
            there = {entry.name for entry in self.job.partial.iterdir()}
            for rank in [rank for rank, name in waiting.items() if name in there]:
                told = json.loads((self.job.partial / waiting.pop(rank)).read_text(encoding="utf-8"))
                if (error := told.pop("error")) is not None:
                    failed[rank] = error
                found.append(Written(**told))
            if waiting and time.monotonic() > deadline:
                raise SaveError(
                    f"ranks {sorted(waiting)} didn't write their files of {self.job.folder} within {self.job.timeout:g} s of "
                    f"rank 0's, and 'latest' was not moved"
                )
            if waiting:
                self._given_up.wait(pause)
                pause = min(2 * pause, tunables.LONGEST_PAUSE_SECONDS)
        if failed and not waiting:
            self.clear()
        if failed or waiting:
            raise SaveError("; ".join(f"rank {rank}: {text}" for rank, text in failed.items()) or "a rank has failed")
        return found

    def _as_save_error(self, error: Exception) -> SaveError:
        partial, folder = self.job.partial, self.job.folder
        if not _is_there(partial) and getattr(error, "errno", ENOENT) in (ENOENT, ENOTDIR):
            found = gone_error(folder, partial.parent)
        else:
            reason = f"{type(error).__name__}: {error}"
            found = SaveError(f"{folder} could not be saved, and 'latest' was not moved: {reason}")
        found.__cause__ = error
        return found


def _is_there(folder: Path) -> bool:
    """Return whether a folder is there, as far as the disk tells."""
    try:
        return folder.is_dir()
    except OSError:
        return True


def gone_error(folder: Path, moved: Path) -> SaveError:
    """Return the error for a save whose folder somebody else has renamed or removed."""
    return SaveError(
        f"{folder} could not be saved, and 'latest' was not moved: {moved} was renamed or removed, in whole or in part, while "
        f'the save wrote there; call ucp_deepspeed.wait_for_save() before you do so, or set "async": false in '
        f"'universal_checkpoint.save', and save again"
    )


_pending: list[Writing] = []
"""Saves that may not be finished, or that failed and nobody has been told. They are in the order in which they began, which is
the same on every rank."""

OWN = "_universal_checkpoint_writing"
"""Attribute of an engine: its last `Writing`."""


def begin(engine: Engine, job: Job) -> None:
    """Start to write, on all ranks or on none. Collective.

    Raises:
        RuntimeError: a rank can't start a thread.
    """
    assert vars(engine).get(OWN) not in _pending, "a save waits for the engine's last one"
    writing = Writing(job)
    try:
        with agreement():
            writing.start()
    except BaseException:
        if writing.ident is not None:  # it has started
            writing.give_up()
        writing.clear()
        raise
    vars(engine)[OWN] = writing
    _pending.append(writing)
    _end_with_child(os.getpid())


@cache
def _end_with_child(process: int) -> None:
    """Register, once in a process, what ``atexit`` does elsewhere: processes that ``multiprocessing`` has forked call no
    ``atexit`` handler."""
    multiprocessing.util.Finalize(None, end_of_process, exitpriority=0)


def wait_for_save(engine: Engine | None = None) -> None:
    """Wait until the last asynchronous save of an engine, or of each, is on disk and ``latest`` has moved. Collective, unless the
    process group is gone.

    Raises:
        SaveError: on all ranks, if the save failed on one of them. It is told once.
    """
    errors: list[Exception] = []
    for writing in [each for each in _pending if engine is None or each is vars(engine).get(OWN)]:
        _settle(writing)
        _pending.remove(writing)
        errors += [writing.outcome] if writing.outcome is not None else []
    if errors:
        raise errors[0] if len(errors) == 1 else SaveError("; ".join(map(str, errors)))


def pending_below(folder: Path) -> list[Writing]:
    """Return the saves of this process below a folder that may not be on disk yet."""
    return [each for each in _untold_below(folder) if not each.has_ended]


def _untold_below(folder: Path) -> list[Writing]:
    """Return those, and the ended ones whose end no rank has been told."""
    place = folder.resolve()
    return [each for each in _pending if each.job.folder.resolve().is_relative_to(place)]


def is_pending(folder: Path) -> bool:
    """Return whether this process saves below a folder, in the background, and may not be through."""
    return bool(pending_below(folder))


def when_on_disk(folder: Path, action: Callable[[], None]) -> None:
    """Call a function when what this process saves below a folder is on disk: now, or from the thread of the last such save. It
    isn't called after a save that fails, before `wait_for_save` has told of it. It meets no other rank, so a framework may use it
    on one rank alone. On ranks other than 0 ``latest`` may move a moment later."""
    if untold := _untold_below(folder):
        untold[-1].then(action)
    else:
        action()


def finish_here(folder: Path) -> None:
    """Wait until what this process saves below a folder is on disk, or has failed, without meeting other ranks."""
    for writing in pending_below(folder):
        writing.await_commit()


def settle_saves(folder: Path | None = None) -> None:
    """Wait for the saves of all engines, or for those below a folder, whose ``latest`` they move; `wait_for_save` tells later how
    they ended. Collective."""
    if not _pending:
        return
    with agreement():
        place = None if folder is None else folder.resolve()
        found = [each for each in _pending if place is None or each.job.folder.resolve().is_relative_to(place)]
    for writing in found:
        _settle(writing)


def _settle(writing: Writing) -> None:
    """Wait for one save on all ranks, and remove what it has left if it failed on one of them. Collective."""
    if writing.settled:
        return
    writing.written.wait()
    try:
        with agreement():
            if writing.own_error is not None:
                raise writing.own_error
        with agreement():
            writing.join()
            if writing.error is not None:
                raise writing.error
    except Exception as error:  # Ctrl-C isn't caught: the save goes on, and the next call waits for it
        writing.give_up()
        writing.clear()
        writing.outcome = error
    writing.settled, writing.job = True, replace(writing.job, files=())  # its memory may be needed


def last_failure() -> BaseException | None:
    """Return why a save isn't on disk, if nobody has been told; wait for all. Called at the end of the process, when the
    interpreter no longer waits for threads, or its wait was interrupted."""
    try:
        for writing in _pending:
            writing.join()
    except BaseException as interrupted:
        return interrupted
    return next((error for each in _pending if (error := each.outcome or each.error) is not None), None)
