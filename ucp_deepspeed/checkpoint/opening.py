"""Opening: a path becomes a catalog."""

from __future__ import annotations

import errno
import logging
import time
from contextlib import suppress
from pathlib import Path

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.bounds import read_bounded
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME
from ucp_deepspeed.checkpoint.dcp.catalog import DcpCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.consolidated import ConsolidatedCheckpoint, is_consolidated
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_model_states
from ucp_deepspeed.checkpoint.huggingface import HuggingFaceCheckpoint, is_huggingface
from ucp_deepspeed.checkpoint.tags import holds_checkpoint, is_dcp, is_marked, tags_in, unfinished
from ucp_deepspeed.checkpoint.torch_dist.catalog import TorchDistCheckpoint, is_torch_dist
from ucp_deepspeed.checkpoint.universal.index import (
    INDEX_NAME,
    PARTIAL_MARK,
    REPLACED_MARK,
    UniversalCheckpoint,
    home_of,
    is_unfinished,
)
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError, FormatError
from ucp_deepspeed.remote import RemotePath, located

logger = logging.getLogger("ucp_deepspeed")

LATEST_NAME = "latest"
UNIVERSAL_LATEST_NAME = "latest_universal"
"""File in which DeepSpeed's ds_to_universal names its folder."""

MEGATRON_LATEST_NAME = "latest_checkpointed_iteration.txt"
"""File in which Megatron-LM keeps the number of the last iteration (``megatron/training/checkpointing.py``)."""

LONGEST_LATEST = 1 << 20
"""Most bytes of the file ``latest``: many times those of the longest path."""

LONGEST_SHOWN = 100
"""Most characters of a tag's name that a message repeats. The file ``latest`` may hold anything."""

NO_MODEL_STATES = "no model_states file"

UNFINISHED = "is what an interrupted conversion, or save in the background, left behind; convert again, or save again"


def resolve_tag(path: str | Path, tag: str | None = None) -> Path:
    """Return the tag folder that a path means. After a save that was killed between two renames, return the old content's folder.

    Args:
        path: a tag folder, or a folder with tag folders in it.
        tag: name of the tag, which may lead out of the folder. Without it: ``path`` itself if it is a tag folder, else the tag in
            its ``latest`` file, or in Megatron-LM's, which may not lead out of the folder.

    Raises:
        CheckpointNotFoundError: there is no such folder, tag or ``latest`` file; lists the tags that there are.
        DamagedCheckpointError: the checkpoint there was never finished.
    """
    root = located(path)
    if isinstance(root, RemotePath):  # mypy sees a Path
        root.refresh(everything=True)
    if not root.is_dir():
        hint = f": it is a file; name its folder, {root.parent}" if root.is_file() else ""
        raise CheckpointNotFoundError(f"no checkpoint folder at {root}{hint}")
    if is_unfinished(root):
        raise DamagedCheckpointError(f"{root} {UNFINISHED}")
    if tag is None and holds_checkpoint(root):
        return root
    if tag is None and is_marked(root):
        raise unfinished(root, NO_MODEL_STATES)
    strays, named = False, ""
    if tag is None:
        latest = root / LATEST_NAME
        if not latest.is_file() and (root / UNIVERSAL_LATEST_NAME).is_file():
            latest = root / UNIVERSAL_LATEST_NAME
        if not latest.is_file() and (root / MEGATRON_LATEST_NAME).is_file():
            latest = root / MEGATRON_LATEST_NAME
        if not latest.is_file() and is_huggingface(root) and not _has_saves(root):
            return root
        if not latest.is_file():
            lacking = "it holds neither checkpoint files nor a 'latest' file"
            raise CheckpointNotFoundError(f"{root} is not a checkpoint: {lacking}{_there(root)}")
        tag = read_latest(latest)
        tag = f"iter_{int(tag):07d}" if latest.name == MEGATRON_LATEST_NAME and tag.isdecimal() else tag
        strays, named = Path(tag).is_absolute() or ".." in Path(tag).parts, f", which {latest} names"
    folder = root / tag
    if isinstance(folder, RemotePath):
        folder.refresh()
    found = folder if _is_folder(folder) else _lies_aside(folder)
    if (
        strays or found is None or (found == root and not (holds_checkpoint(root) or is_huggingface(root)))
    ):  # "" and "." name the folder itself
        shown = tag if len(tag) <= LONGEST_SHOWN else f"{tag[:LONGEST_SHOWN]}…"
        raise CheckpointNotFoundError(f"no tag {shown!r} in {root}{named}{_there(root)}")
    return found


TRAINER_NAME = "trainer_state.json"
"""File in each checkpoint of transformers' Trainer, which has weights beside DeepSpeed's files, or in their place."""


def _has_saves(root: Path) -> bool:
    """Return whether a folder holds saves of a run, also unfinished ones, or is a checkpoint of Trainer's."""
    folders = [entry for entry in root.iterdir() if entry.is_dir()]
    saves = any(is_unfinished(entry) or holds_checkpoint(entry) or is_marked(entry) for entry in folders)
    return saves or (root / TRAINER_NAME).is_file()


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder's; a name that can't be is none.

    Raises:
        OSError: nobody may look, or the disk fails.
    """
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            return False
        raise


def interrupted(root: Path) -> dict[Path, Path]:
    """Return folders that a killed save was replacing → where each lies now, whole (`REPLACED_MARK`)."""
    hidden = [entry for entry in root.glob(f".*{PARTIAL_MARK}*{REPLACED_MARK}") if not home_of(entry).exists()]
    return {home_of(entry): entry for entry in sorted(hidden, key=lambda entry: entry.stat().st_mtime)}


def _lies_aside(folder: Path) -> Path | None:
    """Return where the content of a missing folder lies; None if it is nowhere."""
    if _is_folder(folder.parent) and folder in interrupted(folder.parent):
        time.sleep(tunables.REPLACING_SECONDS)  # a save may be about to put the new one in its place
        return folder if folder.is_dir() else interrupted(folder.parent).get(folder)
    return None


def read_latest(latest: Path) -> str:
    """Return the tag that a file names.

    Raises:
        DamagedCheckpointError: it names none.
    """
    try:
        tag = read_bounded(latest, LONGEST_LATEST).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        problem = f"{latest} holds no tag's name in UTF-8 ({error}); write it so, or name the tag"
        raise DamagedCheckpointError(f"{problem}{_there(latest.parent)}") from error
    if not tag:
        raise DamagedCheckpointError(f"{latest} is empty; name the tag{_there(latest.parent)}")
    return tag


def open_checkpoint(path: str | Path, tag: str | None = None, verify: bool = True) -> Checkpoint:
    """Open the catalog of a checkpoint of any form; see `resolve_tag`.

    Args:
        verify: whether what is read is compared with the save's checksums, if there are any.

    Raises:
        CheckpointNotFoundError: there is nothing.
        DamagedCheckpointError: files are missing, truncated or inconsistent.
        FormatError: a form that this release can't read.
        UnsupportedError: DeepSpeed's files that this release can't read, but DeepSpeed by itself may.
    """
    try:
        return _open(path, tag, verify)
    except OSError as error:  # such as a folder that may not be read
        place = path if error.filename is None else error.filename
        raise DamagedCheckpointError(f"{place} can't be read: {error.strerror or error}") from error


def _open(path: str | Path, tag: str | None, verify: bool) -> Checkpoint:
    folder = resolve_tag(path, tag)
    if is_unfinished(folder):
        raise DamagedCheckpointError(f"{folder} {UNFINISHED}")
    native = next((path for path in folder.glob("*_model_states.pt") if is_model_states(path.name)), None)
    if (folder / INDEX_NAME).is_file():
        if native is not None:
            raise DamagedCheckpointError(
                f"{folder} holds two checkpoints, a universal one ({INDEX_NAME}) and one of DeepSpeed's ({native.name}, …): "
                f"move one of them to another folder"
            )
        return UniversalCheckpoint(folder, verify)
    if native is not None and is_consolidated(folder):
        return ConsolidatedCheckpoint(folder, verify)
    if native is not None:
        return DeepSpeedCheckpoint(folder, verify=verify)
    if is_dcp(folder):
        if is_torch_dist(folder):
            return TorchDistCheckpoint(folder)
        return DcpCheckpoint(folder)
    if is_huggingface(folder):
        return HuggingFaceCheckpoint(folder)
    if is_marked(folder):
        raise unfinished(folder, NO_MODEL_STATES)
    if any(folder.glob("layer_*-model_states.pt")):
        what = "a pipeline checkpoint without model_states files"
        raise FormatError(f"{folder} is {what}, which this release can't read")
    raise DamagedCheckpointError(f"{folder} holds {NO_MODEL_STATES} and no universal index")


def warn_of_sums_alone(checkpoint: Checkpoint) -> None:
    """Warn of checksums without a manifest, which would tell that they are of this save: nothing is compared with them."""
    if not isinstance(checkpoint, DeepSpeedCheckpoint) or checkpoint.manifest is not None or is_marked(checkpoint.path):
        return
    if (checkpoint.path / CHECKSUMS_NAME).exists():
        logger.warning(
            "%s is there, and no %s: nothing is compared with these checksums. If the folder was copied, copy %s too; if "
            "DeepSpeed alone has saved the tag since, remove the checksums",
            *(checkpoint.path / CHECKSUMS_NAME, MANIFEST_NAME, MANIFEST_NAME),
        )


def _there(root: Path) -> str:
    """Return the end of a message about a missing tag: the tags or runs in the folder."""
    if tags := tags_in(root):
        return f"; tags there: {', '.join(tags)}"
    runs: list[str] = []
    with suppress(OSError):  # a folder that can't be read is no run
        runs = sorted(entry.name for entry in root.iterdir() if (entry / LATEST_NAME).is_file())
    return f"; runs there: {', '.join(runs)}; name the folder of one" if runs else "; no tag folders there"
