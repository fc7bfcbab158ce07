"""The mark of a save whose files DeepSpeed writes straight into the tag's folder: readers tell by it that the save was killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.random_files import FORMER_NAMES, RANDOM_STATES_NAME
from ucp_deepspeed.checkpoint.tags import mark_of
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.node_local import writes_for_node
from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.transfer.commit import flush, hold, is_seen, put_back, release, remove_abandoned, write_atomically


@contextmanager
def marked_unfinished(engine: Engine, folder: Path, save_id: str) -> Iterator[None]:
    """Mark a tag's folder before DeepSpeed writes there in the block, and remove what described the files until now. Collective.

    Args:
        save_id: random, the same on all ranks.

    Raises:
        SaveError: the mark can't be written; or another job saves there; or a rank that will write doesn't see it, since its
            ``save_dir`` or tag is another one. The folder is then as it was.
    """
    try:
        _mark(engine, folder, save_id)
        yield
    finally:
        release(folder)


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """Replace a tag's folder in the block, unless another job saves straight into it.

    Raises:
        SaveError: one does.
    """
    if folder.is_dir() and not hold(folder):
        raise SaveError(f"another job is saving into {folder} just now, and 'latest' was not moved")
    try:
        yield
    finally:
        release(folder)


def check_mark(folder: Path, save_id: str) -> None:
    """Check, when all have written, that no other job has saved into the folder meanwhile: files of both would lie there.

    Raises:
        SaveError: it has.
    """
    if not _has(folder / MARK_NAME, save_id):
        raise SaveError(
            f"another job has saved into {folder} at the same time, and 'latest' was not moved; let each job have a folder of "
            f"its own, and save again"
        )


def _mark(engine: Engine, folder: Path, save_id: str) -> None:
    undo: Callable[[], None] = lambda: None  # noqa: E731
    try:
        with agreement():
            if writes_for_node(engine):
                undo = _write(folder, save_id)
        with agreement():
            if writes(engine) and not is_seen(
                folder / MARK_NAME, engine.local_rank == 0, lambda mark: _has(mark, save_id)
            ):
                raise SaveError(
                    f"rank {dist.get_rank()} saves into {folder}, where it doesn't see what the first rank has just put into the "
                    f"folder of this save: give all ranks the same save_dir and tag, on a shared file system, or set "
                    f"\"use_node_local_storage\": true in 'checkpoint' if machines save on their own disks"
                )
    except BaseException:
        with suppress(OSError):
            undo()
        raise
    with agreement():
        if writes_for_node(engine):
            for described in (MANIFEST_NAME, CHECKSUMS_NAME, RANDOM_STATES_NAME):
                (folder / described).unlink(missing_ok=True)
            for former in folder.glob(FORMER_NAMES):
                former.unlink(missing_ok=True)
            flush(folder)


def _write(folder: Path, save_id: str) -> Callable[[], None]:
    """Write the mark; return what takes it away again."""
    path = folder / MARK_NAME
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        put_back(folder.parent)
        with suppress(OSError):
            remove_abandoned(folder, of_any_name=True)  # with empty folders of tags
        folder.mkdir(exist_ok=True)
        if dist.get_rank() == 0 and not hold(folder):
            raise SaveError(f"another job is saving into {folder} just now; nothing was written")
        before = (path.read_text(encoding="utf-8"), path.stat().st_mtime) if path.is_file() else None
        mark = mark_of(folder, save_id)
        _put(path, mark.model_dump_json(), mark.seconds)
    except OSError as error:
        raise SaveError(f"{folder} can't be saved, and 'latest' was not moved: {error}") from error

    def undo() -> None:
        if before is None:
            path.unlink()
        else:
            _put(path, *before)

    return undo


def _put(path: Path, text: str, seconds: float) -> None:
    """Write a mark, and give it its time."""
    write_atomically(path, text)
    os.utime(path, (seconds, seconds))


def _has(mark: Path, save_id: str) -> bool:
    try:
        return save_id in mark.read_text(encoding="utf-8")
    except PermissionError:  # no time changes that
        raise
    except (OSError, ValueError):
        return False


def writes(engine: Engine) -> bool:
    """Return whether this rank writes any file (``runtime/engine.py``, ``_configure_checkpointing``)."""
    spread = engine.has_moe_layers or isinstance(engine, PipelineEngine)
    return bool(spread or engine.save_non_zero_checkpoint or engine.save_zero_checkpoint)
