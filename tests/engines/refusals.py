"""Shared by the tests of refused loads: runs, an engine's fingerprint, and the check that a load was refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import Source

from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import (
    UniversalCheckpointError,
)
from ucp_deepspeed.testing.ranks import RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

GetSource = Callable[[str, Run, int], Source]

SAVED = Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay")
TARGET = Run("llama", tp=1, zero={"stage": 3}, precision="bf16", groups="decay")


def fingerprint(engine: Any) -> dict[str, bytes]:
    """Everything that a load could have touched, as bytes."""
    optimizer = engine_optimizer(engine)
    slots = optimizer.slots()
    held: dict[str, Any] = {f"master {index}": slot.master for index, slot in enumerate(slots)}
    held |= {
        f"{key} {index}": value for index, slot in enumerate(slots) for key, value in optimizer.state_of(slot).items()
    }
    held |= {f"weight {name}": getattr(param, "ds_tensor", param) for param, name in engine.param_names.items()}
    held |= {f"buffer {name}": buffer for name, buffer in engine.module.named_buffers()}
    scale = optimizer.loss_scale()
    rest = {
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.base.param_groups
        ],
        "scheduler": engine.lr_scheduler.state_dict(),
        "scale": None if scale is None else dict(scale.values),
    }
    raw = {
        key: value.detach().float().cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else pickle.dumps(value)
        for key, value in held.items()
    }
    return raw | {key: pickle.dumps(value) for key, value in rest.items()}


def failed_load(run: Run, load: str, tag: str | None) -> tuple[str, str, bool]:
    """On a rank: try to load; returns the error's class and text, and whether the engine is as it was."""
    with fp16_on_cpu():
        engine = build_engine(run)
        train_step(engine, run, 1)  # so that there are states to lose
        before = fingerprint(engine)
        try:
            engine.load_checkpoint(load, tag=tag)
        except UniversalCheckpointError as error:
            return type(error).__name__, str(error), fingerprint(engine) == before
    raise AssertionError("the load went through")


def check_refused(
    ranks: Ranks, run: Run, load: Path, error: type[UniversalCheckpointError], *parts: str, tag: str | None = None
) -> None:
    for name, message, untouched in ranks(2).run(failed_load, run, str(load), tag):
        assert name == error.__name__, message
        assert untouched
        for part in parts:
            assert part in message
