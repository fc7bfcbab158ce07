"""Trainer's own schedule of learning rates, after the optimizer has moved out of the DeepSpeed config.

With an optimizer in the config the engine saves the schedule, and Trainer writes no file of it. Without one Trainer looks for its
file alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ucp_deepspeed.integrations.huggingface_trainers import (
    Arguments,
    Keywords,
    Wrapped,
    given,
    is_first,
    trainer_is_on,
)

logger = logging.getLogger("ucp_deepspeed")

SCHEDULE_NAME = "scheduler.pt"
"""Name of the file with the state of Trainer's own scheduler."""


def _load_optimizer_and_scheduler(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Take the schedule from the engine's checkpoint if Trainer's file of it isn't there. Collective."""
    folder = given(wrapped, args, kwargs)["checkpoint"]
    engine = getattr(trainer, "deepspeed", None)
    if folder is None or engine is None or not trainer_is_on(trainer) or _is_engines(trainer.lr_scheduler):
        return wrapped(*args, **kwargs)
    from ucp_deepspeed.engine.agreement import agreement

    keeps = engine.universal_checkpoint_config.scheduler == "keep"
    with agreement(tells=True) as told:
        if is_first() and not (Path(folder) / SCHEDULE_NAME).is_file():
            told.mine = {} if keeps else saved_schedule(Path(folder), trainer.lr_scheduler)
    state = told.values[0]
    if state is None:
        return wrapped(*args, **kwargs)
    if is_first():
        logger.info(
            "%s has no %s, since the engine saved the schedule: Trainer's own scheduler %s",
            *(folder, SCHEDULE_NAME, 'begins anew, as "scheduler": "keep" says' if keeps else "goes on with that one"),
        )
    if not keeps:
        trainer.lr_scheduler.load_state_dict(state)
    return None


def _is_engines(scheduler: Any) -> bool:
    from accelerate.utils import DeepSpeedSchedulerWrapper

    return isinstance(scheduler, DeepSpeedSchedulerWrapper)


def saved_schedule(folder: Path, scheduler: Any) -> dict[str, Any]:
    """Return the schedule that an engine has saved, for another scheduler of its kind.

    Raises:
        MismatchError: there is none, or the scheduler's state has other keys.
    """
    from ucp_deepspeed.checkpoint import open_checkpoint
    from ucp_deepspeed.errors import MismatchError

    saved, live = open_checkpoint(folder).run.lr_scheduler, scheduler.state_dict()
    if saved is not None and saved.keys() == live.keys():
        alike = [key for key, value in saved.items() if _of_other_groups(value, live[key])]
        if all(each == saved[key][0] for key in alike for each in saved[key]):
            return {**saved, **{key: saved[key][:1] * len(live[key]) for key in alike}}
    held = "none" if saved is None else f"one with {', '.join(sorted(map(str, saved)))}"
    raise MismatchError(
        f"{folder} has no {SCHEDULE_NAME}: the optimizer or the scheduler was in the DeepSpeed config when it was saved, and "
        f"Trainer makes a {type(scheduler).__name__} of its own now, with {', '.join(sorted(live))}; the engine's checkpoint "
        f"holds {held}; put both back into the DeepSpeed config; or let the schedule begin anew with "
        f'"scheduler": "keep" in "universal_checkpoint"'
    )


def _of_other_groups(saved: Any, live: Any) -> bool:
    """Return whether both are lists with a value for each group of parameters, and the groups are others now. Trainer's own
    optimizer has two, one without weight decay."""
    return isinstance(saved, list) and isinstance(live, list) and bool(saved) and len(saved) != len(live)


WRAPPERS: dict[str, Callable[..., Any]] = {"Trainer._load_optimizer_and_scheduler": _load_optimizer_and_scheduler}
