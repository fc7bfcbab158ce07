"""The engines that this release handles, and those that it leaves to DeepSpeed's own saves and loads, on one topology.

Where the block asks for more than DeepSpeed does (``"load": "always"``, a policy, a save in the background) an engine that can't
be handled is refused when it is built. Loads that are left to DeepSpeed trust the files, as DeepSpeed does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed import __version__ as deepspeed_version
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint import Checkpoint, resolve_tag
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, home_of
from ucp_deepspeed.config import CONFIG_KEY, UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import agreement, check_same
from ucp_deepspeed.engine.console import show, told_once
from ucp_deepspeed.engine.deepspeed_surface import (
    OLDEST_AUTOEP,
    OLDEST_MOE,
    SAVES_BF16_WITHOUT_ZERO,
    autoep_layers,
    autoep_marks_experts,
    moe_files_have_names,
    saves_optimizer,
)
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.loading.native import LoadOptions
from ucp_deepspeed.engine.loading.training_state import check_schedule
from ucp_deepspeed.engine.model import engine_topology
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.node_local import open_here, writes_for_node
from ucp_deepspeed.engine.optimizers import engine_optimizer, only_evaluates
from ucp_deepspeed.engine.saving.background import check_background
from ucp_deepspeed.engine.saving.preemption import watch
from ucp_deepspeed.engine.saving.save import check_model
from ucp_deepspeed.errors import UniversalCheckpointError, UnsupportedError
from ucp_deepspeed.remote import is_url, on_disk

logger = logging.getLogger("ucp_deepspeed")


def check_engine(engine: Engine) -> None:
    """Refuse an engine that this release can't handle, or leave it to DeepSpeed; called when it is built. Collective.

    Raises:
        UnsupportedError: the kind of mixture-of-experts layers, the optimizer's class, or the place where its settings keep its
            tensors is unsupported, and the block asks for what DeepSpeed doesn't do itself.
        ConfigError: the block differs from rank to rank; or DeepSpeed's settings can't be used with asynchronous saving.
        SpecError, MismatchError: the layouts that the config names don't fit the model.
    """
    show()
    with agreement(tells=True) as told:
        told.mine = engine.universal_checkpoint_config.model_dump(by_alias=True)
        save = engine.universal_checkpoint_config.save
        if save.asynchronous or save.on_signal is not None:
            check_background(engine, "async" if save.asynchronous else "on_signal")
    check_same(CONFIG_KEY, told.values)
    reason = _first_reason(engine, _check_kinds)
    if reason is None and not only_evaluates(engine):
        reason = _first_reason(engine, check_model)
    if reason is not None:
        _leave_alone(engine, reason)
    elif not saves_optimizer(engine) and dist.get_rank() == 0:
        logger.warning(
            "DeepSpeed %s saves no optimizer state in bf16 at stage 0, nor at stage 1 with gradients accumulated in fp32: "
            "nothing can restore it; install %s or later, or use ZeRO without 'data_types.grad_accum_dtype'",
            deepspeed_version,
            SAVES_BF16_WITHOUT_ZERO,
        )
    if not only_evaluates(engine):
        watch(engine)


def _first_reason(engine: Engine, check: Callable[[Any], None]) -> UnsupportedError | None:
    """Return the first rank's reason why this release can't handle the engine; raise other errors. Collective."""
    with agreement(tells=True) as told:
        try:
            check(engine)
        except UnsupportedError as error:
            told.mine = error
    return next((reason for reason in told.values if reason is not None), None)


def _check_kinds(engine: Engine) -> None:
    if engine.has_moe_layers:
        _check_experts(engine)
    engine_optimizer(engine)


def _check_experts(engine: Engine) -> None:
    """Refuse experts whose ranks or files this release doesn't know."""
    sizes, modules = {layer.ep for layer in ModelNames(engine).layers.values()}, list(engine.module.modules())
    automatic = any(autoep_layers(engine.module))
    spread = any(isinstance(module, MoE) and not module.enable_expert_tensor_parallelism for module in modules)
    reason = ""
    if automatic and not autoep_marks_experts():
        reason = f"layers of AutoEP in DeepSpeed {deepspeed_version} (the first that can be handled are those of {OLDEST_AUTOEP})"
    elif not automatic and not moe_files_have_names():
        reason = (
            f"experts of DeepSpeed {deepspeed_version}, whose files name no parameters (since {OLDEST_MOE} they do)"
        )
    elif automatic and any(isinstance(module, MoE) for module in modules):
        reason = "layers of DeepSpeed's AutoEP beside its own mixture-of-experts layers"
    elif isinstance(engine, PipelineEngine):
        reason = "mixture-of-experts layers in a pipeline"
    elif len(sizes) > 1 and engine.zero_optimization_stage() == 0:
        reason = f"at stage 0, layers of several expert-parallel sizes ({sorted(sizes)})"
    elif spread and max(sizes) < engine.mp_world_size:
        reason = (
            f"an expert-parallel size ({max(sizes)}) below the tensor-parallel one without enable_expert_tensor_parallelism "
            f"(DeepSpeed writes no model_states file of the other tensor-parallel ranks)"
        )
    if reason:
        raise UnsupportedError(f"universal checkpoints of {reason} are not supported by this release")


REASON = "universal_checkpoint_left_alone"
"""Attribute of an engine: the `UnsupportedError` that says why it is left to DeepSpeed, or None."""


def _leave_alone(engine: Engine, reason: UnsupportedError) -> None:
    """Leave the engine's saves and loads to DeepSpeed, or refuse it where the block asks for more than DeepSpeed does."""
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    if config.load == "always" or config.has_policies or config.save.asynchronous or config.save.on_signal is not None:
        raise UnsupportedError(
            reason.heading,
            reason.problems,
            'change that; or leave saves and loads on the same topology to DeepSpeed: "load": "auto", without policies, '
            'without "async": true and without "on_signal"',
        )
    setattr(engine, REASON, reason)
    if dist.get_rank() == 0:
        logger.warning(
            "%s: saves and loads of this engine are left to DeepSpeed alone (no manifest; the same topology only)",
            reason,
        )


def is_left_alone(engine: Engine) -> bool:
    """Return whether the engine's saves and loads are DeepSpeed's own."""
    return getattr(engine, REASON, None) is not None


def save_checkpoint(
    native: Callable[..., bool], engine: Engine, save_dir: str, tag: Any = None, *positional: Any, **named: Any
) -> bool:
    """Save by DeepSpeed itself, in place of ``engine.save_checkpoint``. Remove an old manifest and checksums: they describe other
    files."""
    if save_dir and writes_for_node(engine):
        folder = Path(save_dir) / (f"global_step{engine.global_steps}" if tag is None else str(tag))
        for described in (MANIFEST_NAME, CHECKSUMS_NAME):
            (folder / described).unlink(missing_ok=True)
    return native(save_dir, tag, *positional, **named)


def load_checkpoint(
    native: Callable[..., Any], engine: Engine, load_dir: str, tag: Any = None, *positional: Any, **named: Any
) -> Any:
    """Load by DeepSpeed itself, in place of ``engine.load_checkpoint``.

    Raises:
        UnsupportedError: the checkpoint is a universal one, or is known to be of another topology; on every rank, before
            anything of the engine has changed.
        MismatchError: the engine has a scheduler, and the checkpoint no state of one.
    """
    with agreement():
        if is_url(load_dir):
            reason: UnsupportedError = getattr(engine, REASON)
            told = f"{load_dir} is a URL, which DeepSpeed itself can't load, and this engine's loads are left to it"
            raise UnsupportedError(
                f"{told}: {reason.heading}", reason.problems, "copy the folder to a disk, and load it there"
            )
        load_dir = on_disk(load_dir)
        options = LoadOptions(*positional, **named)
        aside = _check_loadable(engine, Path(load_dir), None if tag is None else str(tag), options)
        if aside is not None:
            load_dir, tag = str(aside.parent), aside.name
    with told_once(load_dir, tag):
        return native(load_dir, tag=tag, **options.arguments())


def _check_loadable(engine: Engine, load_dir: Path, tag: str | None, options: LoadOptions) -> Path | None:
    """Refuse checkpoints that DeepSpeed can't load, as far as that can be told; DeepSpeed has its own messages for the rest.
    Return the folder of a tag that lies aside (`resolve_tag`), which DeepSpeed doesn't find by its name; else None."""
    reason: UnsupportedError = getattr(engine, REASON)
    try:
        folder = resolve_tag(load_dir, tag)
    except UniversalCheckpointError:
        return None
    aside = None if home_of(folder) == folder else folder
    if (folder / INDEX_NAME).is_file():
        raise UnsupportedError(
            f"{folder} is a universal checkpoint, which this engine can't load: {reason.heading}",
            reason.problems,
            'change that: "load": "auto" or "always" then loads it',
        )
    if engine.universal_checkpoint_config.load == "never":
        return aside
    try:
        checkpoint = open_here(engine, folder)
    except UniversalCheckpointError:
        return aside
    if _is_of_another_topology(checkpoint, engine, options):
        raise UnsupportedError(
            f"{folder} was saved on {checkpoint.topology}, and this engine, on {engine_topology(engine)}, can load what its own "
            f"topology saved: {reason.heading}",
            reason.problems,
            f'change that, or resume on {checkpoint.topology}, where "load": "auto" leaves it to DeepSpeed',
        )
    check_schedule(engine, checkpoint, options, "load_lr_scheduler_states=False")
    return aside


def _is_of_another_topology(checkpoint: Checkpoint, engine: Engine, options: LoadOptions) -> bool:
    """Return whether DeepSpeed can't resume from it. Without ZeRO, and for weights below stage 3, one file serves all
    replicas."""
    saved, live = checkpoint.topology, engine_topology(engine)
    if (saved.tp, saved.pp) != (live.tp, live.pp):
        return True
    stages = saved.zero_stage, live.zero_stage
    if not options.optimizer_states and max(stages) < 3:
        return False
    if saved.ep != live.ep or (stages[0] != stages[1] and set(stages) != {1, 2}):
        return True
    return saved.dp != live.dp and max(stages) > 0
