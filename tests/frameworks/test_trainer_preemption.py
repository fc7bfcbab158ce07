"""A signal under Trainer: it saves a checkpoint of its own after the very step, and a run on other ranks goes on from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import Job, heard, in_order, train, trainer_of

from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state

Ranks = Callable[[int], RankPool]


def stop_at(job: Job, step: int) -> tuple[Any, int, list[str], Any]:
    """Train until a signal to rank 1 between the two micro-batches of a step ends the run."""
    reset_parallel_state()
    with heard() as messages:
        trainer, watch = trainer_of(job)

        def signalled(args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == step - 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        watch.on_substep_end = signalled  # type: ignore[method-assign]
        with pytest.raises(SystemExit) as left:
            trainer.train()
        result = left.value.code, trainer.state.global_step, messages, watch.samples
        trainer.deepspeed.destroy()
    return result


def test_trainer_saves_at_the_very_step(ranks: Ranks, tmp_path: Path) -> None:
    """Without a single save of the run's own: none is lost."""
    universal = {"enabled": True, "save": {"on_signal": str(tmp_path / "unused"), "async": True}}
    arguments = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "save_strategy": "no"}
    arguments |= {"eval_strategy": "steps", "eval_steps": 3}
    job = Job(tmp_path / "run", samples=32, universal=universal, arguments=arguments)
    [code, step, messages, taken], _ = ranks(2).run(stop_at, job, 3)
    assert (code, step) == (75, 3)
    assert [entry.name for entry in job.folder.iterdir()] == ["checkpoint-3"] and not (tmp_path / "unused").exists()
    assert any(f"step 3 is saved into a checkpoint of Trainer's in {job.folder}" in line for line in messages)
    one_rank = arguments | {"per_device_train_batch_size": 4}
    [resumed] = ranks(1).run(train, replace(job, resume=True, arguments=one_rank))
    whole = ranks(2).run(train, replace(job, folder=tmp_path / "whole"))[0]
    ordered = in_order(whole, 2, 2)
    assert list(taken) == [1, 2, 3] and list(resumed.samples) == list(whole.samples)[3:]
    assert in_order(resumed, 1, 4) == {step: samples for step, samples in ordered.items() if step > 3}
