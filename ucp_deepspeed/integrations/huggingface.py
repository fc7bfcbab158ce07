"""Hugging Face's Trainer: which checkpoint it resumes from, which ones it removes, and when it reads them.

Trainer takes the folder with the highest number for the newest checkpoint, and removes older folders as soon as a save has
returned. Here only whole checkpoints count, and nothing touches what is being written. `huggingface_data` keeps the position in
the data.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ucp_deepspeed.integrations import huggingface_data, huggingface_schedule, is_on
from ucp_deepspeed.integrations.features import Feature
from ucp_deepspeed.integrations.huggingface_preemption import saving_at_signals
from ucp_deepspeed.integrations.huggingface_trainers import (
    STATE_NAME,
    Arguments,
    Keywords,
    Wrapped,
    given,
    is_first,
    trainer_is_on,
)

logger = logging.getLogger("ucp_deepspeed")

RANDOM_NAME = "rng_state*.pth"
PUSHES_FOLDER = "checkpoint", "all_checkpoints"
"""Values of ``hub_strategy`` by which the folder of a checkpoint is uploaded."""

_TRAINING: ContextVar[Any] = ContextVar("ucp_deepspeed_trainer", default=None)
"""The Trainer that trains, if its engine has the block on."""


def wrap(module: ModuleType) -> None:
    """Wrap what ``transformers.trainer`` has of Trainer and of the functions that it calls."""
    wrapped = {
        "resume_from_checkpoint=True and save_total_limit are Trainer's own, and don't ask which checkpoints are whole; with "
        "saves in the background an old one may go before the new one is on disk": _OF_CHECKPOINTS,
        "uploads, save_model(), the best model and the end of train() don't wait for saves in the background": _OF_SAVES,
        "the streams of random numbers are read from Trainer's file for each rank": _OF_STREAMS,
        "the place in the data is Trainer's own, which counts steps of the present batch": huggingface_data.WRAPPERS,
        "a schedule isn't restored if the optimizer has moved out of the DeepSpeed config": huggingface_schedule.WRAPPERS,
    }
    for lost, wrappers in wrapped.items():
        Feature("transformers", "huggingface.md", lost, {module.__name__: wrappers}).arm()


def _in_training() -> Any:
    """Return the Trainer that trains, or None if there is none with the block on."""
    trainer = _TRAINING.get()
    return trainer if trainer is not None and trainer_is_on(trainer) else None


def _train(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    if not trainer_is_on(trainer):
        return wrapped(*args, **kwargs)
    token = _TRAINING.set(trainer)
    try:
        with saving_at_signals(trainer):
            return wrapped(*args, **kwargs)
    finally:
        _TRAINING.reset(token)


def _get_last_checkpoint(wrapped: Wrapped, instance: None, args: Arguments, kwargs: Keywords) -> Any:
    """Return the newest whole checkpoint, the same on all ranks, and say which newer ones were passed over."""
    trainer = _in_training()
    if trainer is None or trainer.args.save_on_each_node:
        return wrapped(*args, **kwargs)
    from ucp_deepspeed.engine.agreement import agreement
    from ucp_deepspeed.engine.saving.background import settle_saves

    folder = Path(given(wrapped, args, kwargs)["folder"])
    settle_saves(folder)
    with agreement(tells=True) as told:
        if is_first():
            told.mine = newest_whole(folder)
    name = told.values[0]
    return wrapped(*args, **kwargs) if name is None else os.path.join(folder, name)  # noqa: PTH118, as Trainer has it


def newest_whole(folder: Path) -> str | None:
    """Return the name of Trainer's newest whole checkpoint in a folder; None if there are no checkpoints.

    Raises:
        CheckpointNotFoundError: none is whole; says why, for each.
    """
    from ucp_deepspeed.errors import CheckpointNotFoundError

    numbers = {int(found[1]): entry for entry in folder.glob("checkpoint-*") if (found := _numbered(entry))}
    passed: list[str] = []
    for _, path in sorted(numbers.items(), reverse=True):
        problem = problem_for_trainer(path)
        if problem is None:
            if passed:
                logger.warning("resuming from %s; newer checkpoints aren't whole: %s", path, "; ".join(passed))
            return path.name
        passed.append(problem)
    if passed:
        raise CheckpointNotFoundError(
            f"no checkpoint of {folder} is whole: {'; '.join(passed)}; give the path of another one as resume_from_checkpoint, "
            "or begin anew without it"
        )
    return None


def _numbered(entry: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", entry.name) if entry.is_dir() else None


def problem_for_trainer(folder: Path) -> str | None:
    """Return why Trainer can't resume from a folder; None if it can."""
    from ucp_deepspeed.checkpoint.whole import problem_of

    if holds_model_only(folder):
        return f"{folder} holds a model without its optimizer (save_only_model)"
    if (problem := problem_of(folder)) is not None:
        return problem
    return None if (folder / STATE_NAME).is_file() else f"{folder} lacks {STATE_NAME}: its save was not finished"


def problem_of_any(folder: Path) -> str | None:
    """Return why a folder of Trainer's isn't whole, where one with a model alone is."""
    return None if holds_model_only(folder) else problem_for_trainer(folder)


def holds_model_only(folder: Path) -> bool:
    """Return whether a folder was saved with ``save_only_model``: then it has Trainer's state, and nothing to go on from."""
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    with_tags = any(entry.startswith(("global_step", ".")) for entry in entries)
    return STATE_NAME in entries and not with_tags and not any(folder.glob(RANDOM_NAME))


def _rotate_checkpoints(wrapped: Wrapped, instance: None, args: Arguments, kwargs: Keywords) -> Any:
    """Rotate as `rotation.rotate` does, once what is being written is on disk."""
    trainer = _in_training()
    told = given(wrapped, args, kwargs)
    most, folder = told["save_total_limit"], Path(told["output_dir"])
    if trainer is None or most is None or most <= 0:
        return wrapped(*args, **kwargs)
    from transformers.trainer_utils import sort_checkpoints

    from ucp_deepspeed.engine.saving.background import when_on_disk
    from ucp_deepspeed.integrations.rotation import rotate

    best = told["best_model_checkpoint"]
    pinned = [] if best is None else [Path(best)]

    def remove_old() -> None:
        ordered = sort_checkpoints(told["output_dir"], told["checkpoint_prefix"], told["use_mtime"])
        remove = partial(shutil.rmtree, ignore_errors=True)
        rotate([Path(each) for each in ordered], most, pinned, remove, problem_of_any)

    # Where each machine has a folder of its own, no rank sees a whole checkpoint.
    action = partial(wrapped, *args, **kwargs) if trainer.args.save_on_each_node else remove_old
    return when_on_disk(folder, action)


def _sort_checkpoints(wrapped: Wrapped, instance: None, args: Arguments, kwargs: Keywords) -> Any:
    """Return the checkpoints that Trainer may remove at the end, when it keeps only the best one."""
    found = wrapped(*args, **kwargs)
    trainer = _in_training()
    best = None if trainer is None else trainer.state.best_model_checkpoint
    if best is None:
        return found
    from ucp_deepspeed.engine.saving.background import is_pending

    kept = [each for each in found if is_pending(Path(each))]
    if not trainer.args.save_on_each_node and problem_of_any(Path(best)) is not None:
        whole = [Path(each) for each in found if problem_of_any(Path(each)) is None]
        kept += [str(each) for each in sorted(whole, key=lambda each: int(each.name.rpartition("-")[2]))[-1:]]
    return [each for each in found if each not in kept]


def _finalize_training(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    if trainer_is_on(trainer):
        _finish(trainer.args.output_dir)
    return wrapped(*args, **kwargs)


def _load(wrapped: Wrapped, instance: None, args: Arguments, kwargs: Keywords) -> Any:
    """Wait for a save in the background before Trainer looks for its tag."""
    told = given(wrapped, args, kwargs)
    if is_on(told["deepspeed_engine"]):
        _finish(told["checkpoint_path"])
    return wrapped(*args, **kwargs)


def _save_model(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Return when a model that the user saves is on disk: without its gathered weights it is a checkpoint of DeepSpeed's."""
    wrapped(*args, **kwargs)
    told = given(wrapped, args, kwargs)
    if not told["_internal_call"] and trainer_is_on(trainer):
        _finish(told["output_dir"] or trainer.args.output_dir)


def _finish_current_push(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    if trainer_is_on(trainer):
        _finish(trainer.args.output_dir)  # Trainer uploads it next
    return wrapped(*args, **kwargs)


def _push_from_checkpoint(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Upload a checkpoint when it is on disk, and never a part of it."""
    folder = Path(given(wrapped, args, kwargs)["checkpoint_folder"])
    strategy = str(getattr(trainer.args.hub_strategy, "value", trainer.args.hub_strategy))
    if strategy in PUSHES_FOLDER and trainer.is_world_process_zero() and trainer_is_on(trainer):
        from ucp_deepspeed.engine.saving.background import pending_below

        pending = pending_below(folder)
        if pending and not all([writing.await_commit() for writing in pending]):
            logger.error("%s isn't uploaded, since its save failed; the next save is uploaded again", folder)
            return None
    return wrapped(*args, **kwargs)


def _load_rng_state(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Let the streams of random numbers go on as the engine's load has set them, and not from a file for each rank, of which a
    larger world lacks some. If ranks lack theirs, none takes one."""
    folder = given(wrapped, args, kwargs)["checkpoint"]
    if folder is None or not trainer_is_on(trainer) or trainer.deepspeed is None:
        return wrapped(*args, **kwargs)
    from ucp_deepspeed.engine.agreement import gathered
    from ucp_deepspeed.engine.random_state import restore_again

    if restore_again(trainer.deepspeed):
        if is_first():
            logger.info("random streams go on as the load has set them, and %s aren't read", RANDOM_NAME)
        return None
    ranks = trainer.args.world_size
    name = "rng_state.pth" if ranks <= 1 else f"rng_state_{trainer.args.process_index}.pth"
    lacking = [rank for rank, there in enumerate(gathered((Path(folder) / name).is_file())) if not there]
    if lacking:
        if is_first():
            logger.warning(
                "random streams stay as the script has seeded them on all ranks: %s has no file of ranks %s, and the load "
                'restored none; save with "universal_checkpoint" on, and leave "random_state" at "restore"',
                folder,
                lacking,
            )
        return None
    return wrapped(*args, **kwargs)


def _finish(folder: str) -> None:
    """Wait for what this rank saves below a folder in the background."""
    from ucp_deepspeed.engine.saving.background import finish_here

    finish_here(Path(folder))


_OF_CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "Trainer.train": _train,
    "get_last_checkpoint": _get_last_checkpoint,
    "rotate_checkpoints": _rotate_checkpoints,
    "sort_checkpoints": _sort_checkpoints,
}
_OF_SAVES: dict[str, Callable[..., Any]] = {
    "Trainer.save_model": _save_model,
    "Trainer._finalize_training": _finalize_training,
    "Trainer._finish_current_push": _finish_current_push,
    "Trainer._push_from_checkpoint": _push_from_checkpoint,
    "deepspeed_load_checkpoint": _load,
}
_OF_STREAMS: dict[str, Callable[..., Any]] = {"Trainer._load_rng_state": _load_rng_state}
