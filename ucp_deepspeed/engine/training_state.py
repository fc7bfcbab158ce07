"""What a run is beside its tensors: counters, scheduler, hyper-parameters, loss scale."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import IMPLEMENTATION_SWITCHES
from ucp_deepspeed.engine.matching import Names
from ucp_deepspeed.engine.optimizers import EngineOptimizer

if TYPE_CHECKING:
    from ucp_deepspeed.engine.load import LoadOptions

logger = logging.getLogger("ucp_deepspeed")


def restore_run(
    engine: Any, checkpoint: Checkpoint, names: Names, optimizer: EngineOptimizer, options: LoadOptions
) -> None:
    """Take over counters, scheduler, hyper-parameters and loss scale, as far as the options ask for them."""
    run = checkpoint.run
    engine.loaded_checkpoint_dp_world_size = checkpoint.topology.dp
    if options.load_module_only:
        return
    engine.loaded_checkpoint_mp_world_size = checkpoint.topology.model_parallel
    engine.global_steps = run.global_steps
    engine.global_samples = run.global_samples if run.global_samples is not None else _samples(engine)
    engine.skipped_steps = run.skipped_steps
    if options.load_lr_scheduler_states and engine.lr_scheduler is not None and run.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(dict(run.lr_scheduler))
    if options.load_optimizer_states:
        restore_hyperparameters(checkpoint, names, optimizer)
        _restore_loss_scale(checkpoint, optimizer)


def _samples(engine: Any) -> int:
    return int(engine.global_steps * engine.train_batch_size())


def restore_hyperparameters(checkpoint: Checkpoint, names: Names, optimizer: EngineOptimizer) -> None:
    """Give each live parameter group the hyper-parameters of its parameters, whatever their groups' order was.

    A group whose parameters come from groups with different values takes those of its first parameter, and a warning says so.
    """
    of_name: dict[str, Mapping[str, Any]] = {
        names.source[name]: group.hyperparameters for group in checkpoint.groups for name in group.names
    }
    for index, group in enumerate(optimizer.group_names()):
        logical = [names.target[name] for name in group if name is not None]
        sources = [of_name[name] for name in logical if name in of_name]
        if not sources:
            continue
        live = optimizer.base.param_groups[index]
        for key, value in sources[0].items():
            if key in IMPLEMENTATION_SWITCHES or key not in live:
                continue
            if any(other.get(key) != value for other in sources[1:]):
                logger.warning(
                    "parameter group %d: %r differs between its parameters' source groups; took %r", index, key, value
                )
            if isinstance(live[key], torch.Tensor):  # such as a rate on the device
                live[key].fill_(value)
            else:
                live[key] = value


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
