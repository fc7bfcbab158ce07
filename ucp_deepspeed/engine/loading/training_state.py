"""The state of a run beside its tensors: counters, scheduler, hyper-parameters, loss scale."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.loading.pairing import Names
from ucp_deepspeed.engine.optimizers import EngineOptimizer
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.transfer.planning.group_settings import GroupSettings, Settings, settings_of_groups
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers

if TYPE_CHECKING:
    from ucp_deepspeed.engine.loading.native import LoadOptions

logger = logging.getLogger("ucp_deepspeed")


def plan_hyperparameters(
    checkpoint: Checkpoint, names: Names, optimizer: EngineOptimizer, numbers: PartitionNumbers, keep: bool
) -> GroupSettings:
    """Give each live parameter group the hyper-parameters of its parameters; see `settings_of_groups`.

    Args:
        numbers: gives the groups' values of numbers that differ over partitions.
        keep: whether the groups keep what was configured; their counts are restored even so.

    Raises:
        MismatchError: the parameters of a live group come from groups with different values; lists groups and keys.
    """
    source = {names.source[name]: group for group in checkpoint.groups for name in group.names}
    groups = [[names.target[name] for name in group if name is not None] for group in optimizer.group_names()]
    count = len(optimizer.base.param_groups)
    settings = settings_of_groups(source, groups[:count], optimizer.live_group, numbers, keep)
    if settings.problems:
        raise MismatchError(f"{checkpoint.path} and the engine group parameters differently", settings.problems)
    alone = (
        f"parameter group {index}: {type(optimizer.base).__name__} has one group for all under ZeRO"
        for index in range(count, len(groups))
    )
    return replace(settings, kept=(*settings.kept, *alone))


def without_begun_anew(
    settings: GroupSettings, names: Names, optimizer: EngineOptimizer, anew: Collection[str], reset: bool
) -> GroupSettings:
    """Return the settings without the step counts of groups whose states begin anew.

    Args:
        anew: logical names of parameters whose states begin anew.
        reset: whether the states of all parameters do.
    """
    values: list[Mapping[str, Any]] = []
    for index, (group, taken) in enumerate(zip(optimizer.group_names(), settings.values, strict=False)):
        live = optimizer.live_group(index)
        if reset or all(names.target[name] in anew for name in group if name is not None):
            taken = {key: value for key, value in taken.items() if key in live and key != GROUP_STEP}
        values.append(taken)
    return replace(settings, values=tuple(values))


PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Values that torch's schedulers keep for each parameter group, in the optimizer's order (``torch/optim/lr_scheduler.py``)."""


OF_ALL_GROUPS = ("_milestones", "milestones", "_schedule_phases")
"""Lists that belong to a scheduler's whole schedule, even if they are as long as there are groups."""


def plan_scheduler(
    checkpoint: Checkpoint, names: Names, optimizer: EngineOptimizer, live: Mapping[str, Any], keep: bool
) -> Mapping[str, Any] | None:
    """Return the scheduler's state, with its values for each group in the order of the live groups.

    Args:
        live: the live scheduler's state; its values stay for groups without parameters in the checkpoint.
        keep: whether all groups keep their configured hyper-parameters: the schedule then goes on from these.

    Raises:
        MismatchError: groups are joined for which the scheduler keeps different values, or an unknown name holds as many values
            as there are groups.
    """
    state = checkpoint.run.lr_scheduler
    group_of = {names.source[name]: index for index, group in enumerate(checkpoint.groups) for name in group.names}
    sources = [
        sorted(
            {group_of[logical] for name in group if name is not None and (logical := names.target[name]) in group_of}
        )
        for group in optimizer.group_names()
    ]
    if state is not None and sources != [[index] for index in range(len(checkpoint.groups))]:
        problems: list[str] = []
        state = _regrouped(state, live, sources, len(checkpoint.groups), "", problems)
        if problems:
            heading = f"{checkpoint.path} and the engine group parameters differently; the scheduler's state"
            raise MismatchError(heading, problems, "load_lr_scheduler_states=False starts the schedule anew")
    return _from_configured(state, live) if state is not None and keep else state


def check_scheduler(
    scheduler: Any, state: Mapping[str, Any] | None, parts: Sequence[Any], optimizer: EngineOptimizer
) -> None:
    """Try on a copy whether a scheduler can take over a state that has other keys than its own.

    Args:
        parts: objects of the engine that a scheduler may refer to, and that aren't copied with it.

    Raises:
        MismatchError: it can't: a scheduler of another class has saved the state.
    """
    live = scheduler.state_dict()
    if state is None or state.keys() == live.keys():
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
        raise MismatchError(
            f"{type(scheduler).__name__} keeps {sorted(live)}, and can't take over the saved scheduler's {sorted(state)} "
            f"({type(error).__name__}: {error}); load_lr_scheduler_states=False starts the schedule anew"
        ) from error


def _from_configured(state: Mapping[str, Any], live: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state that a schedule begun at the saved rates would have had it begun at the live ones (torch's, which know
    ``base_lrs``)."""
    began, now = state.get("base_lrs"), live.get("base_lrs")
    if not (isinstance(began, list) and isinstance(now, list) and len(began) == len(now)):
        return state
    last = state.get("_last_lr", began)
    scaled = [rate * new / old if old else rate for rate, old, new in zip(last, began, now, strict=True)]
    return {**state, **{key: live[key] for key in PER_GROUP if key in live}, "_last_lr": scaled}


def _regrouped(
    state: Mapping[str, Any], live: Any, sources: list[list[int]], count: int, place: str, problems: list[str]
) -> dict[str, Any]:
    found = dict(state)
    for key, value in state.items():
        other = live.get(key) if isinstance(live, Mapping) else None
        if isinstance(value, (list, tuple)) and key == "_schedulers":
            parts = other if isinstance(other, (list, tuple)) and len(other) == len(value) else [None] * len(value)
            found[key] = [
                _regrouped(one, mine, sources, count, f"{place}{key}.", problems)
                for one, mine in zip(value, parts, strict=True)
            ]
        elif isinstance(value, (list, tuple)) and len(value) == count and key in PER_GROUP:
            found[key] = [_of_group(value, other, held, i, f"{place}{key}", problems) for i, held in enumerate(sources)]
        elif (
            isinstance(value, (list, tuple))
            and len(value) == count > 1
            and key not in OF_ALL_GROUPS
            and not same_value(value, other)
        ):
            problems.append(
                f"{place}{key}: {value} may be of the groups, in an order that isn't the engine's; "
                f"load_lr_scheduler_states=False starts the schedule anew"
            )
    return found


def _of_group(value: Any, live: Any, held: list[int], index: int, place: str, problems: list[str]) -> Any:
    if not held:
        return live[index] if isinstance(live, (list, tuple)) and index < len(live) else value[0]
    if not all(same_value(value[other], value[held[0]]) for other in held):
        problems.append(f"{place}: parameter group {index} joins groups with {[value[other] for other in held]}")
    return value[held[0]]


def restore_run(
    engine: Engine,
    checkpoint: Checkpoint,
    optimizer: EngineOptimizer,
    options: LoadOptions,
    settings: Settings,
    schedule: Mapping[str, Any] | None,
    reset: bool,
) -> None:
    """Take over counters, scheduler, hyper-parameters and loss scale, as far as the options ask for them.

    Args:
        reset: whether all states of the optimizer begin anew, and with them the counts of its groups.
    """
    run = checkpoint.run
    engine.loaded_checkpoint_dp_world_size = checkpoint.topology.dp
    if options.load_module_only:
        return
    engine.loaded_checkpoint_mp_world_size = checkpoint.topology.model_parallel
    engine.global_steps = run.global_steps
    engine.global_samples = run.global_samples if run.global_samples is not None else _samples(engine)
    engine.skipped_steps = run.skipped_steps
    if options.load_lr_scheduler_states and engine.lr_scheduler is not None:
        _restore_scheduler(engine.lr_scheduler, schedule)
        if options.load_optimizer_states:  # else the groups' rates stay too, as with DeepSpeed
            _set_scheduled(engine.lr_scheduler, optimizer)
    for live in optimizer.base.param_groups if reset else ():
        live.pop(GROUP_STEP, None)
    _set_hyperparameters(optimizer, settings)
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


def _restore_scheduler(scheduler: Any, state: Mapping[str, Any] | None) -> None:
    if state is None:
        logger.warning(
            "the checkpoint holds no state of a learning rate scheduler: the live one starts from its first step"
        )
    else:
        scheduler.load_state_dict(dict(state))


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


def _samples(engine: Engine) -> int:
    return int(engine.global_steps * engine.train_batch_size())


def _set_hyperparameters(optimizer: EngineOptimizer, settings: Settings) -> None:
    for index, values in enumerate(settings[: len(optimizer.base.param_groups)]):  # no settings: none are taken over
        optimizer.set_settings(index, values)


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
