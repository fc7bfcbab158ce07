"""The files that a rank writes in a save: their digests and checksums, which it tells the rank that writes the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME, digest_of_sums, joined, records_of, sums_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, Manifest, digest_of
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_deepspeeds
from ucp_deepspeed.checkpoint.encoding import with_sum
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME
from ucp_deepspeed.checkpoint.tags import read_mark
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.errors import SaveError, naming
from ucp_deepspeed.transfer.commit import write_atomically


@dataclass(frozen=True, slots=True)
class Written:
    """Some files of a save.

    Attributes:
        names: of all files.
        digests: file → digest of its content (`digest_of`), for archives.
        sums: file → its line of checksums; empty if none are wanted.
    """

    names: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)

    def note(self, path: Path, checksums: bool, known: Mapping[str, Iterable[int]] | None = None) -> None:
        """Add a file.

        Args:
            known: sums of the pieces of records, by name, that were taken before they were written.

        Raises:
            OSError: it can't be read.
        """
        self.names.append(path.name)
        if (digest := digest_of(path)) is not None:
            self.digests[path.name] = digest
        if checksums:
            starts = records_of(path) if known else {}
            self.sums[path.name] = sums_of(path, {starts[name]: sums for name, sums in (known or {}).items()}).line()

    def note_whole(self, path: Path, checksums: bool, known: Mapping[str, Iterable[int]] | None = None) -> None:
        """Add an archive when it is whole; see `note`.

        With AutoEP under tensor parallelism several ranks write one file, of the same bytes, one over the other.
        """
        for pause in tunables.NOTE_AGAIN_SECONDS:
            with suppress(Exception):
                self.note(path, checksums, known)
                if path.name in self.digests:
                    return
            if not path.is_file():
                break
            time.sleep(pause)
        self.note(path, checksums, known)


def why_not_written(path: Path) -> OSError | None:
    """Return the error that keeps a file from growing; torch doesn't tell it. The file is empty then: its space is given back."""
    try:
        with suppress(FileNotFoundError), naming(path):
            try:
                with path.open("r+b") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(bytes(tunables.PROBE_NUMBYTES))
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                os.truncate(path, 0)
    except OSError as error:
        return error
    return None


@contextmanager
def noting_files(engine: Engine, checksums: bool) -> Iterator[Callable[[], Written]]:
    """Note the files that the engine's checkpoint engine saves in the block, each as soon as it is written, in a thread.

    Yields a function that waits for the thread and returns what was noted. Call it when all ranks have written: with AutoEP under
    tensor parallelism several ranks write one file, one over the other, and such a file is noted again. It raises a SaveError
    for a file that can't be read.
    """
    writer, save, written = engine.checkpoint_engine, engine.checkpoint_engine.save, Written()
    noted: list[tuple[Path, Future[tuple[int, int]]]] = []

    def note(path: Path) -> tuple[int, int]:
        before = path.stat()
        written.note(path, checksums)
        return before.st_size, before.st_mtime_ns

    def noting_save(state_dict: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            done = save(state_dict, path, *args, **kwargs)
        except RuntimeError as error:  # torch's, of its writer
            if (reason := why_not_written(Path(path))) is not None:
                raise reason from error
            raise
        noted.append((Path(path), thread.submit(note, Path(path))))
        return done

    def result() -> Written:
        for path, future in noted:
            try:
                now = path.stat()
                if future.exception() is not None or future.result() != (now.st_size, now.st_mtime_ns):
                    note(path)
            except OSError as error:
                reason = f"{path} was written and can't be read, and 'latest' was not moved: {error}"
                raise SaveError(reason) from error
        return written

    own = vars(writer).get("save")
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as thread:
        writer.save = noting_save
        try:
            yield result
        finally:
            del writer.save
            if own is not None:
                writer.save = own


def _of_folder(folder: Path, of_ranks: Sequence[Written]) -> tuple[dict[str, str], dict[str, str]]:
    """Return digests and checksums of all ranks' files. Machines with disks of their own may each have a file of one name, and
    differ in it: then it is this folder's."""
    digests: dict[str, str] = {}
    sums: dict[str, str] = {}
    for name in {name: None for written in of_ranks for name in (*written.digests, *written.sums)}:
        told = {(written.digests.get(name), written.sums.get(name)) for written in of_ranks}
        told.discard((None, None))
        if len(told) > 1:
            here = digest_of(folder / name)
            told = {each for each in told if each[0] == here}
        for digest, line in told if len(told) == 1 else ():
            digests |= {name: digest} if digest is not None else {}
            sums |= {name: line} if line is not None else {}
    return digests, sums


def _sizes(folder: Path, written: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of a save's files, and of files with names of DeepSpeed's that lay there from before. One with such a name
    that was written since the mark belongs to the save, whoever has written it."""
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    others = [name for name in there if name not in written and is_deepspeeds(name)]
    mark = read_mark(folder) if others else None
    before = set() if mark is None else set(mark.unwritten(folder, others))
    listed = {name for name in there if name in written or (name in others and name not in before)}
    sizes = {name: (folder / name).stat().st_size for name in there if name in listed or name in before}
    return (
        {name: size for name, size in sizes.items() if name in listed},
        {name: size for name, size in sizes.items() if name in before},
    )


def write_manifest(
    manifest: Manifest, folder: Path, save_id: str, random_states: str, of_ranks: Sequence[Written]
) -> None:
    """Write what describes the files of a save that are in a folder: the random states, the checksums, and last the manifest.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    write_atomically(folder / RANDOM_STATES_NAME, random_states)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    digests, sums = _of_folder(folder, of_ranks)
    (folder / CHECKSUMS_NAME).unlink(missing_ok=True)
    if sums:
        sums[RANDOM_STATES_NAME] = sums_of(folder / RANDOM_STATES_NAME).line()
        content = joined(save_id, [sums[name] for name in sorted(sums)])
        write_atomically(folder / CHECKSUMS_NAME, content)
        manifest = manifest.model_copy(update={"checksums": digest_of_sums(content.encode("ascii"))})
    names = {name for written in of_ranks for name in written.names} | {RANDOM_STATES_NAME, CHECKSUMS_NAME}
    files, earlier = _sizes(folder, names)
    told = {"save_id": save_id, "files": files, "earlier": earlier, "contents": dict(sorted(digests.items()))}
    write_atomically(folder / MANIFEST_NAME, with_sum(manifest.model_copy(update=told).model_dump_json(indent=1)))
