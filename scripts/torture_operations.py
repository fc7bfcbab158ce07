"""Operations that ``scripts/torture_disks.py`` disturbs: saves and loads of live engines on two ranks, and commands."""

from __future__ import annotations

import gc
import os
import pickle
import random
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from torture_environment import Fault, Met, placed

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

OLD, NEW = "old", "new"
"""Tags of the checkpoint before the fault, and of the one that is saved meanwhile."""

FORMS = {
    "ZeRO-1": Run("mlp", zero={"stage": 1}),
    "ZeRO-3": Run("mlp", zero={"stage": 3}, precision="bf16"),
    "no ZeRO": Run("mlp", zero={"stage": 0}),
    "experts": Run("moe", zero={"stage": 1}, precision="bf16"),
    "pipeline": Run("gpt", pp=2, zero={"stage": 1}),
}


@dataclass
class Answer:
    """The end of an operation on one rank.

    Attributes:
        kind: class of the error; empty if there was none.
        is_ours: whether the package raised it as an error for people.
        is_deepspeeds: whether DeepSpeed's own code raised it.
        text: the error's text; and the traceback if it isn't the package's.
    """

    kind: str = ""
    is_ours: bool = False
    is_deepspeeds: bool = False
    text: str = ""
    met: Met = field(default_factory=Met)


_kept: dict[str, Any] = {}


def prepare(form: str, folder: str) -> None:
    """Build the engine of a form; save it after one step and after two, or load it if that was done. Collective."""
    tunables.VISIBLE_SECONDS, tunables.LOCK_SECONDS = 3.0, 1.0
    tunables.NOTE_AGAIN_SECONDS = (0.05, 0.2)  # type: ignore[assignment]
    if "engine" in _kept:
        _kept.pop("engine").destroy()
        gc.collect()
    run = FORMS[form]
    engine = _kept["engine"] = build_engine(run)
    exists = Path(folder, "latest").is_file()
    dist.barrier()
    for step, tag in enumerate((OLD, NEW), start=1):
        train_step(engine, run, step)
        if not exists:
            seed(step)
            engine.save_checkpoint(folder, tag=tag)
    if exists:
        engine.load_checkpoint(folder)


def seed(number: int) -> None:
    """Seed all streams of random numbers."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def attempt(operation: str, folder: str, tag: str | None, fault: Fault | None) -> Answer:
    """Do an operation, with a fault on this rank if it is one of the fault's. Collective."""
    engine, answer = _kept["engine"], Answer()
    block = engine.universal_checkpoint_config
    load = "always" if operation == "load" else "auto"
    save = block.save.model_copy(update={"asynchronous": operation.startswith("async")})
    engine.universal_checkpoint_config = block.model_copy(update={"load": load, "save": save})
    fault = fault if fault is not None and dist.get_rank() in fault.ranks else Fault()
    try:
        with placed(fault, folder_of(folder)) as answer.met:
            _do(engine, operation, folder, tag)
    except BaseException as error:
        answer.kind, answer.text = type(error).__name__, str(error)
        answer.is_ours = isinstance(error, UniversalCheckpointError)
        if not answer.is_ours:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            places = [name for name in frames if "/deepspeed/" in name or "/ucp_deepspeed/" in name]
            answer.is_deepspeeds = bool(places) and "/deepspeed/" in places[-1]
            answer.text = f"{error}\n{''.join(traceback.format_exception(error))}"
    return answer


def folder_of(folder: str) -> str:
    """Return the folder that a case has for itself, which `folder` lies in."""
    parts = Path(folder).parts
    return str(Path(*parts[: next(n for n, part in enumerate(parts) if part.startswith("case")) + 1]))


def _do(engine: Any, operation: str, folder: str, tag: str | None) -> None:
    if operation == "save what was loaded":
        engine.save_checkpoint(folder, tag=tag)
    elif "save" in operation:
        seed(2)
        engine.save_checkpoint(folder, tag=tag)
        case = folder_of(folder)
        if operation.startswith("async") and case[-1] in "13579":  # the next save tells how this one ended
            engine.save_checkpoint(f"{case}/next", tag="next")
        ucp_deepspeed.wait_for_save()
    else:
        path, _ = engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise UniversalCheckpointError(f"nothing was loaded from {folder}: No such file")


def command(arguments: Sequence[str], fault: Fault, folder: str, output: str) -> None:
    """Run ``ucp`` with a fault, in a process of its own; its output and what it met go into files."""
    from ucp_deepspeed.cli import commands, convert, diff, inspect, printing, verify  # noqa: F401

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    told = os.open(output + ".met", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"COLUMNS": "1000", "TERM": "dumb"}
    status: object = 0
    try:
        with placed(fault, folder, for_ever=True) as met:
            commands.main(list(arguments), prog_name="ucp")
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 99
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(told, pickle.dumps(met))
    os._exit(status if isinstance(status, int) else 1)
