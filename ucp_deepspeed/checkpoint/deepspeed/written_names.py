"""Names of files, and those under which torch wrote them: an archive holds its own, which tells exchanged files of ranks."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ucp_deepspeed.checkpoint.deepspeed.manifest import digest_of
from ucp_deepspeed.checkpoint.expert_names import optimizer_file, weight_file
from ucp_deepspeed.errors import DamagedCheckpointError

VALUES_KEY = "ucp_optimizer_only"
"""Key under which saving adds to a model_states file the parameters that the optimizer has and no module, by name."""

TOLD_KEY = "ucp_told"
"""Key under which this package adds to DeepSpeed's universal folders what these have no place for (`consolidated.Told`)."""

logger = logging.getLogger("ucp_deepspeed")

RANKS_FILE = re.compile(r"(?:(?:bf16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
"""Files that each model-parallel rank has. The groups are its partition, if any, its number, and the kind of file."""

_LAYER_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")

_MODEL_STATES = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")
"""Files that hold a client state besides DeepSpeed's own data."""

zero_file = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt").fullmatch
"""Match the name of a partition's optimizer file; the first group is its prefix."""

LONGEST_NAME = 255
"""Bytes of a file's name, on any file system."""


def model_states_name(rank: int, partition: int | None = None) -> str:
    """Return the name of a model-parallel rank's model_states file; with ZeRO-3, of one of its partitions."""
    prefix = "" if partition is None else f"zero_pp_rank_{partition}_"
    return f"{prefix}mp_rank_{rank:02d}_model_states.pt"


def optimizer_name(rank: int, partition: int, prefix: str) -> str:
    """Return the name of the optimizer's file of one partition of a model-parallel rank. DeepSpeed uses two prefixes."""
    return f"{prefix}zero_pp_rank_{partition}_mp_rank_{rank:02d}_optim_states.pt"


def optimizer_prefix(precision: str) -> str:
    """Return the prefix of these names: since 0.6.2 bf16 has one of its own."""
    return "bf16_" if precision == "bf16" else ""


def layer_file(file_name: str) -> tuple[int, int] | None:
    """Return layer and tensor-parallel rank of a layer file; None for any other file."""
    found = _LAYER_FILE.fullmatch(file_name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def is_further(name: str) -> bool:
    """Return whether a file is one that the topology doesn't tell: of a layer, an expert, or an optimizer of experts."""
    return bool(layer_file(name) or weight_file(name) or optimizer_file(name))


def is_model_states(name: str) -> bool:
    """Return whether this is DeepSpeed's name of a model_states file. File managers and people leave others beside it."""
    return _MODEL_STATES.fullmatch(name) is not None


def is_deepspeeds(name: str) -> bool:
    """Return whether DeepSpeed's engines name a file so (``runtime/engine.py``, ``runtime/pipe/module.py``)."""
    kinds = (is_model_states, zero_file, layer_file, weight_file, optimizer_file)
    return any(is_kind(name) for is_kind in kinds)


def check_written_name(path: Path) -> None:
    """Refuse the file of another rank, by the name under which torch wrote it.

    A copy of another rank's model_states, as some scripts make where these are equal, is accepted beside the original.

    Raises:
        DamagedCheckpointError: it was written for another rank.
    """
    own, name = RANKS_FILE.fullmatch(path.name), written_name(path)
    if name is not None and own is None:
        _check_exchanged(path, name)
    written = RANKS_FILE.fullmatch(name) if name is not None else None
    if own is None or written is None or written[3] != own[3] or _place(own) == _place(written):
        return
    original = path.with_name(written[0])
    if own[3] == "model" and (not original.is_file() or digest_of(original) == digest_of(path)):
        return
    raise DamagedCheckpointError(
        f"{path} was written as {written[0]}: files of two ranks were exchanged, or one was copied over "
        f"the other. Give each its own name again, or restore them from a copy"
    )


def _check_exchanged(path: Path, name: str) -> None:
    """Refuse the file of another layer or expert, if the two were exchanged. People rename and copy layers; then it is told."""
    if name == path.name or not any(
        kind(path.name) and kind(name) for kind in (layer_file, weight_file, optimizer_file)
    ):
        return
    other = path.with_name(name)
    if not other.is_file():
        return
    if digest_of(other) == digest_of(path):
        logger.warning("%s was written as %s, which is here too: it is a copy of another layer or expert", path, name)
        return
    if written_name(other) == path.name:
        raise DamagedCheckpointError(
            f"{path} and {name} were exchanged, by the names under which they were written; give each its own name again. If it "
            f'is meant to be so, "load": "never" leaves the load to DeepSpeed'
        )
    logger.warning("%s was written as %s: it may be the file of another layer or expert", path, name)


def _place(found: re.Match[str]) -> tuple[int, int]:
    return int(found[1] or 0), int(found[2])


def written_name(path: Path) -> str | None:
    """Return the name that a file had when torch wrote it; None if it isn't an archive, or was written under no name."""
    with path.open("rb") as file:
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            return None
        record = file.read(min(int.from_bytes(header[26:28], "little"), LONGEST_NAME))
    return f"{record.decode('utf-8', errors='replace').partition('/')[0]}.pt"
