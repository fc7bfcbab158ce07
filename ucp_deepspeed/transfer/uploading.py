"""Folders in stores to write: made whole on a disk, and then uploaded, what makes a folder a checkpoint last.

A store can rename nothing, and an object appears whole or not at all. So readers find no checkpoint before its last object is
there, and the mark of an unfinished save until then.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from ucp_deepspeed.checkpoint.dcp.metadata import METADATA_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.safetensors_files import WEIGHTS_INDEX_NAME
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.remote import RemotePath
from ucp_deepspeed.transfer.signals import terminated_as_exception, undisturbed

logger = logging.getLogger("ucp_deepspeed")

_LAST = (INDEX_NAME, MANIFEST_NAME, METADATA_NAME, WEIGHTS_INDEX_NAME)
"""Files without which a folder is no checkpoint, or of unknown content."""

_WEIGHTS = ("_model_states.pt", "model.safetensors", "pytorch_model.bin")
"""Ends of the names of files by which a folder without such a file is known."""


@contextmanager
def uploaded_folder(destination: Path, then: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a new folder on a disk to write in, as `commit.committed_folder` does. When the block ends, its files are put under a
    URL; if that fails, what was put there is removed.

    The folder is a temporary one: ``TMPDIR`` says where. It takes as much room as the result.

    Args:
        destination: the `RemotePath` of the folder to make.
        then: called when all is there; no signal that can be caught comes between the two.

    Raises:
        ConfigError: there is such a folder already.
        OSError: the store can't be written. This is found out before anything is yielded, if it is so from the beginning.
    """
    final = cast(RemotePath, destination)
    check_absent(final)
    with terminated_as_exception(), tempfile.TemporaryDirectory(prefix="ucp-upload-") as place:
        folder, mark, put = Path(place) / (final.name or "folder"), final / MARK_NAME, list[RemotePath]()
        folder.mkdir()
        try:
            put.append(mark)
            mark.write_text("")
            yield folder
            for file in _in_order(folder):
                path = final / file.relative_to(folder).as_posix()
                put.append(path)
                path.upload(file)
            with undisturbed():
                mark.unlink()
                then()
        except BaseException:
            with undisturbed():
                for path in reversed(put):
                    with suppress(OSError):
                        path.unlink()
            raise


def check_absent(final: RemotePath) -> None:
    """Check that nothing is under a URL; raise a ConfigError that tells what is."""
    final.parent.refresh(everything=True)
    if not final.exists():
        return
    hint = ""
    if (final / MARK_NAME).exists():
        hint = f". Its {MARK_NAME} tells that it is being written just now, or that a writer was killed: if so, remove the folder"
    raise ConfigError(f"{final} exists already; nothing was written{hint}")


def _in_order(folder: Path) -> list[Path]:
    """Return the files of a folder, those last by which readers know it."""

    def place(path: Path) -> tuple[int, str]:
        return 2 if path.name in _LAST else int(path.name.endswith(_WEIGHTS)), path.relative_to(folder).as_posix()

    return sorted((path for path in folder.rglob("*") if path.is_file()), key=place)
