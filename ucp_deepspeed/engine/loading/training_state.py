"""The state of a run beside its tensors: counters, scheduler, hyper-parameters, loss scale."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.optimizers import EngineOptimizer, only_evaluates
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.transfer.planning.numbers import ANEW_HINT, GroupSettings, PartitionNumbers, Settings
from ucp_deepspeed.transfer.planning.pairing import Names, Pair
from ucp_deepspeed.transfer.planning.policies import ANEW_WAY, SCHEDULED, Obstacles, no_schedule

if TYPE_CHECKING:
    from ucp_deepspeed.engine.loading.native import LoadOptions

logger = logging.getLogger("ucp_deepspeed")


def plan_hyperparameters(found: Pair, optimizer: EngineOptimizer, numbers: PartitionNumbers) -> GroupSettings:
    """Give each live parameter group the hyper-parameters of its parameters; see `settings_of_groups`."""
    groups, count = live_groups(found.names, optimizer), len(optimizer.base.param_groups)
    settings = found.settings(groups[:count], optimizer.live_group, optimizer.place_of_steps, numbers)
    alone = (
        f"parameter group {index}: {type(optimizer.base).__name__} has one group for all under ZeRO"
        for index in range(count, len(groups))
    )
    return replace(settings, kept=(*settings.kept, *alone))


def live_groups(names: Names, optimizer: EngineOptimizer) -> list[list[str]]:
    """Return the logical names in each live parameter group."""
    return [[names.target[name] for name in group if name is not None] for group in optimizer.group_names()]


def without_begun_anew(
    settings: GroupSettings, names: Names, optimizer: EngineOptimizer, anew: frozenset[str], reset: bool
) -> GroupSettings:
    """Return the settings without the step counts of groups whose states begin anew: those of the parameters ``anew``, or with
    ``reset`` all."""
    values = list(settings.values)
    for index, (group, taken) in enumerate(zip(live_groups(names, optimizer), settings.values, strict=False)):
        if reset or anew.issuperset(group):
            kept = optimizer.live_group(index).keys() - {GROUP_STEP}
            values[index] = {key: value for key, value in taken.items() if key in kept}
    return replace(settings, values=tuple(values))


def lacks_schedule(engine: Engine, checkpoint: Checkpoint, options: LoadOptions) -> bool:
    """Return whether the engine's scheduler would begin anew, since the checkpoint holds no state of one. Some schedulers keep
    none; a load that takes what matches keeps the rest."""
    scheduler = engine.lr_scheduler
    asked = options.schedule and not options.takes_what_matches and scheduler is not None and not only_evaluates(engine)
    return asked and checkpoint.run.lr_scheduler is None and scheduler.state_dict() is not None


def check_schedule(engine: Engine, checkpoint: Checkpoint, options: LoadOptions, way: str = ANEW_WAY) -> None:
    """Refuse a load that is left to DeepSpeed, which would fail at such a scheduler when it has changed the model.

    Raises:
        MismatchError: the engine has a scheduler, and the checkpoint no state of one.
    """
    if lacks_schedule(engine, checkpoint, options):
        raise MismatchError(no_schedule(checkpoint.path, checkpoint.run.global_steps, way))


def tell_of_schedule(engine: Engine, checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Warn of a schedule that the engine has no scheduler for, as DeepSpeed doesn't."""
    state = checkpoint.run.lr_scheduler
    if (
        state
        and options.schedule
        and engine.lr_scheduler is None
        and not only_evaluates(engine)
        and dist.get_rank() == 0
    ):
        logger.warning(
            "%s holds a schedule of learning rates (%s), and the engine has no scheduler: it isn't restored. A scheduler outside "
            "the engine has to restore itself, or begins anew; one from the DeepSpeed config, or from lr_scheduler=… of "
            "deepspeed.initialize, is restored",
            checkpoint.path,
            ", ".join(sorted(map(str, state))),
        )


def scheduled_keys(scheduler: Any) -> frozenset[str]:
    """Return the keys of parameter groups that a live scheduler sets."""
    parts = (scheduler, *getattr(scheduler, "_schedulers", ()))
    momentum = any(getattr(part, "cycle_momentum", False) for part in parts)
    return SCHEDULED.union(("betas", "momentum") if momentum else ())


def check_scheduler(
    scheduler: Any,
    state: Mapping[str, Any] | None,
    parts: Sequence[Any],
    optimizer: EngineOptimizer,
    obstacles: Obstacles,
) -> None:
    """Look whether a scheduler's numbers are numbers in a saved state. Try on a copy whether it can take over one that has other
    keys than its own: one of another class may have saved it. ``parts`` are objects of the engine that a scheduler may refer to,
    and that aren't copied with it."""
    live = scheduler.state_dict()
    if state is None:
        return
    for key, value in live.items():
        saved = state.get(key)
        if isinstance(value, int | float) and isinstance(saved, str | bytes | list | tuple | dict):
            told = f"the saved learning rate scheduler has {key} = {saved!r:.50}, which is no number"
            obstacles.add(None, f"{told}; {ANEW_HINT}")
            return
    if state.keys() == live.keys():
        return
    groups = SimpleNamespace(param_groups=[dict(group) for group in optimizer.base.param_groups])
    try:
        trial = deepcopy(scheduler, {id(part): groups for part in (*parts, optimizer.base)})
    except Exception:  # a class of the user's own that can't be copied
        return
    try:
        trial.load_state_dict(dict(state))
    except AttributeError:
        return  # the attribute may be one that the optimizer's stand-in lacks
    except Exception as error:
        obstacles.add(
            None,
            f"{type(scheduler).__name__} keeps {sorted(live)}, and can't take over the saved scheduler's {sorted(state)} "
            f"({type(error).__name__}: {error}); {ANEW_HINT}",
        )


def restore_run(
    engine: Engine,
    checkpoint: Checkpoint,
    optimizer: EngineOptimizer,
    options: LoadOptions,
    settings: Settings,
    schedule: Mapping[str, Any] | None,
    reset: bool,
) -> None:
    """Take over counters, scheduler, hyper-parameters and loss scale, as far as the options ask for them. With ``reset`` the
    counts of the optimizer's groups begin anew."""
    run = checkpoint.run
    engine.loaded_checkpoint_dp_world_size = checkpoint.topology.dp
    if options.load_module_only:
        return
    engine.loaded_checkpoint_mp_world_size = checkpoint.topology.model_parallel
    engine.global_steps = run.global_steps
    counted = run.global_samples
    engine.global_samples = counted if counted is not None else int(engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = run.skipped_steps
    if options.load_lr_scheduler_states and engine.lr_scheduler is not None:
        if schedule is not None:
            engine.lr_scheduler.load_state_dict(dict(schedule))
        elif engine.lr_scheduler.state_dict() is not None and dist.get_rank() == 0:
            logger.warning("the checkpoint holds no state of a learning rate scheduler: the live one begins anew")
        if options.load_optimizer_states:  # else the groups' rates stay too, as with DeepSpeed
            _set_scheduled(engine.lr_scheduler, optimizer)
    for live in optimizer.base.param_groups if reset else ():
        live.pop(GROUP_STEP, None)
    for index, values in enumerate(settings[: len(optimizer.base.param_groups)]):  # no settings: none are taken over
        optimizer.set_settings(index, values)
    if options.load_optimizer_states:
        _restore_loss_scale(checkpoint, optimizer)


def restore_data_schedules(engine: Engine, state: Mapping[str, Any]) -> None:
    """Take over DeepSpeed's curriculum sampler and random layer-token dropping.

    Both count samples, steps and tokens of the whole run, so they go on unchanged on any number of ranks.
    """
    loader = engine.training_dataloader
    schedules = {
        "random_ltd": engine.random_ltd_scheduler if engine.random_ltd_enabled() else None,
        "data_sampler": loader.data_sampler if loader is not None and engine.curriculum_learning_enabled() else None,
    }
    for key, live in schedules.items():
        saved = state.get(key)
        if live is not None and saved is not None:
            live.load_state_dict(saved)
        elif live is not None or saved is not None:
            side = "the checkpoint" if saved is None else "the engine"
            logger.warning("%s has no %r, the other side has: the schedule of the data starts anew", side, key)


def _set_scheduled(scheduler: Any, optimizer: EngineOptimizer) -> None:
    """Set the scheduler's rates for its present step, for groups that keep their own hyper-parameters. Loading its state doesn't
    set them, and the next step would use the first rate of all."""
    if getattr(scheduler, "last_batch_iteration", -1) >= 0:  # DeepSpeed's schedulers, some of which cycle momentum too
        scheduler.step(scheduler.last_batch_iteration)
    elif isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        for group, rate in zip(optimizer.base.param_groups, scheduler.get_last_lr(), strict=True):
            if isinstance(group.get("lr"), torch.Tensor):  # on the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _restore_loss_scale(checkpoint: Checkpoint, optimizer: EngineOptimizer) -> None:
    source, live = checkpoint.run.loss_scale, optimizer.loss_scale()
    if live is None:
        return
    if source is None or source.dynamic != live.dynamic:
        logger.warning(
            "the checkpoint holds no loss scale of this kind; keeping the configured one (%s)", live.values["cur_scale"]
        )
        return
    optimizer.set_loss_scale(source.values)
