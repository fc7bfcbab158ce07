"""Engines that save on their machines' own disks (DeepSpeed's ``use_node_local_storage``): each rank sees some of the files."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.one_machine import NodeLocalFiles
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.remote import is_url


def writes_for_node(engine: Engine) -> bool:
    """Return whether this rank writes what belongs to a folder as a whole: the first of all ranks, or on each machine's own disks
    its first."""
    return dist.get_rank() == 0 or bool(engine.use_node_local_storage() and engine.local_rank == 0)


def open_here(engine: Engine, folder: Path) -> Checkpoint:
    """Open the catalog of a checkpoint, checked as the config says; see `open_checkpoint`. On machines' own disks it holds as
    much as this machine has."""
    verify = engine.universal_checkpoint_config.verify == "pieces"
    if not engine.use_node_local_storage() or is_url(folder) or (folder / INDEX_NAME).is_file():
        return open_checkpoint(folder, verify=verify)
    return DeepSpeedCheckpoint(folder, NodeLocalFiles(folder, verify))


Missing = tuple[str, str, tuple[str, ...]]
"""A machine, a folder on its disks, and the files that aren't there."""


def files_missing(checkpoint: Checkpoint) -> Missing | None:
    """Return the files of a checkpoint that this machine's own disks lack; None if it sees all of them."""
    files = checkpoint.files if isinstance(checkpoint, DeepSpeedCheckpoint) else None
    missing = files.missing if isinstance(files, NodeLocalFiles) else ()
    return (socket.gethostname(), str(checkpoint.path), missing) if missing else None


def check_all_here(of_ranks: Sequence[Missing | None]) -> None:
    """Check that each rank sees all files, as it must to read from them on another topology.

    Raises:
        MismatchError: some are missing; says which and where.
    """
    if lacking := dict.fromkeys(missing for missing in of_ranks if missing is not None):
        raise MismatchError(
            "the checkpoint lies on machines' own disks (use_node_local_storage), from which only the topology that saved it "
            "goes on; for any other copy the files of all machines into each of these folders, or into one that every rank sees",
            [f"{host}: {path} lacks {', '.join(names)}" for host, path, names in lacking],
        )
