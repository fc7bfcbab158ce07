"""Find the checkpoint that all ranks load, and who loads it: each rank looks for itself, and all decide by what each has seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, resolve_tag
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.one_save import check_one_save, places_of
from ucp_deepspeed.checkpoint.huggingface import is_huggingface
from ucp_deepspeed.checkpoint.opening import LATEST_NAME, warn_of_sums_alone
from ucp_deepspeed.checkpoint.tags import holds_checkpoint
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, home_of
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import check_same, gathered, portable, raise_first
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.loading.native import LoadOptions, files_to_unpickle, look_into, takes_universal_path
from ucp_deepspeed.engine.loading.training_state import check_schedule
from ucp_deepspeed.engine.model import model_parallel_rank
from ucp_deepspeed.engine.node_local import Missing, check_all_here, files_missing, open_here
from ucp_deepspeed.engine.optimizers import engine_optimizer, only_evaluates
from ucp_deepspeed.engine.random_state import RandomState, read_random_state
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    MismatchError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.remote import is_url, located

logger = logging.getLogger("ucp_deepspeed")


@dataclass(frozen=True)
class Found:
    """A rank's find, and at the end the load of all ranks.

    Attributes:
        folder: the tag's folder; None where DeepSpeed is to say that there is none.
        checkpoint: None where DeepSpeed alone may be able to read the files.
        streams: whether random streams are restored too.
        universal: whether this rank can't leave the load to DeepSpeed; at the end, whether any rank can't.
    """

    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    random_state: RandomState | None = None
    universal: bool = False
    streams: bool = False


@dataclass
class _Seen:
    """The report of one rank to all others: the arguments of ``load_checkpoint``, and what became of them up to an error.

    Attributes:
        folder: ``load_dir``; None if it is no path.
        tag: the tag that this rank has found where none is named, as a path below the folder; None if there is none.
        opened: step and folder of the checkpoint that this rank has opened.
    """

    folder: str | None
    named: str | None
    arguments: Mapping[str, Any]
    tag: str | None = None
    opened: tuple[int, str] | None = None
    universal: bool = False
    missing: Missing | None = None
    error: UniversalCheckpointError | None = None


def find(engine: Engine, load_dir: str, named: object, options: LoadOptions) -> tuple[Found, str | None]:
    """Agree on what all ranks load, and who loads it. Collective, in one round; a rank for which ``latest`` named another tag
    than for the first one opens that one, and then there's another round.

    Args:
        named: the tag that the script names.

    Returns:
        What this rank loads, and its tag: with none named it is the first rank's, since ``latest`` may move while ranks read it.

    Raises:
        ConfigError: ranks give different arguments or name different tags; or different folders, and one of them has nothing.
        MismatchError: they see different checkpoints; or this machine's disks lack files that a universal load needs.
        UniversalCheckpointError: a rank couldn't find or open it; see `open_checkpoint`.
    """

    def look(tag: str | None) -> tuple[Found, Exception | None, list[_Seen]]:
        seen = _Seen(
            str(load_dir) if isinstance(load_dir, str | PathLike) else None,
            None if named is None else str(named),
            options.arguments() | {"custom_load_fn": options.custom_load_fn is not None},
        )
        found, error = _look(engine, load_dir, tag, options, seen)
        return found, error, gathered(seen)

    tag = None if named is None else str(named)
    found, error, seen = look(tag)
    check_same("load_checkpoint", [each.arguments for each in seen])
    if len({each.named for each in seen}) > 1:
        tags = _by_rank([each.named for each in seen])
        raise ConfigError(f"ranks load different tags from {load_dir}: {tags}; name the same on all, or none")
    if tag is None and not any(each.error is not None and each.tag is None for each in seen):
        tag = next((each.tag for each in seen if each.tag is not None), None)
        if any(each.tag != tag for each in seen):
            found, error, seen = look(tag)
    _check_folders(seen)
    raise_first(error, enumerate(each.error for each in seen))
    opened = [each.opened for each in seen]
    if len({each[0] for each in opened if each is not None}) > 1:  # folders may differ: they may be a machine's own
        ranks = _by_rank([each and f"step {each[0]} in {each[1]}" for each in opened])
        raise MismatchError(
            f"ranks opened different checkpoints: {ranks}; name the same tag=… on all ranks, in a folder that all see"
        )
    universal = any(each.universal for each in seen)  # a pipeline's stages may have changed on some ranks only
    if universal:
        if None in opened:
            raise CheckpointNotFoundError(
                f"some ranks see no checkpoint at {load_dir}, and others do; put it on a disk that all share"
            )
        check_all_here([each.missing for each in seen])
    return replace(found, universal=universal), tag


def _look(
    engine: Engine, load_dir: str, tag: str | None, options: LoadOptions, seen: _Seen
) -> tuple[Found, Exception | None]:
    """Find and open a checkpoint, and note what the others have to know. An error is returned: they have to know of it too."""
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    found = Found()
    try:
        streams = config.random_state == "restore" and config.load != "never"
        streams = streams and not options.load_module_only and not only_evaluates(engine)
        folder = _find(located(load_dir), tag, config.load)
        if (
            folder is not None
            and tag is None
            and _has_weights_alone(folder)
            and not _begins_with_weights(config, options)
        ):
            if dist.get_rank() == 0:
                logger.warning(
                    "%s holds weights of Hugging Face's libraries and no checkpoint: nothing is loaded, as with DeepSpeed alone; "
                    'to begin with these weights, set "optimizer_states": "reset" and "scheduler": "keep" in the block',
                    folder,
                )
            folder = None
        found = Found(folder, streams=streams)
        if folder is None:
            return found, None
        if tag is None:
            seen.tag = str(home_of(folder).relative_to(load_dir))
        checkpoint = _opened(engine, folder, config)
        if checkpoint is not None:
            if dist.get_rank() == 0 and config.verify == "pieces":
                warn_of_sums_alone(checkpoint)
            _check_one_save(engine, checkpoint)
            random_state = read_random_state(engine, checkpoint) if streams else None
            seen.opened, seen.missing = (checkpoint.run.global_steps, str(checkpoint.path)), files_missing(checkpoint)
            seen.universal = takes_universal_path(config, engine, checkpoint, engine_optimizer(engine), options)
            if not seen.universal:
                check_schedule(engine, checkpoint, options)
            found = Found(folder, checkpoint, random_state, seen.universal, streams)
    except Exception as error:
        seen.error = portable(error)
        return found, error
    return found, None


def _has_weights_alone(folder: Path) -> bool:
    return is_huggingface(folder) and not holds_checkpoint(folder)


def _begins_with_weights(config: UniversalCheckpointConfig, options: LoadOptions) -> bool:
    """Return whether a load may do without an optimizer's state. A script may load from any folder at its first start."""
    return (
        config.has_policies or config.load == "always" or options.load_module_only or not options.load_optimizer_states
    )


def _check_one_save(engine: Engine, checkpoint: Checkpoint) -> None:
    """Compare this rank's share of the optimizer's files with the weights beside them: its own ones if the topology stays."""
    if isinstance(checkpoint, DeepSpeedCheckpoint):
        group = engine.seq_data_parallel_group
        own = model_parallel_rank(engine) * dist.get_world_size(group=group) + dist.get_rank(group=group)
        check_one_save(checkpoint, places_of(checkpoint)[own :: dist.get_world_size()])


def _check_folders(seen: Sequence[_Seen]) -> None:
    """Refuse a rank's own folder if no checkpoint is there. Else folders may differ: they may be machines' own, or links."""
    folders = [each.folder for each in seen]
    lost = next((each for each in seen if each.folder is None or isinstance(each.error, CheckpointNotFoundError)), None)
    if lost is not None and len(set(folders)) > 1:
        rank, other = seen.index(lost), next(rank for rank, folder in enumerate(folders) if folder != lost.folder)
        told = f"load_dir is {folders[other]} on rank {other}, and {lost.folder} on rank {rank}: {lost.error}"
        kind = ConfigError if lost.folder is None else CheckpointNotFoundError
        raise kind(f"{told}; name the same folder on all ranks, or one on each that holds the checkpoint")


def _by_rank(values: Sequence[Any]) -> str:
    """List the different values, each with the first rank that has it."""
    first = {value: rank for rank, value in reversed(list(enumerate(values)))}
    return ", ".join(f"{value} on rank {rank}" for value, rank in sorted(first.items(), key=lambda item: item[1]))


def _find(load_dir: Path, tag: str | None, load: str) -> Path | None:
    """Return the tag folder. None leaves the load to DeepSpeed, which has its own message for a folder in which no tag was
    saved."""
    if load == "never" and is_url(load_dir):
        raise ConfigError(f'{load_dir} is a URL, which DeepSpeed itself can\'t load, and "load" is "never"')
    try:
        folder = resolve_tag(load_dir, tag)
    except CheckpointNotFoundError:
        if load == "never" or (tag is None and not (load_dir / LATEST_NAME).is_file()):
            return None
        raise
    if load != "never":
        return folder
    if (folder / INDEX_NAME).is_file():
        raise ConfigError(f'{folder} is a universal checkpoint, and "load" is "never"')
    return None


def _opened(engine: Engine, folder: Path, config: UniversalCheckpointConfig) -> Checkpoint | None:
    """Return the catalog; None where this release can't read the files, which hold nothing but data, and DeepSpeed may be able
    to."""
    try:
        return open_here(engine, folder)
    except UnsupportedError as error:
        asked = config.load == "always" or config.has_policies
        if asked or is_url(folder) or isinstance(error, FormatError) or (folder / INDEX_NAME).is_file():
            raise
        for path in files_to_unpickle(folder, [entry.name for entry in folder.iterdir()], engine):
            look_into(path, None)
        if dist.get_rank() == 0:
            logger.warning(
                "the load, random streams included, is left to DeepSpeed, and works at most on the topology that saved: %s",
                error,
            )
        return None
