"""Tied modules and layer files: what a pipeline engine has beside its stages' parameters.

Source: ``runtime/pipe/module.py``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import TiedLayerSpec

from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.engine.deepspeed_types import Engine, PipelineModule
from ucp_deepspeed.engine.model import gather_model_parallel

logger = logging.getLogger("ucp_deepspeed")


def layer_keys(engine: Engine) -> dict[str, str]:
    """Return keys of layer files (``{layer}.{local name}``) → names, for tied modules. Collective over the model-parallel
    group."""
    if not isinstance(engine, PipelineEngine):
        return {}
    return {key: name for held in gather_model_parallel(engine, dict(_tied_keys(engine))) for key, name in held.items()}


def _tied_keys(engine: Engine) -> Iterator[tuple[str, str]]:
    module: PipelineModule = engine.module
    for layer, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is None and spec.key in engine.module.tied_modules:
            for local_name in engine.module.tied_modules[spec.key].state_dict():
                yield f"{layer}.{local_name}", f"{TIED}{spec.key}.{local_name}"


def tell_of_others(engine: Engine, trained: Collection[str]) -> None:
    """Warn of untrained values in a tied module that differ over its stages: each stage has its own copy, and a load takes the
    first.

    It warns once for each engine: often the later stages don't use theirs. Collective over the stages that share a module.

    Args:
        trained: names of trained parameters.
    """
    told = engine.__dict__.setdefault("_universal_checkpoint_told", set())
    if not isinstance(engine, PipelineEngine):
        return
    module: PipelineModule = engine.module
    for key, shared in module.tied_comms.items():
        if key in told:
            continue
        told.add(key)
        mine = {
            name: _digest(value)
            for name, value in shared["module"].state_dict().items()
            if isinstance(value, torch.Tensor) and f"{TIED}{key}.{name}" not in trained
        }
        copies: list[Any] = [None] * len(shared["ranks"])
        dist.all_gather_object(copies, mine, group=shared["group"])
        differing = [name for name in mine if len({copy.get(name) for copy in copies}) > 1]
        if differing and dist.get_rank() == min(shared["ranks"]):
            logger.warning(
                "pipeline stages hold different values of what isn't trained in module %r; no checkpoint holds those of later "
                "ones: a load gives them those of the first, or, where it is left to DeepSpeed, none: %s",
                key,
                ", ".join(differing),
            )


def _digest(weight: torch.Tensor) -> bytes:
    flat = weight.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(memoryview(flat.view(torch.uint8).numpy()), digest_size=16).digest()
