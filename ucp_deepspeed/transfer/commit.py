"""Committed or absent: folders and files that appear whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME
from ucp_deepspeed.checkpoint.opening import interrupted
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK, REPLACED_MARK, home_of
from ucp_deepspeed.errors import ConfigError, naming
from ucp_deepspeed.remote import RemotePath
from ucp_deepspeed.transfer.open_files import close_quietly
from ucp_deepspeed.transfer.signals import terminated_as_exception, undisturbed

logger = logging.getLogger("ucp_deepspeed")


@contextmanager
def committed_folder(final: Path, then: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a new folder to write in. It is renamed to ``final`` when the block ends, and removed when it fails.

    Everything in it is flushed to disk before the rename. A terminated process (SIGTERM, SIGHUP, Ctrl-C) removes it. A process
    that was killed outright leaves a folder that readers refuse, and that the next call for the same ``final`` removes.

    Args:
        then: called when the folder has its name; no signal that can be caught comes between the two.

    Raises:
        ConfigError: ``final`` exists already, or another process of this machine is writing it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    put_back(final.parent)
    if final.exists():
        raise ConfigError(f"{final} exists already; nothing was written")
    with terminated_as_exception():
        partial = make_partial_folder(final, alone=True)
        try:
            yield partial
            (partial / MARK_NAME).unlink(missing_ok=True)
            for entry in partial.rglob("*"):
                flush(entry)
            flush(partial)
            with undisturbed():
                partial.rename(final)
                release(partial)
                flush(final.parent)
                then()
        except BaseException:
            with undisturbed():
                remove_partial_folder(partial)
            raise


def make_partial_folder(final: Path, alone: bool = False) -> Path:
    """Make a hidden folder beside ``final``, with our mark in it, after removing abandoned ones, and hold its lock.

    The lock shows others that it isn't abandoned. A host's name and a process id alone don't where containers share the name.
    For processes on other machines, and on file systems without locks (NFS), they are all there is.

    Args:
        alone: nobody else may be writing a folder for the same name, and only abandoned ones of that name are removed.

    Raises:
        ConfigError: another process is writing it.
    """
    partial = _partial_path(final)
    put_back(final.parent)
    with _locked(final.parent):  # nobody looks between making the folder and holding it
        _remove_abandoned(final, of_any_name=not alone)
        others = [
            entry for entry, name, pid in _partial_folders(final) if name == final.name and _is_written(entry, pid)
        ]
        if alone and others:
            raise ConfigError(f"another process is writing {final} just now, in {others[0]}; nothing was written")
        try:
            partial.mkdir()
            (partial / MARK_NAME).touch()
            _holding[partial] = os.open(partial, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(_holding[partial], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            remove_partial_folder(partial)
            raise
    return partial


def remove_partial_folder(partial: Path, final: Path | None = None) -> None:
    """Remove a partial folder, wherever it is by now, as far as possible; also an empty folder ``final`` beside it."""
    here = _found(partial)
    _remove_tree(here)
    release(partial)
    if final is not None:
        with suppress(OSError):
            (here.parent / final.name).rmdir()


def remove_hidden(folder: Path) -> None:
    """Remove a whole checkpoint: first its name, so that nobody finds a part of it. If this is killed, the next save or removal
    beside it removes the rest.

    Raises:
        OSError: it can't be renamed or removed.
    """
    hidden = _partial_path(folder)
    remove_abandoned(folder, of_any_name=True)
    folder.rename(hidden)
    (hidden / MARK_NAME).touch()
    flush(hidden.parent)
    _remove(hidden)


def _remove_tree(folder: Path) -> None:
    """Remove a folder as far as possible; see `_remove`."""
    with suppress(OSError):
        _remove_what_is_not_ours(folder)
    with suppress(OSError):  # of a folder that can't be closed, which Python's function doesn't ignore
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another process has just put something there: somebody goes on by the mark
        if folder.is_dir():
            (folder / MARK_NAME).touch()


def _found(partial: Path) -> Path:
    """Return where a partial folder is, also if its parent folder was renamed: Linux knows the path of an open descriptor."""
    try:
        if partial.exists() or partial not in _holding:
            return partial
        place = Path(f"/proc/self/fd/{_holding[partial]}").readlink()
        return place if os.path.samestat(place.stat(), os.fstat(_holding[partial])) else partial
    except OSError:
        return partial


_holding: dict[Path, int] = {}
"""Descriptors of the folders that this process writes."""


def release(*folders: Path) -> None:
    """Let folders go that are finished, or gone."""
    for folder in folders:
        if (descriptor := _holding.pop(folder, None)) is not None:
            close_quietly(descriptor)


def hold(folder: Path) -> bool:
    """Keep other processes from holding a folder until `release`, where the file system has locks. Return whether none does."""
    descriptor, free = os.open(folder, os.O_RDONLY), True
    with suppress(OSError):
        free = _lock(descriptor)
    if free:
        _holding[folder] = descriptor
    else:
        close_quietly(descriptor)
    return free


# A forked child holds nothing: the folders are its parent's, and count as abandoned when that is gone.
os.register_at_fork(after_in_child=lambda: release(*_holding))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        close_quietly(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time run the block, where the file system has locks. Wait a limited time, in case one hangs."""
    with _opened(folder) as descriptor:
        with suppress(OSError):
            wait_until(lambda: _lock(descriptor), tunables.LOCK_SECONDS)
        yield


def wait_until(there: Callable[[], bool], seconds: float) -> None:
    """Wait until something is there, or the time is over."""
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(tunables.LOOK_SECONDS)


def _lock(descriptor: int) -> bool:
    """Take a lock, unless somebody has it. Raises OSError if the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_written(partial: Path, pid: int) -> bool:
    """Return whether a process writes in a partial folder: by the lock, or else by the process id in its name."""
    if partial in _holding:
        return True
    with suppress(OSError), _opened(partial) as descriptor:
        return not _lock(descriptor)
    return _alive(pid)


def _partial_path(final: Path) -> Path:
    """Return a new path at which this process may write the folder or file ``final``: hidden, beside it, and refused by readers.

    No path comes twice. On a network file system other machines may still know the last one's entry, as the folder that has its
    final name by now, or as a path where nothing is.
    """
    return final.parent / f".{final.name}{PARTIAL_MARK}{socket.gethostname()}-{os.getpid()}.{secrets.token_hex(4)}"


def is_seen(path: Path, tells: bool = True, there: Callable[[Path], bool] = Path.is_dir) -> bool:
    """Wait until a folder, or file, that another process has made is seen here too; return whether it is, in time.

    Args:
        tells: log what is waited for.
        there: returns whether it is seen.
    """
    begun, pause, told = time.monotonic(), tunables.SHORTEST_PAUSE_SECONDS, not tells
    while not there(path):
        waited = time.monotonic() - begun
        if waited > tunables.VISIBLE_SECONDS:
            return False
        if waited > tunables.TOLD_SECONDS and not told:
            told = True
            logger.info(
                "waiting until %s, which rank 0 has made, is seen on %s, for at most %g s: network file systems may show a new "
                "folder to other machines only after a minute",
                *(path, socket.gethostname(), tunables.VISIBLE_SECONDS),
            )
        with suppress(OSError):  # this has a network file system look again
            os.listdir(next(parent for parent in path.parents if parent.is_dir()))  # noqa: PTH208
        time.sleep(pause)
        pause = min(2 * pause, tunables.LONGEST_PAUSE_SECONDS)
    return True


def replace_folder(partial: Path, final: Path, is_part: Callable[[str], bool]) -> None:
    """Put a finished folder in the place of another, or of none, in one step: a reader finds the old one or the new one, whole.

    Other entries of the old folder, neither its parts nor names that the new one has, are taken along. On a file system that
    can't exchange two folders (NFS can't) there are two renames; a process killed between them leaves the old folder as
    ``.<name>.partial-…-replaced``.

    Args:
        is_part: whether a file of this name was a part of the old content, and is removed with it.

    Raises:
        OSError: a rename failed.
    """
    (partial / MARK_NAME).unlink(missing_ok=True)
    try:
        partial.rename(final)  # works if there is no old folder, or an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _take_along(final, partial, is_part)
        replaced = _exchange(partial, final)
        # The new folder is in place, whatever happens from here on.
        with suppress(OSError):
            (replaced / MARK_NAME).touch()  # so that somebody goes on, if this process is killed
        try:
            _take_along(replaced, final, is_part)  # entries that somebody put there just now
        except OSError as failed:
            logger.warning("what was put into %s while it was replaced is lost: %s", final, failed)
        _remove_tree(replaced)
        if replaced.exists():
            logger.warning("what %s replaced can't be removed; it is in %s and takes space there", final, replaced)
    release(partial)
    flush(final.parent)


def _take_along(source: Path, target: Path, is_part: Callable[[str], bool]) -> None:
    """Link or copy entries, at the top, that ``target`` doesn't have; symbolic links stay what they are."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != source:
            return []
        ours = {name for name in names if name == MARK_NAME or is_part(name) or _is_partial(name)}
        return [name for name in names if name in ours or os.path.lexists(target / name)]

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new, follow_symlinks=False)  # so that a process that has it open goes on writing the same file
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, symlinks=True, ignore=left_out, copy_function=link, dirs_exist_ok=True)


def _is_partial(name: str) -> bool:
    """Return whether a name is that of a file of this package while it is written."""
    return _FILE.fullmatch(name.removeprefix(".").partition(PARTIAL_MARK)[0]) is not None and PARTIAL_MARK in name


def _exchange(partial: Path, final: Path) -> Path:
    """Let two folders change names; return where the old one is now."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux
        call = None
    if call is not None:
        if call(here, os.fsencode(partial), here, os.fsencode(final), ctypes.c_uint(exchange)) == 0:
            return partial
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(final))
    replaced = partial.with_name(f"{partial.name}{REPLACED_MARK}")
    final.rename(replaced)
    try:
        partial.rename(final)
    except BaseException:
        replaced.rename(final)
        raise
    return replaced


def remove_abandoned(final: Path, of_any_name: bool = False) -> None:
    """Remove unfinished folders for ``final`` of processes of this machine that have ended, as far as that is possible.

    Args:
        of_any_name: remove those for other folders beside it too: a killed run saves its next tag, and not that one again.
    """
    with _locked(final.parent):
        _remove_abandoned(final, of_any_name)


def _remove_abandoned(final: Path, of_any_name: bool) -> None:
    for entry, name, pid in _partial_folders(final):
        meant = final.parent / name
        only_copy = home_of(entry) == meant and not meant.exists()  # see `put_back`
        if (of_any_name or name == final.name) and not (only_copy or _alive(pid) or _is_written(entry, pid)):
            try:
                if not _is_ours(entry):
                    continue
                _remove(entry)
                with suppress(OSError):  # a folder that a save had made, empty, for entries that others add
                    meant.rmdir()
            except OSError as error:  # another user's, perhaps
                logger.warning("%s, which a process that has ended left behind, can't be removed: %s", entry, error)


def _remove_abandoned_files(folder: Path) -> None:
    """Remove files of this package that processes of this machine were writing in a folder when they were killed."""
    for entry, name, pid in _partial_entries(folder):
        ours = _FILE.fullmatch(name) is not None and entry.is_file() and not entry.is_symlink()
        if ours and not (_alive(pid) or _is_written(entry, pid)):
            try:
                entry.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s, which a process that has ended left behind, can't be removed: %s", entry, error)


_FILE = re.compile(r"latest|ucp_[a-z_]+\.jsonl?")
"""Names of the files that are replaced in one step."""

_WRITER = re.compile(r"(\d{1,9})(?:\.[0-9a-f]+)?")
"""End of a partial folder's name, after the host's: the process, and what makes the path a new one, which earlier releases left
out."""


def _partial_folders(final: Path) -> Iterator[tuple[Path, str, int]]:
    """Yield what processes of this machine write beside ``final``: each folder, its final name, and the process."""
    for entry, name, pid in _partial_entries(final.parent):
        if entry.is_dir() and not entry.is_symlink():
            yield entry, name, pid


def _partial_entries(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """Yield hidden entries of a folder by whose names a process of this machine writes there: each, its final name, and the
    process."""
    mark = f"{PARTIAL_MARK}{socket.gethostname()}-"
    for entry in folder.iterdir():
        name, _, rest = entry.name.removesuffix(REPLACED_MARK).rpartition(mark)
        # A host whose name begins with this one's leaves entries with the same mark, and the rest of its name after it.
        writer = _WRITER.fullmatch(rest)
        final_name = name.removeprefix(".")
        if writer is not None and name.startswith(".") and final_name not in ("", ".", ".."):
            yield entry, final_name, int(writer[1])


def _is_ours(partial: Path) -> bool:
    """Return whether a folder holds a file that only this package writes, or nothing: the name alone is no proof."""
    names = [entry.name for entry in partial.iterdir()]
    return not names or any(map(_shows_ours, names))


def _shows_ours(name: str) -> bool:
    return name.startswith(("ucp_", ".ended_rank_"))


def _remove(folder: Path) -> None:
    """Remove a folder, and last what shows that it is ours: otherwise nobody goes on with a removal that was killed."""
    _remove_what_is_not_ours(folder)
    shutil.rmtree(folder)


def _remove_what_is_not_ours(folder: Path) -> None:
    for entry in folder.iterdir():
        if not _shows_ours(entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def put_back(root: Path) -> None:
    """Give folders their names back that processes were about to replace when they were killed between two renames (`_exchange`).

    A writer calls it before it writes in ``root``; readers read such folders where they lie.
    """
    if interrupted(root):
        # A process on another machine may be about to put the new one in its place.
        time.sleep(tunables.REPLACING_SECONDS)
        for final, replaced in interrupted(root).items():
            with suppress(OSError):  # another rank was faster
                replaced.rename(final)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, durably; see `replace_text`. What killed processes were writing beside it goes."""
    if isinstance(path, RemotePath):
        path.write_text(text)
        return
    _remove_abandoned_files(path.parent)
    replace_text(path, text)
    flush(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new, whole, and a failure leaves the old.

    Replacing is its last action: a process that sees the new text may remove the folder at once. Until then a lock shows others
    that the hidden file isn't abandoned.
    """
    partial = _partial_path(path)
    try:
        # nothing that lies there already, such as somebody's link, is written to
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            with suppress(OSError):
                _lock(descriptor)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    with naming(path), _opened(path) as descriptor:
        os.fsync(descriptor)


def _alive(pid: int) -> bool:
    """Return whether another process has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
