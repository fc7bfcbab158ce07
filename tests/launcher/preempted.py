"""A script that a signal stops, for `test_preempted_runs`: ``preempted.py FOLDER EVENTS``.

It trains to `LAST_STEP` on the stream of `ResumableSampler` with two micro-batches for a step, goes on from what it finds in the
folder, and notes the samples that it trains on. In each round it gets the signal that the round's event tells.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch.utils.data import DataLoader

from ucp_deepspeed.data import ResumableSampler
from ucp_deepspeed.engine.saving import preemption, save
from ucp_deepspeed.testing.runs import SEQUENCE, VOCABULARY, Run, build_engine

SAMPLES, LAST_STEP = 50, 6


class Tokens(torch.utils.data.Dataset[tuple[int, torch.Tensor]]):
    """Samples with their indices."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(index))
        return index, torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)


def seen_in_training(folder: str, name: str, steps: int, in_step: Callable[[int], None] = lambda step: None) -> None:
    """Go on in a folder up to a step, and save there unless a signal comes first.

    Args:
        name: beginning of the names of the logs: a line for each micro-batch.
        in_step: called between the two micro-batches of each step.
    """
    runs = Path(folder, "runs")
    block = {"enabled": True, "save": {"on_signal": str(runs)}}
    engine = build_engine(Run("mlp", zero={"stage": 2}, universal=block, config={"gradient_accumulation_steps": 2}))
    engine.load_checkpoint(str(runs))
    tokens = Tokens()
    sampler = ResumableSampler(tokens, seed=5).follow(engine)
    loader = DataLoader(tokens, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    with Path(folder, f"{name}-rank{dist.get_rank()}.jsonl").open("w", encoding="utf-8") as log:
        while engine.global_steps < steps:
            for number, (indices, batch) in enumerate(loader):
                print(json.dumps([engine.global_steps, number % 2, indices.tolist()]), file=log, flush=True)
                engine.backward(engine(batch[:, :-1], batch[:, 1:]))
                if number % 2 == 0:
                    in_step(engine.global_steps + 1)
                engine.step()
                if engine.global_steps == steps:
                    break
    engine.save_checkpoint(str(runs))
    engine.destroy()


def main(folder: str, events: Any) -> None:
    """Run one round."""
    round_number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    event = events[round_number]

    def in_step(step: int) -> None:
        if step != event["step"] or dist.get_rank() != event["rank"]:
            return
        if event.get("hangs"):
            save.write_manifest = lambda *_: time.sleep(100)  # type: ignore[assignment]
        os.kill(os.getppid() if event["to"] == "launcher" else os.getpid(), getattr(signal, event["signal"]))
        while preemption._noted.number is None:
            time.sleep(0.01)

    deepspeed.init_distributed("gloo")
    try:
        seen_in_training(folder, f"round{round_number}", LAST_STEP, in_step)
    finally:
        print(f"rank {dist.get_rank()} left the script", flush=True)


if __name__ == "__main__":
    main(sys.argv[-2], json.loads(sys.argv[-1]))
