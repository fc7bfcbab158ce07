"""The engines that this release handles, and why it doesn't handle others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from deepspeed import __version__ as deepspeed_version
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.config import CONFIG_KEY
from ucp_deepspeed.engine.agreement import agreement, check_same
from ucp_deepspeed.engine.console import show
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
from ucp_deepspeed.engine.left_alone import leave_alone
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers import engine_optimizer, only_evaluates
from ucp_deepspeed.engine.saving.background import check_background
from ucp_deepspeed.engine.saving.save import check_model
from ucp_deepspeed.errors import UnsupportedError

logger = logging.getLogger("ucp_deepspeed")


def check_engine(engine: Engine) -> None:
    """Refuse an engine that this release can't handle, or leave it to DeepSpeed (`left_alone`); called when it is built.
    Collective.

    Raises:
        UnsupportedError: the kind of mixture-of-experts layers, the optimizer's class, or the place where its settings keep its
            tensors is unsupported, and the block asks for what DeepSpeed doesn't do itself.
        ConfigError: the block differs from rank to rank; or DeepSpeed's settings can't be used with asynchronous saving.
        SpecError, MismatchError: the layouts that the config names don't fit the model.
    """
    show()
    with agreement() as told:
        told.mine = engine.universal_checkpoint_config.model_dump(by_alias=True)
        if engine.universal_checkpoint_config.save.asynchronous:
            check_background(engine)
    check_same(CONFIG_KEY, told.values)
    reason = _first_reason(engine, _check_kinds) or _first_reason(engine, _check_model)
    if reason is not None:
        leave_alone(engine, reason)
    elif not only_evaluates(engine):
        _tell_what_is_not_saved(engine)


def _first_reason(engine: Engine, check: Callable[[Any], None]) -> UnsupportedError | None:
    """Return the reason why this release can't handle the engine, from the first rank that finds one. Other errors are raised.
    Collective."""
    with agreement() as told:
        try:
            check(engine)
        except UnsupportedError as error:
            told.mine = error
    return next((reason for reason in told.values if reason is not None), None)


def _check_kinds(engine: Engine) -> None:
    if engine.has_moe_layers:
        _check_experts(engine)
    if not only_evaluates(engine):
        engine_optimizer(engine)


def _check_model(engine: Engine) -> None:
    if not only_evaluates(engine):
        check_model(engine)


def _tell_what_is_not_saved(engine: Engine) -> None:
    if not saves_optimizer(engine) and dist.get_rank() == 0:
        logger.warning(
            "DeepSpeed %s saves no optimizer state in bf16 at stage 0, nor at stage 1 with gradients accumulated in fp32: "
            "nothing can restore it; install %s or later, or use ZeRO without 'data_types.grad_accum_dtype'",
            deepspeed_version,
            SAVES_BF16_WITHOUT_ZERO,
        )


def _check_experts(engine: Engine) -> None:
    """Refuse experts whose ranks or files this release doesn't know.

    Raises:
        UnsupportedError: layers of AutoEP beside DeepSpeed's own, experts in a pipeline, layers of several expert-parallel sizes
            at stage 0, or experts for which DeepSpeed's own checkpoints are incomplete.
    """
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
