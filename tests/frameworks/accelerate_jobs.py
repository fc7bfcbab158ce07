"""Training with the real Accelerate, as its documentation has it. Run by a launcher on each rank, with a JSON file: a list of
jobs that run one after the other. Rank 0 writes what each has seen beside it.

Losses are linear in the weights and the data are small integers, so that gradients are exact: weights are the same to the last
bit on any number of ranks if the same samples were trained on in the same steps at the same rates.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DummyOptim,
    DummyScheduler,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import ucp_deepspeed

SAMPLES, WIDTH, TOTAL = 64, 8, 24

LINES: list[str] = []
"""The package's lines, since the job began."""


class Kept(logging.Handler):
    """Keeps lines."""

    def emit(self, record: logging.LogRecord) -> None:
        LINES.append(record.getMessage())


logging.getLogger("ucp_deepspeed").addHandler(Kept())


def dataset() -> list[torch.Tensor]:
    """The samples: the first number of each tells which it is."""
    numbers = torch.Generator().manual_seed(7)
    rows = torch.randint(-8, 8, (SAMPLES, WIDTH), generator=numbers).float()
    rows[:, 0] = torch.arange(SAMPLES)
    return list(rows)


class Stream(IterableDataset):
    """The samples, without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(dataset())


class Model(torch.nn.Module):
    """A linear model, with a random number added that no gradient depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, 4, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a value for each sample."""
        return self.linear(rows).sum(dim=1)


class Noted:
    """A registered object."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def schedule_of(kind: str, optimizer: Any, processes: int) -> Any:
    """The schedule of a script."""
    scaled = TOTAL * processes
    if kind == "lambda":  # its length isn't scaled, and it starts with a flat part
        return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, max(0, 36 - step) / 24))
    if kind == "scaled":
        return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (scaled - step) / (scaled * 0.75)))
    if kind == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=scaled)
    if kind == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=scaled)
    if kind == "odd":  # neither
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step + processes))
    raise ValueError(kind)


def config_of(job: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config of a job."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.get("batch", 4),
        "gradient_accumulation_steps": job.get("gas", 1),
        "zero_optimization": {"stage": job.get("stage", 2)},
        "steps_per_print": 10**9,
    }
    if job.get("block", True):
        config["universal_checkpoint"] = {
            "enabled": True,
            "save": {"async": job.get("async", False), "keep": job.get("keep")},
            **job.get("more", {}),
        }
    if job.get("schedule") == "config":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.25, "torch_adam": True}}
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.25, "warmup_num_steps": 3, "total_num_steps": TOTAL},
        }
    return config


def accelerator_of(job: dict[str, Any]) -> Accelerator:
    """A new Accelerator, as if the process were new."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    set_seed(job.get("seed", 1))
    project = ProjectConfiguration(
        project_dir=job.get("project"),
        automatic_checkpoint_naming="project" in job,
        total_limit=job.get("limit"),
        iteration=job.get("iteration", 0),
    )
    return Accelerator(
        gradient_accumulation_steps=job.get("gas", 1),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(job)) if "launched" not in job else None,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=job.get("seedable", True),
            use_stateful_dataloader=job.get("stateful", False),
            dispatch_batches=job.get("dispatch"),
            split_batches=job.get("split", False),
        ),
        step_scheduler_with_optimizer=job.get("tied", True),
    )


def gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def weights_of(model: Any) -> str:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        held = torch.cat([param.detach().float().flatten() for param in model.parameters()])
        return hashlib.blake2b(held.numpy().tobytes(), digest_size=8).hexdigest()


class Built:
    """All that a job trains: one model with its schedule, further schedules beside it, perhaps a second model."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.accelerator = job, accelerator_of(job)
        data, stream = (Stream(), True) if job.get("stream") else (dataset(), False)
        model, loader = Model(), DataLoader(data, batch_size=job.get("batch", 4), shuffle=not stream)
        kind, processes = job.get("schedule", "lambda"), self.accelerator.num_processes
        if kind == "config":
            optimizer = DummyOptim(model.parameters())
            schedule = DummyScheduler(optimizer)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
            schedule = schedule_of(kind, optimizer, processes)
        prepared = self.accelerator.prepare(model, optimizer, loader, schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared
        self.second = None
        if job.get("models") == 2:
            other = Model()
            self.second = self.accelerator.prepare(other, torch.optim.AdamW(other.parameters(), lr=0.25))[0]
        alone = [schedule_of(side, torch.optim.SGD([torch.zeros(1)], 0.25), processes) for side in job.get("sides", ())]
        self.sides = [self.accelerator.prepare_scheduler(each) for each in alone]
        self.noted = Noted()
        self.accelerator.register_for_checkpointing(self.noted)
        self.seen: dict[str, Any] = {"steps": [], "saved": [], "gathered": []}

    def load(self) -> None:
        """Load what the job names, and note where that leads."""
        for spoiled in self.job.get("spoil", ()):
            if self.accelerator.is_main_process:
                Path(spoiled).unlink()
            self.accelerator.wait_for_everyone()
        if "load" not in self.job:
            return
        self.accelerator.load_state(self.job["load"] or None)
        self.seen["noted"], self.seen["step"] = self.noted.value, gathered(self.accelerator.step)
        if not self.job.get("draws"):
            self.seen["drawn"] = gathered([float(torch.rand(())), random.random()])
        if self.second is not None:
            self.seen["second"] = weights_of(self.second)

    def loader_of(self, epoch: int) -> Any:
        """Return the loader, or the rest of it where the job resumes."""
        job = self.job
        if job.get("sets", True):
            self.loader.set_epoch(epoch)
        if epoch != job.get("epoch", 0) or "skip" not in job or job.get("stateful"):
            return self.loader
        skip = skip_first_batches if job.get("function") else self.accelerator.skip_first_batches
        return skip(self.loader, job["skip"])

    def step(self, epoch: int, rows: Any, samples: list[int]) -> list[int]:
        """Train on one micro-batch. Return the samples since the last step, which is noted."""
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(rows).mean())
            if self.second is not None:
                self.second.backward(self.second(rows).mean())
                self.second.step()
            samples = samples + [int(row[0]) for row in rows]
            self.seen["gathered"].append(len(self.accelerator.gather_for_metrics(rows)))
            self.optimizer.step()
            for each in (self.schedule, *self.sides):
                each.step()
            self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                return samples
            every = sorted(chain.from_iterable(gathered(samples)))
            rate = self.optimizer.param_groups[0]["lr"]
            drawn = float(torch.rand(())) if self.job.get("draws") else None
            rates = [float(rate).hex(), *(each.get_last_lr()[0].hex() for each in self.sides)]
            self.seen["steps"].append([epoch, every, rates, weights_of(self.model), drawn])
            return []

    def save(self, micro: int) -> None:
        """Save if the job does so after this micro-batch, and end where it dies."""
        if str(micro) not in self.job.get("saves", {}):
            return
        self.accelerator.save_state(self.job["saves"][str(micro)] or None)
        if self.second is not None:
            self.seen["second"] = weights_of(self.second)
        if "project" in self.job:
            self.seen["saved"].append(self.checkpoints())
        if self.job.get("dies") == micro:
            os._exit(0)

    def checkpoints(self) -> list[str]:
        """Return the names in the project's folder of checkpoints."""
        return sorted(entry.name for entry in Path(self.job["project"], "checkpoints").iterdir())


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One job: build, load, train, save."""
    built = Built(job)
    built.load()
    samples: list[int] = []
    micro, left = job.get("skip", 0), job.get("micro", 10**9)
    for epoch in range(job.get("epoch", 0), job.get("epochs", 1)):
        for rows in built.loader_of(epoch):
            if not left:
                break
            samples = built.step(epoch, rows, samples)
            micro, left = micro + 1, left - 1
            built.noted.value = micro
            built.save(micro)
    if job.get("async"):
        ucp_deepspeed.wait_for_save()
    if "project" in job:
        built.accelerator.wait_for_everyone()
        built.seen["left"] = built.checkpoints()
    return built.seen


def main() -> None:
    """Run the jobs."""
    path = Path(sys.argv[1])
    out: dict[str, Any] = {}
    for job in json.loads(path.read_text()):
        LINES.clear()
        try:
            out[job["name"]] = train(job) | {"said": list(LINES)}
        except Exception as error:
            if not job.get("fails"):
                raise
            out[job["name"]] = {"error": f"{type(error).__name__}: {error}", "said": list(LINES)}
        if os.environ["RANK"] == "0":
            path.with_suffix(".out.json").write_text(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
